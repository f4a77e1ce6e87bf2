"""Smoothed scores beside exact ones: which predict what removing one example, or many at once, does.

`python -m experiments.smoothing` trains, retrains without single examples and without random subsets, takes the scores
of reweighted runs one by one, and prints the tables of docs/smoothing.md: Spearman correlation of scores and measured
changes (mean over 40 queries, over seeds, with the mean of the seeds' 95 % intervals). What was computed is
kept in --out, so that a second call goes on from there. --only names the kinds of runs to be swept.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import TensorDataset

import hydragrad as hg
from comparison.exchange import Folder
from comparison.tasks import TASKS, Spec
from comparison.truth import FRACTIONS, open_run, truth_of
from hydragrad import baselines
from hydragrad.report.intervals import mean_interval
from hydragrad.smoothing import ABSENT, removals

SEEDS = {"digits-sgd": (0, 1, 2), "digits-adamw": (0, 1, 2), "breast-cancer": (0, 1), "fashion-lenet-500": (0,)}
REMOVED, SUBSETS = 40, 48
EPOCHS = 4
"""The ends of the last epochs, the run's own with them, whose scores are averaged."""
Tensors = dict[str, Tensor]


def _independent(runs: int, fraction: float, seed: int) -> Callable[[int, int], Tensor]:
    """The recorded run, and others that lack a random part each, drawn without regard to the parts before."""

    def independent(count: int, task_seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + task_seed)
        weights = torch.ones(runs, count, dtype=torch.float64)
        for row in weights[1:]:
            row[torch.randperm(count, generator=generator)[: round(fraction * count)]] = 0.0
        return weights

    return independent


def _even(count: int, seed: int) -> Tensor:
    """Sixteen runs that lack an eighth each, each example missing in one of the first eight: as ``smoothing=`` does."""
    return removals(count, 16, 0.125, seed)


def _folds(count: int, seed: int) -> Tensor:
    """Eight runs that lack an eighth each, every example in one of them."""
    weights = torch.ones(8, count, dtype=torch.float64)
    for row, part in zip(
        weights, torch.randperm(count, generator=torch.Generator().manual_seed(6000 + seed)).chunk(8), strict=True
    ):
        row[part] = 0.0
    return weights


def _halves(count: int, seed: int) -> Tensor:
    """Four halves and what each of them leaves."""
    half = removals(count, 4, 0.5, 4000 + seed)
    return torch.cat([half, 1 - half])


def _normal(count: int, seed: int) -> Tensor:
    """Weights 1 + 0.3 z, z normal: those for which Stein's identity holds."""
    generator = torch.Generator().manual_seed(5000 + seed)
    return 1 + 0.3 * torch.randn(8, count, generator=generator, dtype=torch.float64)


KINDS: dict[str, tuple[str, Callable[[int, int], Tensor]]] = {
    "even parts, f = 0.125": ("exact", _even),
    "eight folds": ("exact", _folds),
    "independent parts, f = 0.1": ("exact", _independent(16, 0.1, 1000)),
    "independent parts, f = 0.3": ("exact", _independent(8, 0.3, 2000)),
    "gauss-newton, independent parts, f = 0.1": ("gauss-newton", _independent(16, 0.1, 1000)),
    "independent parts, f = 0.05": ("exact", _independent(8, 0.05, 3000)),
    "four halves and their complements": ("exact", _halves),
    "normal weights, 0.3": ("exact", _normal),
}
ANY_NUMBER = ("eight folds", *(kind for kind in KINDS if "parts" in kind))
"""Of whose runs the first few serve too."""
FEW = ("even parts, f = 0.125", "independent parts, f = 0.1", "gauss-newton, independent parts, f = 0.1")
"""What a task of minutes is swept for; all kinds where it takes seconds."""
USUAL: dict[str, tuple[str, ...]] = {"digits-sgd": FEW, "digits-adamw": FEW, "fashion-lenet-500": FEW[:1]}


def _first(spec: Spec, examples: int) -> Spec:
    """The task with its first examples alone: one that a sweep takes a minute for."""

    def sets(queries: int) -> tuple[TensorDataset, TensorDataset] | None:
        found = spec.sets(queries)
        return found and (TensorDataset(*(x[:examples] for x in found[0].tensors)), found[1])

    return replace(spec, name=f"{spec.name}-{examples}", sets=sets)


SPECS = {**TASKS, "fashion-lenet-500": _first(TASKS["fashion-lenet"], 500)}


