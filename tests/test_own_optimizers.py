"""Optimizers of one's own: refused with what to do, or registered, recorded, replayed and differentiated."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

import hydragrad as hg
from hydragrad.step import Update, known, register, supported, update_for
from tests.tolerances import FINITE_DIFFERENCE, ORACLE, SAME, assert_close
from tests.zoo import N_TRAIN, case

PROBLEM = case("mlp_tanh")
QUERIES = PROBLEM.queries
EPOCHS, BATCH = 2, 4


class Soft(Optimizer):
    """Momentum, softly signed, with a rate that falls by a count of its own: ``lr`` has no default."""

    def __init__(self, params: Any, lr: float, beta: float = 0.8, decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                state = self.state[w]
                if not state:
                    state["taken"], state["mean"] = torch.tensor(0.0), torch.zeros_like(w)
                state["mean"].mul_(group["beta"]).add_(w.grad, alpha=1 - group["beta"])
                direction = state["mean"] / (state["mean"].abs() + 0.1) + group["decay"] * w
                w.sub_(group["lr"] / (1 + float(state["taken"])) * direction)
                state["taken"] += 1


class SoftUpdate(Update):
    """The same, of one element."""

    def slots(self, hyper: Any) -> tuple[str, ...]:
        return ("mean",)

    def scalars(self, torch_state: Any) -> dict[str, float]:
        return {"taken": float(torch_state.get("taken", 0.0))}

    def step(self, w: Tensor, slots: Any, g: Tensor, hyper: Any, scalars: Any) -> tuple[Tensor, dict[str, Tensor]]:
        mean = hyper["beta"] * slots["mean"] + (1 - hyper["beta"]) * g
        direction = mean / (mean.abs() + 0.1) + hyper["decay"] * w
        return w - hyper["lr"] / (1 + scalars["taken"]) * direction, {"mean": mean}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is known to that test alone."""
    monkeypatch.setattr(known, "_OWN", {})
    monkeypatch.setattr(known, "_OF_TORCH", dict(known._OF_TORCH))


def soft(model: nn.Module, cls: Any = Soft) -> Optimizer:
    """Two param groups."""
    weights, biases = [], []
    for name, param in model.named_parameters():
        (biases if "bias" in name else weights).append(param)
    return cls([{"params": weights, "decay": 0.05}, {"params": biases, "lr": 0.3}], lr=0.2)


def loop(model: nn.Module, optimizer: Optimizer, batches: Any, weights: Tensor | None = None) -> None:
    """Two passes in order; ``weights`` of the examples multiply their losses."""
    for _ in range(EPOCHS):
        start = 0
        for batch in batches(DataLoader(PROBLEM.samples, BATCH)):  # type: ignore[arg-type]
            optimizer.zero_grad()
            losses = PROBLEM.loss(model, batch)
            if weights is not None:
                losses = losses * weights[start : start + BATCH]
            losses.mean().backward()
            optimizer.step()
            start += BATCH


def record(path: Path, make: Any = soft) -> nn.Module:
    model = PROBLEM.build()
    with hg.record(path, model, optimizer := make(model)) as recording:
        loop(model, optimizer, recording.batches)
    return model


def load(path: Path) -> hg.Run:
    return hg.load(path, model=PROBLEM.build(), loss=PROBLEM.loss, data=PROBLEM.samples)


def scored(run: hg.Run) -> Tensor:
    return hg.attribute(run, QUERIES, progress=False, check=False).values


def query_losses(weights: Tensor) -> Tensor:
    """Of every query, after the loop by hand with these weights, without hydragrad."""
    model = PROBLEM.build()
    loop(model, soft(model), iter, weights)
    inputs, labels = (torch.stack(parts) for parts in zip(*QUERIES, strict=True))
    with torch.no_grad():
        return PROBLEM.loss(model.eval(), (inputs, labels))


