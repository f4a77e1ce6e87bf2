"""Buffers that hold their first value again at the end: a queue's pointer after whole rounds, a toggle."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hydragrad as hg
from hydragrad.hypergradient.sweeping import Sweep
from tests.hypergradient.recorded import recipe_of, recorded, values
from tests.oracles import Recipe
from tests.tolerances import FINITE_DIFFERENCE, assert_close
from tests.zoo import CLASSES, N_TRAIN, Case, case

PAIRS = [[[2 * k % N_TRAIN, 2 * k % N_TRAIN + 1]] for k in range(6)]
"""Steps on two examples each."""


class Queue(nn.Module):
    """Attends to the last eight features, kept in a ring whose pointer is back at 0 after every fourth batch of two."""

    queue: Tensor
    pointer: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, CLASSES)
        self.register_buffer("queue", torch.randn(8, 5))
        self.register_buffer("pointer", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        queue, features = self.queue.clone(), torch.tanh(self.first(x))
        if self.training:
            with torch.no_grad():
                self.queue[(int(self.pointer) + torch.arange(len(x))) % 8] = features.detach()
                self.pointer.copy_((self.pointer + len(x)) % 8)
        return self.last(features + torch.softmax(features @ queue.T, 1) @ queue)


class Toggle(nn.Module):
    """Another activation at every other call; 0 or 1 in a buffer."""

    other: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, CLASSES)
        self.register_buffer("other", torch.zeros((), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        features = self.first(x)
        out = torch.sin(1.1 * features) if bool(self.other != 0) else torch.tanh(features)
        if self.training:
            self.other.copy_((self.other.double() + 1) % 2)
        return self.last(out)


class Cleared(nn.Module):
    """Adds the features of a call to a sum that the next clears; calls before ``begin`` leave it alone."""

    sum: Tensor
    calls: Tensor

    def __init__(self, begin: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last, self.begin = nn.Linear(4, 5), nn.Linear(5, CLASSES), begin
        self.register_buffer("sum", torch.zeros(5))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.first(x))
        out = self.last(features + self.sum.clone())
        if self.training:
            with torch.no_grad():
                if int(self.calls) >= self.begin:
                    self.sum.add_(features.detach().mean(0)) if int(self.calls) % 2 == 0 else self.sum.zero_()
                self.calls.add_(1)
        return out


BUILDS: dict[str, tuple[Callable[[], nn.Module], int, set[str], set[str]]] = {
    "queue": (Queue, 4, {"queue"}, {"pointer"}),
    "bool": (lambda: Toggle(torch.bool), 4, set(), {"other"}),
    "integer": (lambda: Toggle(torch.int64), 6, set(), {"other"}),
    "float": (lambda: Toggle(torch.float64), 6, {"other"}, set()),
    "cleared": (lambda: Cleared(0), 6, {"sum"}, {"calls"}),
}
"""Model, how many steps lead back to the first value, and the names of buffers: float ones, others."""


def problem_of(build: Callable[[], nn.Module]) -> Case:
    return replace(case("batchnorm"), build=lambda: build().double())


def by_hand(problem: Case, recipe: Recipe, weights: Tensor) -> Tensor:
    """The losses of the queries after a plain loop with weighted losses."""
    model = problem.build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for (ids,) in recipe.steps:
        inputs, labels = (torch.stack(x) for x in zip(*[recipe.samples[i] for i in ids], strict=True))
        optimizer.zero_grad()
        (problem.loss(model, (inputs, labels)) * weights[list(ids)]).mean().backward()
        optimizer.step()
    inputs, labels = (torch.stack(x) for x in zip(*problem.queries, strict=True))
    return problem.loss(model.eval(), (inputs, labels)).detach()


def differences(problem: Case, recipe: Recipe) -> Tensor:
    """Minus the central differences in the weight of every example, [N, M]: what removing it adds."""
    rows = []
    for i in range(N_TRAIN):
        shift = torch.zeros(N_TRAIN, dtype=torch.float64)
        shift[i] = 1e-5
        rows.append((by_hand(problem, recipe, 1 - shift) - by_hand(problem, recipe, 1 + shift)) / 2e-5)
    return torch.stack(rows)


@pytest.mark.parametrize("every", [2, 100])
@pytest.mark.parametrize("name", BUILDS)
def test_against_a_retraining_loop(name: str, every: int, tmp_path: Path) -> None:
    build, steps, carried, counters = BUILDS[name]
    problem = problem_of(build)
    recipe = recipe_of(problem, steps=PAIRS[:steps])
    run = recorded(recipe, tmp_path / "run", [PAIRS[:steps]], checkpoint_every=every)
    first, last = run.trajectory.state(0).buffers, run.replay().buffers
    assert any(torch.equal(first[n], last[n]) for n in carried | counters)  # as it was in the beginning
    objective = Sweep.of(run).objective
    assert ({*objective.carried}, {*objective.counters}) == (carried, counters)
    expected = differences(problem, recipe)
    assert_close(values(run, problem.queries), expected, FINITE_DIFFERENCE)
    found = hg.hypergradients(run, examples=range(N_TRAIN), check=False, progress=False)
    assert_close(found.scores(problem.queries).values, expected, FINITE_DIFFERENCE)


def test_a_buffer_that_is_written_to_midway_and_only_there(tmp_path: Path) -> None:
    """Seen if a state is stored in between; refused if none is, whichever sweep meets it."""
    problem = problem_of(lambda: Cleared(2))
    recipe = recipe_of(problem, steps=PAIRS)
    run = recorded(recipe, tmp_path / "seen", [PAIRS], checkpoint_every=1)
    assert_close(values(run, problem.queries), differences(problem, recipe), FINITE_DIFFERENCE)
    run = recorded(recipe, tmp_path / "run", [PAIRS], checkpoint_every=2)
    for question in (
        lambda: values(run, problem.queries),
        lambda: hg.hypergradients(run, examples=[0], check=False, progress=False),
    ):
        with pytest.raises(hg.UnsupportedError, match=r"step [24] writes to the buffer 'sum'.*checkpoint_every=1"):
            question()
