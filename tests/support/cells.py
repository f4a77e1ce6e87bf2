"""One cell of the table: a tiny run, recorded, replayed, attributed, and compared with the dense float64 oracle."""

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import hydragrad as hg
from tests.hypergradient.recorded import Passes, clip_gradients, optimizer_of, scalar_of, trainable
from tests.oracles import Recipe, unroll
from tests.support.features import Feature, steps_of
from tests.tolerances import ORACLE, relative_error
from tests.zoo import Case, case

SAMPLES, QUERIES = 6, 2
SKIPPED = [1, 4, 2]
PENALTY = Recipe.__dataclass_fields__["penalty"].default
Option = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Cell:
    """What came out: the replay bit for bit and the scores to rounding, near, refused (why); or not applicable."""

    kind: Literal["exact", "approximate", "refused", "none"]
    reason: str = ""


def outcome(model: str, optimizer: Option, feature: Feature, path: Path) -> Cell:
    """What comes out of that combination; AssertionError where scores are wrong and nothing says so."""
    torch.manual_seed(0)
    problem = case(model)
    if not feature.applies(problem.build()):
        return Cell("none")
    recipe = _recipe(problem, optimizer, feature)
    queries = [(_to(x, feature.dtype), y) for x, y in problem.queries[:QUERIES]]
    data = feature.data([(_to(x, feature.dtype), y) for x, y in recipe.samples])
    try:
        run = record(replace(recipe, model=problem.build().to(feature.dtype)), data, feature, path)
        scores = hg.attribute(run, queries, check=False, compile=False, progress=False, block=QUERIES)
    except hg.HydragradError as error:
        return Cell("refused", general(str(error)))
    assert scores.diagnostics.drift == 0.0, "the replay is not the run"
    assert run.trajectory.checkpoints[-1] == run.num_steps, "no recorded end to compare with"
    error = relative_error(scores.values, expected(recipe, data, feature, problem.queries[:QUERIES]))
    if feature.within is None:
        assert error <= ORACLE[scores.values.dtype], f"off by {error:.1e}, and nothing says so"
        return Cell("exact")
    assert error <= feature.within, f"off by {error:.1e}, said to be within {feature.within}"
    return Cell(
        "approximate", f"within {feature.within:.0%} here: it depends on the run, and the diagnostics say how far"
    )


def _recipe(problem: Case, optimizer: Option, feature: Feature) -> Recipe:
    model, (name, hyper) = problem.build(), optimizer
    groups = [(trainable(model), dict(hyper))]
    samples = problem.samples[:SAMPLES]
    return feature.change(Recipe(model, problem.loss, samples, steps_of(feature.epochs), name, groups))


def expected(recipe: Recipe, data: Any, feature: Feature, queries: list[Any]) -> Tensor:
    """The oracle's scores [N, M]; where every epoch saw its own version, the sum over the versions."""
    if feature.skipped:
        recipe = _counting_nothing(recipe, feature)
    if feature.seen is None:
        return unroll(recipe).scores(queries)
    steps, n = [], len(recipe.samples)
    for place, epoch in enumerate(feature.epochs):
        steps += [[[place * n + i for i in ids] for ids in step] for step in epoch]
    samples = feature.seen(data, len(feature.epochs))
    return unroll(replace(recipe, samples=samples, steps=steps)).scores(queries).unflatten(0, (-1, n)).sum(0)


def _counting_nothing(recipe: Recipe, feature: Feature) -> Recipe:
    """To the oracle a skipped batch is the first micro-batch of its step, and its losses count nothing."""
    inputs = _to(torch.stack([recipe.samples[i][0] for i in SKIPPED]), torch.float64)

    def coefficients(batch: Any, shape: torch.Size) -> Tensor:
        skipped = batch[0].shape == inputs.shape and torch.equal(batch[0], inputs)
        return torch.full(shape, 0.0 if skipped else 1 / shape.numel(), dtype=torch.float64)

    steps = [[SKIPPED, *step] if t in feature.skipped else step for t, step in enumerate(recipe.steps)]
    return replace(recipe, steps=steps, reduction=coefficients)


def record(recipe: Recipe, data: Any, feature: Feature, path: Path) -> hg.Run:
    """The loop: plain but for the feature; recorded, and loaded again."""
    model = copy.deepcopy(recipe.model)
    optimizer = optimizer_of(recipe, model)
    trained = feature.wrap(model)
    scaler = None if feature.scale is None else torch.amp.GradScaler("cpu", init_scale=feature.scale)
    batches = _batches(feature)
    samplers = [
        Passes([[[ids] for ids, *_ in epoch] for epoch in batches[k :: feature.loaders]])
        for k in range(feature.loaders)
    ]
    loaders = [DataLoader(data, batch_sampler=sampler) for sampler in samplers]  # type: ignore[arg-type]
    with warnings.catch_warnings():  # of an optimizer that cannot be differentiated: the cell shows it
        warnings.filterwarnings("ignore", message="a run of .* cannot be differentiated yet")
        recorded = hg.record(path, trained, optimizer, scaler=scaler, keep_batches=feature.keep_batches)
    with recorded as recording:
        for place, epoch in enumerate(batches):
            loader = loaders[place % feature.loaders]
            for batch, (_, t, first, last) in zip(recording.batches(loader), epoch, strict=True):
                recipe.modes(trained.train(), t)
                if feature.before is not None:
                    feature.before(model, t)
                cast = nullcontext() if feature.autocast is None else torch.autocast("cpu", feature.autocast)
                with cast:
                    scalar = scalar_of(recipe, batch, recipe.loss(trained, batch))
                if not first and not last:
                    continue  # looked at, and dropped
                if first and recipe.penalty is not PENALTY:
                    scalar = scalar + recipe.penalty(dict(model.named_parameters()))
                (scalar if scaler is None else scaler.scale(scalar)).backward()
                if last:
                    _step(recipe, recording, model, optimizer, scaler, t)
    penalty = None if recipe.penalty is PENALTY else lambda model: recipe.penalty(dict(model.named_parameters()))
    given: Any = {"loss": recipe.loss, "data": data, "reduction": recipe.reduction, "penalty": penalty}
    return hg.load(path, model=copy.deepcopy(recipe.model), **given)


def _step(recipe: Recipe, recording: Any, model: Any, optimizer: Any, scaler: Any, t: int) -> None:
    for group, (_, given) in zip(optimizer.param_groups, recipe.groups, strict=True):
        group.update(given if isinstance(given, Mapping) else given[t])
    if scaler is None:
        clip_gradients(recording, model, recipe.clip)
        optimizer.step()
    else:
        scaler.unscale_(optimizer)
        clip_gradients(recording, model, recipe.clip)
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()


def _batches(feature: Feature) -> list[list[tuple[list[int], int, bool, bool]]]:
    """Every epoch's batches: ids, step, whether the step begins and ends with it (neither: dropped)."""

    def epoch(steps: Any, start: int) -> Iterator[tuple[list[int], int, bool, bool]]:
        for t, step in enumerate(steps, start):
            if t in feature.skipped:
                yield SKIPPED, t, False, False
            for k, ids in enumerate(step):
                yield ids, t, k == 0, k == len(step) - 1

    starts = [sum(map(len, feature.epochs[:place])) for place in range(len(feature.epochs))]
    return [list(epoch(*given)) for given in zip(feature.epochs, starts, strict=True)]


def general(told: str) -> str:
    """The first words of a refusal, without the names and numbers of the run."""
    first = re.split(r"\. Expected:", told)[0]
    return re.sub(r"\b\d+\b", "n", re.sub(r"'[^']*'", "'...'", first))


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x
