"""Clipped runs: recorded through `recording.clip_grad_*`, replayed bit for bit, differentiated through the clip."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import hydragrad as hg
from hydragrad.step.clipping import Clip as Recorded
from hydragrad.step.clipping import Clipping
from tests.hypergradient.recorded import recipe_of, recorded, trainable, values
from tests.oracles import Clip, recursion
from tests.tolerances import ORACLE, assert_close
from tests.zoo import case

PROBLEM = case("mlp_tanh")
NAMES = trainable(PROBLEM.build())
INF = float("inf")
METHODS = ["exact", "gauss-newton", "hessian-free"]
OPTIMIZERS = {"SGD": {"lr": 0.1, "momentum": 0.9}, "Adam": {"lr": 0.02}}
CLIPS = {
    "1-norm": [Clip(0.5, 1.0)],
    "2-norm": [Clip(0.2)],
    "3-norm": [Clip(0.1, 3.0)],
    "max": [Clip(0.05, INF)],
    "value": [Clip(0.02, None)],
    "inactive": [Clip(100.0), Clip(100.0, None)],
    "groups": [Clip(0.1, 2.0, NAMES[:1]), Clip(0.05, INF, NAMES[1:3])],
    "in a row": [Clip(0.03, None, NAMES[:2]), Clip(0.1), Clip(0.02, None)],
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", CLIPS)
def test_both_sweeps_and_all_methods(name: str, optimizer: str, tmp_path: Path) -> None:
    recipe = recipe_of(PROBLEM, optimizer, OPTIMIZERS[optimizer], clip=CLIPS[name])
    run = recorded(recipe, tmp_path / "run")
    assert hg.verify(run).exact
    assert len(run.steps[0].clips) == len(CLIPS[name])
    for method in METHODS:
        expected = recursion(recipe, method)
        assert_close(values(run, PROBLEM.queries, method), expected.scores(PROBLEM.queries), ORACLE)
        found = hg.hypergradients(run, examples=[3, 6, 0], method=method, check=False)
        assert_close(found.vectors, expected.vectors[[3, 6, 0]], ORACLE)
    without = recursion(replace(recipe, clip=None), "exact").scores(PROBLEM.queries)
    apart = (without - values(run, PROBLEM.queries)).abs().max() / without.abs().max()
    assert (apart < 1e-9) == (name == "inactive")


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_blocks_and_accumulation(method: str, block: int, tmp_path: Path) -> None:
    epochs = [[[[0, 1, 2], [3, 4]], [[5, 6], [7, 5, 8]], [[9], [10, 11]]], [[[4, 4], [0, 4]]]]
    recipe = recipe_of(PROBLEM, "AdamW", {"lr": 0.02}, steps=[s for e in epochs for s in e], clip=CLIPS["in a row"])
    found = values(recorded(recipe, tmp_path / "run", epochs), PROBLEM.queries, method, block=block)
    assert_close(found, recursion(recipe, method).scores(PROBLEM.queries), ORACLE)


def test_the_map_equals_torch_and_its_derivatives_autograd() -> None:
    """Also where a parameter has no gradient, and at a zero gradient."""
    torch.manual_seed(3)
    shapes = {"a": (3, 2), "b": (4,), "none": (2,), "zero": (2, 2)}
    params = {name: nn.Parameter(torch.randn(shape, dtype=torch.float64)) for name, shape in shapes.items()}
    raw = {n: torch.randn(s, dtype=torch.float64) for n, s in shapes.items() if n != "none"}
    raw["zero"].zero_()
    for p in (1.0, 2.0, 2.5, INF):
        clips = [
            Recorded("value", ("a",), 0.9),
            Recorded("norm", tuple(shapes), 0.7, p),
            Recorded("norm", ("zero",), 0.7),
        ]
        for name, param in params.items():
            param.grad = raw[name].clone() if name in raw else None
        for clip in clips:
            clip.apply_(params)
        clipping = Clipping(clips, raw, tuple(shapes))
        for name in raw:
            torch.testing.assert_close(clipping.clipped[name], params[name].grad, rtol=1e-12, atol=0)

        def clipped(flat: torch.Tensor, p: float = p) -> torch.Tensor:
            a, rest = flat[:6].clamp(-0.9, 0.9), flat[6:]
            both = torch.cat([a, rest])
            norm = both.abs().max() if p == INF else both.abs().pow(p).sum().pow(1 / p)
            return both * (0.7 / (norm + 1e-6)).clamp(max=1.0)

        order = ("a", "b", "zero")
        flat = torch.cat([raw[n].flatten() for n in order])
        if p == 1.0:
            flat = flat[:10]  # |x| has no derivative at 0
        jac: Any = torch.autograd.functional.jacobian(clipped, flat)
        size = len(flat)
        for transposed in (False, True):
            block = torch.zeros(size, 14, dtype=torch.float64)
            block[:, :size] = torch.eye(size, dtype=torch.float64)
            parts = dict(zip(order, block.split([6, 4, 4], dim=1), strict=True))
            given = [
                parts[n].reshape(size, *shapes[n]).clone() if n in parts else torch.zeros(size, 2).double()
                for n in shapes
            ]
            (clipping.pull_ if transposed else clipping.push_)(given)
            found = torch.cat([given[i].flatten(1) for i in (0, 1, 3)], dim=1)[:, :size]
            assert_close(found, jac if transposed else jac.T, {torch.float64: 1e-12})


def clipped_loop(path: Path, clip: Any, model: nn.Module | None = None) -> None:
    model = PROBLEM.build() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hg.record(path, model, optimizer) as recording:
        for place, batch in enumerate(recording.batches(DataLoader(PROBLEM.samples, 4))):  # type: ignore[arg-type]
            optimizer.zero_grad()
            PROBLEM.loss(model, batch).mean().backward()
            clip(recording, model, place)
            optimizer.step()


def loaded(path: Path) -> hg.Run:
    return hg.load(path, model=PROBLEM.build(), loss=PROBLEM.loss, data=PROBLEM.samples)


def test_torchs_own_clipping_is_refused_with_the_remedy(tmp_path: Path) -> None:
    clipped_loop(tmp_path / "run", lambda recording, model, place: nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    with pytest.raises(hg.MismatchError, match=r"step 0 .*clipp.*recording.clip_grad_norm_"):
        loaded(tmp_path / "run")
    clipped_loop(
        tmp_path / "value", lambda recording, model, place: nn.utils.clip_grad_value_(model.parameters(), 0.01)
    )
    with pytest.raises(hg.MismatchError, match=r"step 0 .*clipp.*recording.clip_grad_"):
        loaded(tmp_path / "value")


def test_what_torch_returns_is_returned_and_every_step_has_its_own(tmp_path: Path) -> None:
    norms: list[float] = []

    def clip(recording: hg.Recording, model: nn.Module, place: int) -> None:
        before = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
        found = recording.clip_grad_norm_((p for p in model.parameters()), 0.1 * (place + 1), foreach=False)
        norms.append(float(found / before))
        if place == 1:
            recording.clip_grad_value_(next(model.parameters()), 0.01)

    clipped_loop(tmp_path / "run", clip)
    assert norms == pytest.approx([1.0] * 3)
    run = loaded(tmp_path / "run")
    assert [[c.kind for c in step.clips] for step in run.steps] == [["norm"], ["norm", "value"], ["norm"]]
    assert run.steps[1].clips[0] == Recorded("norm", tuple(NAMES), 0.2, 2.0, False)
    assert run.steps[1].clips[1].names == (NAMES[0],)
    assert hg.verify(run).exact


def test_a_skipped_steps_clip_goes_with_it(tmp_path: Path) -> None:
    model = PROBLEM.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hg.record(tmp_path / "run", model, optimizer) as recording:
        for place, batch in enumerate(recording.batches(DataLoader(PROBLEM.samples, 3))):  # type: ignore[arg-type]
            optimizer.zero_grad()
            PROBLEM.loss(model, batch).mean().backward()
            recording.clip_grad_norm_(model.parameters(), 0.1 + place)
            if place != 1:
                optimizer.step()
    run = loaded(tmp_path / "run")
    assert [[c.limit for c in step.clips] for step in run.steps] == [[0.1], [2.1], [3.1]]
    assert [len(step.skipped) for step in run.steps] == [0, 1, 0]
    assert hg.verify(run).exact


def test_clipping_amid_accumulation_is_refused(tmp_path: Path) -> None:
    model = PROBLEM.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hg.record(tmp_path / "run", model, optimizer) as recording:
        batches = iter(recording.batches(DataLoader(PROBLEM.samples, 3)))  # type: ignore[arg-type]
        PROBLEM.loss(model, next(batches)).mean().backward()
        recording.clip_grad_norm_(model.parameters(), 0.1)
        with pytest.raises(hg.UnsupportedError, match=r"gradients that were clipped already.*last micro-batch"):
            PROBLEM.loss(model, next(batches)).mean().backward()
        with pytest.raises(hg.MismatchError, match=r"not the model's parameters.*1 unknown tensors, 0 repeated"):
            recording.clip_grad_norm_([torch.zeros(2, requires_grad=True)], 0.1)


def test_a_clipped_gradient_beside_the_optimizer_is_refused_by_the_sweeps(tmp_path: Path) -> None:
    model = PROBLEM.build()
    optimizer = torch.optim.SGD(list(model.parameters())[:2], lr=0.1)
    with hg.record(tmp_path / "run", model, optimizer) as recording:
        for batch in recording.batches(DataLoader(PROBLEM.samples, 4)):  # type: ignore[arg-type]
            model.zero_grad()
            PROBLEM.loss(model, batch).mean().backward()
            recording.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    run = loaded(tmp_path / "run")
    assert hg.verify(run).exact
    with pytest.raises(
        hg.UnsupportedError, match=r"step 0 clipped the gradient of '2.weight'.*requires_grad_\(False\)"
    ):
        hg.attribute(run, PROBLEM.queries)