def test_registered_it_is_replayed_and_differentiated(tmp_path: Path) -> None:
    register(Soft, SoftUpdate())
    assert "Soft" in supported()
    model = record(tmp_path / "run")
    run = load(tmp_path / "run")
    assert hg.verify(run).exact
    replayed = run.replay()
    assert all(torch.equal(param, replayed.params[name]) for name, param in model.named_parameters())

    scores, h = scored(run), 1e-5
    direction = torch.randn(N_TRAIN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    up, down = (query_losses(1 + sign * h * direction) for sign in (1, -1))
    assert_close((down - up) / (2 * h), direction @ scores, FINITE_DIFFERENCE)
    forward = hg.hypergradients(run, range(N_TRAIN), progress=False).scores(QUERIES).values
    assert_close(forward, scores, ORACLE)


def test_what_is_not_known_is_refused_before_the_training_with_what_to_do(tmp_path: Path) -> None:
    for cls, words in (
        (Soft, ""),
        (type("Mine", (torch.optim.Adam,), {}), r".*register\(Mine, .*update_for\('Adam'\)"),
    ):
        model = PROBLEM.build()
        expected = (
            rf"{cls.__name__} is not known.*Expected: one of Adagrad, Adam, .*step\.register.*docs/optimizers\.md"
        )
        with pytest.raises(hg.UnsupportedError, match=expected + words):
            hg.record(tmp_path / "run", model, cls(model.parameters(), lr=0.1))
    assert not (tmp_path / "run").exists()


def test_what_another_process_registered_is_asked_for_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(Soft, SoftUpdate())
    record(tmp_path / "run")
    monkeypatch.setattr(known, "_OWN", {})
    words = r"recorded with the optimizer .*Soft.*Expected: one of Adagrad, Adam, .*step\.register.*docs/optimizers\.md"
    with pytest.raises(hg.UnsupportedError, match=words):
        load(tmp_path / "run")
    # another script imports the same class from elsewhere: the name is what counts, and the replay is compared
    register(type("Soft", (Soft,), {"__module__": "elsewhere"}), SoftUpdate())
    assert hg.verify(load(tmp_path / "run")).exact


def test_a_subclass_takes_the_update_of_its_base(tmp_path: Path) -> None:
    mine = type("Adam", (torch.optim.Adam,), {"__module__": "mine"})  # even of the same name
    register(mine, update_for("Adam"))
    for name, cls in (("mine", mine), ("torch", torch.optim.Adam)):
        record(tmp_path / name, lambda model, cls=cls: cls(model.parameters(), lr=0.01, weight_decay=0.1))
    assert known.class_of({"class": "Adam", "module": "torch.optim.adam"}) is torch.optim.Adam
    assert_close(scored(load(tmp_path / "mine")), scored(load(tmp_path / "torch")), SAME)


def test_one_of_torch_without_an_update_is_warned_of(tmp_path: Path) -> None:
    model = PROBLEM.build()
    with pytest.warns(
        UserWarning, match=r"a run of Adadelta is recorded and replayed, but .*Expected: one of Adagrad"
    ) as w:
        hg.record(tmp_path / "run", model, torch.optim.Adadelta(model.parameters()))
    assert w[0].filename == __file__


class Wrong(SoftUpdate):
    """Another beta."""

    def step(self, w: Tensor, slots: Any, g: Tensor, hyper: Any, scalars: Any) -> Any:
        return super().step(w, slots, g, {**hyper, "beta": 0.81}, scalars)


class WithoutDecay(SoftUpdate):
    """Without what one group alone has."""

    def step(self, w: Tensor, slots: Any, g: Tensor, hyper: Any, scalars: Any) -> Any:
        return super().step(w, slots, g, {**hyper, "decay": 0.0}, scalars)


class Countless(SoftUpdate):
    """Right at the first step."""

    def scalars(self, torch_state: Any) -> dict[str, float]:
        return {"taken": 0.0}


class Linear(SoftUpdate):
    """Not linear, as it says."""

    linear = True


class Misnamed(SoftUpdate):
    """A slot that is none of the optimizer's."""

    def slots(self, hyper: Any) -> tuple[str, ...]:
        return ("momentum",)

    def step(self, w: Tensor, slots: Any, g: Tensor, hyper: Any, scalars: Any) -> Any:
        new, held = super().step(w, {"mean": slots["momentum"]}, g, hyper, scalars)
        return new, {"momentum": held["mean"]}


class Unknown(SoftUpdate):
    """A hyperparameter that there is not."""

    def slots(self, hyper: Any) -> tuple[str, ...]:
        return ("mean",) if hyper["momentum"] else ()


class InPlace(SoftUpdate):
    """Changes what it is given."""

    def step(self, w: Tensor, slots: Any, g: Tensor, hyper: Any, scalars: Any) -> Any:
        return super().step(w.add_(0), slots, g, hyper, scalars)


@pytest.mark.parametrize(
    ("update", "kind", "words"),
    [
        (Wrong(), hg.MismatchError, r"Wrong is not the step that the optimizer takes: parameter '0\.weight' differs"),
        (WithoutDecay(), hg.MismatchError, r"WithoutDecay is not the step.*parameter '0\.weight' differs"),
        (Countless(), hg.MismatchError, r"Countless is not the step.*parameter '0\.weight' differs"),
        (Linear(), hg.MismatchError, r"Linear is not the step.*linear = True for one that is not linear"),
        (Misnamed(), hg.MismatchError, r"names a slot 'momentum', which the optimizer does not keep.*mean, taken"),
        (Unknown(), hg.UnsupportedError, r"Unknown cannot be taken.*'beta', 'decay', 'lr'.*KeyError: 'momentum'"),
        (InPlace(), hg.UnsupportedError, r"InPlace cannot be taken.*changes nothing in place.*RuntimeError"),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, Update) else None,
)
def test_a_formula_that_is_not_the_step_is_refused(update: Update, kind: Any, words: str, tmp_path: Path) -> None:
    register(Soft, update)
    record(tmp_path / "run")
    run = load(tmp_path / "run")
    assert hg.verify(run).exact  # the class itself is replayed
    with pytest.raises(kind, match=words):
        scored(run)
    with pytest.raises(kind, match=words):
        hg.hypergradients(run, [0], progress=False)


class Normed(Optimizer):
    """Steps of a fixed length for every parameter: no map of single elements."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for w in self.param_groups[0]["params"]:
            w.sub_(self.param_groups[0]["lr"] * w.grad / w.grad.norm())


class NormedUpdate(Update):
    """Right in value for a whole parameter, and not to be differentiated element by element."""

    def slots(self, hyper: Any) -> tuple[str, ...]:
        return ()

    def step(self, w: Tensor, slots: Any, g: Tensor, hyper: Any, scalars: Any) -> Any:
        return w - hyper["lr"] * g / g.norm(), {}


def test_an_optimizer_that_mixes_elements_is_refused(tmp_path: Path) -> None:
    register(Normed, NormedUpdate())
    record(tmp_path / "run", lambda model: Normed([model[0].weight]))
    with pytest.raises(hg.MismatchError, match=r"no map of single elements \(a norm"):
        scored(load(tmp_path / "run"))


class Counting(Soft):
    """A count that is no tensor."""

    taken = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        Counting.taken += 1
        for state in self.state.values():
            state["count"] = 1


def test_state_that_is_no_tensor_is_said_at_the_first_step(tmp_path: Path) -> None:
    register(Counting, SoftUpdate())
    with pytest.raises(hg.UnsupportedError, match=r"keeps 'count' .* as int.*torch\.tensor\(0\.0\)"):
        record(tmp_path / "run", lambda model: soft(model, Counting))
    assert Counting.taken == 1


class Hidden(Soft):
    """An argument that no param group holds."""

    def __init__(self, params: Any, lr: float, power: float) -> None:
        super().__init__(params, lr)
        self.power = power


def test_a_constructor_that_asks_for_more_than_was_recorded(tmp_path: Path) -> None:
    register(Hidden, SoftUpdate())
    record(tmp_path / "run", lambda model: Hidden(model.parameters(), 0.1, 2.0))
    with pytest.raises(hg.UnsupportedError, match=r"Hidden cannot be made again.*TypeError: .*'power'.*super"):
        load(tmp_path / "run")


@pytest.mark.parametrize(("optimizer", "update"), [("Soft", SoftUpdate()), (Soft, SoftUpdate), (SoftUpdate, Soft)])
def test_what_cannot_be_registered(optimizer: Any, update: Any) -> None:
    with pytest.raises(hg.UnsupportedError, match=r"cannot be registered.*register\(Lion, LionUpdate\(\)\)"):
        register(optimizer, update)