class Answers:
    """Tensors that were computed for one run, in a file that grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held: Tensors = load_file(path) if path.is_file() else {}

    def get(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        if name not in self.held:
            self.held[name] = compute().contiguous()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(self.held, self.path.with_suffix(".tmp"))
            self.path.with_suffix(".tmp").replace(self.path)
        return self.held[name]


def gather(spec: Spec, seed: int, answers: Answers, kinds: Sequence[str]) -> Tensors:
    """Truth, unsmoothed scores, and for each kind of runs their scores [R, N, M] and sizes [R, M]."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "folder"
        if not spec.record(path, seed, False):
            return {}
        folder = Folder(path)
        run = open_run(folder)
        for name in ("ids", "weights", "changes"):
            answers.get(f"truth/{name}", lambda name=name: truth_of(folder, spec)[name])

        def scores(method: str, weights: Tensor | None, step: int | None = None) -> Tensor:
            given: dict[str, Any] = {
                "check": False,
                "progress": False,
                "compile": False,
                "weights": weights,
                "step": step,
            }
            each = hg.attribute(run, folder.queries, method=method, by_epoch=True, **given).values.double()
            # every example is seen once an epoch: its terms are its epochs' scores; the last row holds the sizes
            return torch.cat([each.sum(0), each.square().sum((0, 1)).sqrt()[None]])

        influence = lambda: baselines.influence(run, folder.queries, iterations=20, curvature="gauss-newton")  # noqa: E731
        answers.get("influence-cg, gauss-newton", lambda: influence().values)
        for method in ("exact", "gauss-newton"):
            an_epoch = run.num_steps // spec.epochs
            for back in range(EPOCHS):
                step = run.num_steps - back * an_epoch
                answers.get(f"{method}, epochs/{back}", lambda m=method, t=step: scores(m, None, t))
        for kind in kinds:
            method, draw = KINDS[kind]
            for number, weights in enumerate(draw(run.num_examples, seed)):
                answers.get(f"{kind}/{number}", lambda m=method, w=weights: scores(m, w))
    return answers.held


def mean(runs: Tensor, *, sized: bool = True, absent: float = 1.0, missing: Tensor | None = None) -> Tensor:
    """What ``smoothing=`` makes of runs [R, N + 1, M], the last row their sizes; or their plain mean.

    ``absent``: what the scores of examples count that are ``missing`` [R, N] in a run.
    """
    weights = 1 / runs[:, -1:] if sized else torch.ones_like(runs[:, -1:])
    scores = runs[:, :-1]
    if missing is not None:
        scores = scores * torch.where(missing, absent, 1.0)[..., None]
    return (scores * weights).sum(0) / weights.sum(0)


