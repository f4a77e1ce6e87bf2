"""State that a model keeps in Python is found at load, and told from caches and logs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hydragrad as hg
from hydragrad.errors import UnsupportedError
from tests.tolerances import FINITE_DIFFERENCE, relative_error
from tests.trajectory.loops import CLASSES, FEATURES, bind, make_data, record_run


class Remembering(nn.Module):
    """A network with plain attributes, changed by every call in training mode."""

    def __init__(self, act: "Callable[[Remembering, Tensor], Tensor]") -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(FEATURES, 5), nn.Linear(5, CLASSES), act
        self.calls, self.average, self.seen = 0, torch.zeros(5), [0.0]
        self.table: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return self.second(self.act(self, torch.tanh(self.first(x))))


def warming_up(model: Remembering, x: Tensor) -> Tensor:
    return x * min(1.0, model.calls / 8)


def later(model: Remembering, x: Tensor) -> Tensor:
    return x * 0.5 if model.calls > 6 else x


def in_turns(model: Remembering, x: Tensor) -> Tensor:
    return torch.relu(x) if model.calls % 2 else x


def centred(model: Remembering, x: Tensor) -> Tensor:
    if model.training:
        model.average = 0.9 * model.average + 0.1 * x.detach().mean(0)
    return x - model.average


def centred_in_place(model: Remembering, x: Tensor) -> Tensor:
    out = x - model.average
    if model.training:
        model.average.mul_(0.9).add_(0.1 * x.detach().mean(0))
    return out


def counted(model: Remembering, x: Tensor) -> Tensor:
    return x


def cached(model: Remembering, x: Tensor) -> Tensor:
    if model.table is None:
        model.table = torch.linspace(0.5, 1.5, 5)
    return x * model.table


def logged(model: Remembering, x: Tensor) -> Tensor:
    model.average = x.detach().mean(0)
    model.seen.append(float(x.detach().sum()))
    return x


def seeded(act: Callable[[Remembering, Tensor], Tensor]) -> Remembering:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Remembering(act)


@pytest.mark.parametrize("act", [warming_up, later, in_turns, centred, centred_in_place])
def test_a_model_that_depends_on_its_plain_attributes_is_refused(
    act: Callable[[Remembering, Tensor], Tensor], tmp_path: Path
) -> None:
    record_run(tmp_path / "run", seeded(act))
    name = "average" if act in (centred, centred_in_place) else "calls"  # calls are counted by all
    words = rf"^module '' \(Remembering\) keeps '{name}' in Python.*register_buffer\('{name}'"
    with pytest.raises(UnsupportedError, match=words):
        bind(tmp_path / "run", model=seeded(act))


@pytest.mark.parametrize("act", [counted, cached, logged])
def test_counters_caches_and_logs_that_nothing_depends_on_are_let_be(
    act: Callable[[Remembering, Tensor], Tensor], tmp_path: Path
) -> None:
    record_run(tmp_path / "run", seeded(act))
    run = bind(tmp_path / "run", model=seeded(act))
    assert hg.verify(run).exact
    assert hg.attribute(run, make_data(3), progress=False, check=False).diagnostics.drift == 0.0


class WarmingUp(nn.Module):
    """As the refusal advises."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 5), nn.Linear(5, CLASSES)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.second(torch.tanh(self.first(x)) * min(1.0, int(self.calls) / 8))


def test_the_same_in_a_buffer_is_exact(tmp_path: Path) -> None:
    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return WarmingUp().double()

    data, queries = make_data(dtype=torch.float64), make_data(3, torch.float64)
    record_run(tmp_path / "run", make(), data=data)
    run = bind(tmp_path / "run", model=make(), data=data)
    assert hg.verify(run).exact
    scores = hg.attribute(run, queries, progress=False, check=False)
    columns = []
    for h in (-1e-5, 1e-5):
        weights = torch.ones(run.num_examples, dtype=torch.float64)
        weights[3] += h
        model = make().eval()
        state = run.replay(weights=weights)
        model.load_state_dict({**state.params, **state.buffers})
        with torch.no_grad():
            columns.append(nn.functional.cross_entropy(model(queries.tensors[0]), queries.tensors[1], reduction="none"))
    measured = (columns[0] - columns[1]) / 2e-5
    assert relative_error(scores.values[3], measured) < FINITE_DIFFERENCE[torch.float64]