def candidates(held: Tensors, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every way to scores, by name."""
    for name in ("exact", "gauss-newton"):
        last = [held[f"{name}, epochs/{back}"] for back in range(EPOCHS)]
        yield name, last[0][:-1]
        yield f"{name}, last {EPOCHS} epochs' ends", mean(torch.stack(last))
        yield f"{name}, last {EPOCHS} epochs' ends, plain mean", mean(torch.stack(last), sized=False)
    yield "influence-cg, gauss-newton", held["influence-cg, gauss-newton"].double()
    examples = held["truth/weights"].shape[1]
    for kind, (_, draw) in KINDS.items():
        weights = draw(examples, seed)
        found = [held[f"{kind}/{n}"] for n in range(len(weights)) if f"{kind}/{n}" in held]
        for runs in (4, 8, 16):
            if runs <= len(found) and (runs == len(weights) or kind in ANY_NUMBER):
                some, missing = torch.stack(found[:runs]), weights[:runs] == 0
                yield f"{kind}, R = {runs}, all count alike", mean(some)
                yield f"{kind}, R = {runs}", mean(some, absent=ABSENT, missing=missing)
                yield f"{kind}, R = {runs}, present ones alone", mean(some, absent=0.0, missing=missing)
                yield f"{kind}, R = {runs}, all alike, plain mean", mean(some, sized=False)
    for sized, words in ((True, ""), (False, ", plain mean")):
        if (scores := controlled(held, sized=sized)) is not None:
            yield f"R = {CONTROLLED}, gauss-newton as control variate{words}", scores


def absent_to_present(runs: Tensor, missing: Tensor) -> float:
    """The norm of the mean score of each example over runs that lack it, over that of runs that have it."""
    means = []
    for part in (missing, ~missing):
        weights = part[..., None] / runs[:, -1:]
        means.append((runs[:, :-1] * weights).sum(0) / weights.sum(0).clamp(min=1e-300))
    both = missing.any(0) & (~missing).any(0)
    return float(means[0][both].norm() / means[1][both].norm())


def ends_of(held: Tensors, seed: int) -> str:
    """How much larger the scores of absent examples are, in words."""
    if "eight folds/7" not in held:
        return ""
    runs = torch.stack([held[f"eight folds/{n}"] for n in range(8)])
    ratio = absent_to_present(runs, _folds(held["truth/weights"].shape[1], seed) == 0)
    return f"eight folds: the scores of absent examples are {ratio:.1f} times those of present ones"


CONTROLLED = 8
"""Runs with exact scores whose noise their gauss-newton scores take out."""


def controlled(held: Tensors, *, sized: bool = True) -> Tensor | None:
    """The mean of a few runs' exact scores E_r, with their gauss-newton scores G_r as a control variate.

        mean_few E - beta_j (mean_few G - mean_others G)        few: the first 8 runs; others: 8 further ones

    G of further runs costs less than E, and has the same mean. The noise is least at beta_j = cov(E, G) / var(G),
    over the runs and pooled over the examples, times what m others know of the mean beside k few: m / (m + k). Means
    are those of ``mean``, and runs weigh as much in beta. None without their scores.
    """
    exact, cheap = "independent parts, f = 0.1", "gauss-newton, independent parts, f = 0.1"
    names = [f"{exact}/{n}" for n in range(CONTROLLED)] + [f"{cheap}/{n}" for n in range(2 * CONTROLLED)]
    if any(name not in held for name in names):
        return None
    few, same, others = torch.stack([held[name].double() for name in names]).split(CONTROLLED)
    weights = 1 / few[:, -1:] if sized else torch.ones_like(few[:, -1:])
    e, g = (runs[:, :-1] - mean(runs, sized=sized) for runs in (few, same))
    beta = (weights * e * g).sum((0, 1)) / (weights * g * g).sum((0, 1)).clamp(min=1e-300)
    beta *= len(others) / (len(others) + len(same))
    return mean(few, sized=sized) - beta * (mean(same, sized=sized) - mean(others, sized=sized))


def measured(held: Tensors, scores: Tensor) -> dict[str, list[float]]:
    """Mean Spearman correlation with its interval: one example, then subsets of each size."""
    ids, changes = held["truth/ids"], held["truth/changes"]
    predicted = (1 - held["truth/weights"].double()) @ scores
    parts = {"LOO": (scores[ids], changes[: len(ids)])}
    for place, fraction in enumerate(FRACTIONS):
        part = slice(len(ids) + place * SUBSETS, len(ids) + (place + 1) * SUBSETS)
        parts[f"LDS {fraction:.0%}"] = (predicted[part], changes[part])
    intervals = {name: mean_interval(a, b) for name, (a, b) in parts.items()}
    return {name: [found.mean, found.low, found.high] for name, found in intervals.items()}


def table(rows: dict[str, list[dict[str, list[float]]]]) -> str:
    """Means over seeds; behind them the means of the intervals' ends."""
    columns = list(next(iter(rows.values()))[0])
    lines = ["| scores | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, seeds in rows.items():
        cells = []
        for column in columns:
            at, low, high = torch.tensor([row[column] for row in seeds]).mean(0).tolist()
            cells.append(f"{at:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench-output/smoothing"))
    parser.add_argument("--tasks", nargs="+", choices=sorted(SPECS), default=list(SEEDS))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--only", nargs="*", choices=sorted(KINDS), help="kinds of runs to sweep")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, list[dict[str, list[float]]]]] = {}
    for name in options.tasks:
        spec = replace(SPECS[name], removed=REMOVED, subsets=SUBSETS)
        rows: dict[str, list[dict[str, list[float]]]] = {}
        ends = ""
        for seed in options.seeds or SEEDS.get(name, (0,)):
            kinds = options.only or USUAL.get(name, tuple(KINDS))
            held = gather(spec, seed, Answers(options.out / f"{name}-{seed}.safetensors"), kinds)
            for way, scores in candidates(held, seed) if held else ():
                rows.setdefault(way, []).append(measured(held, scores))
            ends = ends_of(held, seed)
        if not rows:
            print(f"{name} is left out: its data is not here (set HYDRAGRAD_DATA to the data's folder)")
            continue
        results[name] = rows
        print(f"\n{name}, {len(rows['exact'])} seed(s)\n\n{table(rows)}\n{ends}", flush=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
