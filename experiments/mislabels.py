"""Which signals find wrong labels: tasks x kinds of noise x seeds, a tenth of the training labels changed.

`python -m experiments.mislabels` prints the tables of docs/mislabels.md: area under the ROC curve, and recall when as
many examples are looked at as there are wrong labels. Noise: "uniform": any other class; "pair": the next class, always
the same one; "feature": where a cross-validated logistic regression is least sure of the true class, the class it would
rather have. "folds": cleanlab's self-confidence, 1 - p of the own label under models trained on the other four fifths,
in batches of their own. One thread. Fashion-MNIST is read from the folder in HYDRAGRAD_DATA; without it, its rows are
left out.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hydragrad as hg
from benchmarks.workloads import fashion
from hydragrad.files import write_atomically
from hydragrad.report.measures import average_ranks, precision_recall
from hydragrad.tasks.digits import cross_entropy, digits, flip_labels

NOISES = ("uniform", "pair", "feature")
CHEAP = ("loss", "el2n", "margin", "doubt", "late", "combined")
TRAINED = ("ensemble", "folds")
"""Signals that cost four and five trainings."""
COSTLY = ("self", "harm", "class", "cluster")
RATE, CLEAN = 0.1, 100


def breast_cancer(seed: int) -> hg.Task:
    data: Any = load_breast_cancer()
    x = torch.tensor(StandardScaler().fit_transform(data.data), dtype=torch.float32)
    y = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:455], order[455:]
    return hg.Task(
        "breast_cancer, logistic regression",
        model=lambda: nn.Linear(30, 2),
        loss=cross_entropy,
        train=TensorDataset(x[train], y[train]),
        test=TensorDataset(x[test], y[test]),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        batch_size=32,
        epochs=20,
        seed=seed,
    )


def fashion_mnist(seed: int) -> hg.Task | None:
    found = fashion(examples=2000)
    if found is None:
        return None
    return hg.Task(
        "Fashion-MNIST (2000), LeNet-5",
        model=found.build,
        loss=cross_entropy,
        train=found.train,
        test=found.test,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
        batch_size=64,
        epochs=10,
        seed=seed,
    )


TASKS: dict[str, Callable[[int], hg.Task | None]] = {
    "digits, MLP, SGD": lambda seed: digits(seed=seed),
    "digits, MLP, AdamW": lambda seed: digits(optimizer="adamw", seed=seed),
    "breast_cancer, logistic regression": breast_cancer,
    "Fashion-MNIST (2000), LeNet-5": fashion_mnist,
}


def spoilt(task: hg.Task, noise: str, seed: int) -> hg.Task:
    """The task with a tenth of its training labels changed."""
    x, true = task.train.tensors
    classes = int(true.max()) + 1
    given, count = true.clone(), round(RATE * len(true))
    if noise == "uniform":
        given, ids = flip_labels(true, RATE, classes, seed)
    elif noise == "pair":
        ids = torch.randperm(len(true), generator=torch.Generator().manual_seed(seed))[:count].sort().values
        given[ids] = (true[ids] + 1) % classes
    else:
        p = torch.tensor(reference(x.flatten(1), true))
        own = p.gather(1, true[:, None])[:, 0]
        ids = own.argsort()[:count].sort().values
        given[ids] = p.scatter(1, true[:, None], -1.0).argmax(1)[ids]
    return replace(task, train=TensorDataset(x, given), true_labels=true, flipped_ids=ids)


_KNOWN: dict[int, Any] = {}


def reference(x: Tensor, y: Tensor) -> Any:
    """Cross-validated probabilities of a logistic regression, once for each data set."""
    key = hash((float(x.double().sum()), int(y.sum())))
    if key not in _KNOWN:
        model = LogisticRegression(max_iter=1000, C=0.1)
        _KNOWN[key] = cross_val_predict(model, x.numpy(), y.numpy(), cv=5, method="predict_proba")
    return _KNOWN[key]


def auroc(signal: Tensor, wrong: Tensor) -> float:
    """The probability that a wrong label's signal is above a right one's."""
    bad, good = int(wrong.sum()), int((~wrong).sum())
    return float((average_ranks(signal)[wrong].sum() - bad * (bad + 1) / 2) / (bad * good))


def folds(task: hg.Task) -> Tensor:
    """1 - p of the own label under a model trained on the other four fifths of the examples, [N].

    The folds have a seed of their own: those of the flips would put all wrong labels into one fold.
    """
    x, y = task.train.tensors
    doubt = torch.empty(len(y))
    for out in torch.randperm(len(y), generator=torch.Generator().manual_seed(7000 + task.seed)).tensor_split(5):
        kept = torch.ones(len(y), dtype=torch.bool)
        kept[out] = False
        torch.manual_seed(task.seed)
        model = task.model()
        optimizer = task.optimizer(model)
        for _ in range(task.epochs):
            for part in kept.nonzero()[:, 0][torch.randperm(int(kept.sum()))].split(task.batch_size):
                optimizer.zero_grad()
                task.loss(model, [x[part], y[part]]).mean().backward()
                optimizer.step()
        with torch.no_grad():
            doubt[out] = 1 - model.eval()(x[out]).softmax(1).gather(1, y[out, None])[:, 0]
    return doubt


def measured(task: hg.Task, costly: bool) -> dict[str, tuple[float, float]]:
    """Signal -> (AUROC, recall); "suggestion" -> (right among the wrong labels, flagged among the right ones)."""
    assert task.flipped_ids is not None
    wrong = torch.zeros(len(task.train), dtype=torch.bool)
    wrong[task.flipped_ids] = True
    with tempfile.TemporaryDirectory() as folder:
        per_epoch = -(-len(task.train) // task.batch_size)
        run = hg.train(task, Path(folder) / "run", checkpoint_every=per_epoch)
        found = hg.mislabels(run, signal="ensemble", progress=False)
        signals = {name: found.signals[name] for name in (*CHEAP, "ensemble")} | {"folds": folds(task)}
        if costly:
            clean = torch.utils.data.Subset(task.test, range(min(CLEAN, len(task.test))))
            scores = hg.attribute(run, clean, compile=False, check=False, progress=False)
            given = {"self": None, "harm": scores, "class": clean, "cluster": scores}
            for name in COSTLY:
                signals[name] = hg.mislabels(run, signal=name, clean=given[name], progress=False).score
    assert found.suggested is not None
    table = {
        name: (auroc(x, wrong), precision_recall(x, task.flipped_ids, len(task.flipped_ids)).recall)
        for name, x in signals.items()
    }
    right = (found.suggested == task.true_labels)[wrong].double().mean()
    return table | {"suggestion": (float(right), float(found.flagged[~wrong].double().mean()))}


@cache
def task_of(name: str, seed: int) -> hg.Task | None:
    return TASKS[name](seed)


Row = dict[str, tuple[float, float]]


def kept(path: Path, key: str, compute: Callable[[], Row]) -> Row:
    """What was measured before, from the file, or now."""
    held = json.loads(path.read_text()) if path.is_file() else {}
    if key not in held:
        held[key] = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(held, indent=1).encode())
    return held[key]


def means(rows: list[Row]) -> Row:
    """Over the seeds; what only some seeds have, over those."""
    names = {name for row in rows for name in row}
    of = {name: [row[name] for row in rows if name in row] for name in names}
    return {
        name: (statistics.mean(x[0] for x in pairs), statistics.mean(x[1] for x in pairs)) for name, pairs in of.items()
    }


def against_folds(cells: list[Row]) -> str:
    """Each signal beside the folds over tasks and kinds of noise: means, the worst difference, how often as good."""
    lines = ["| signal | mean | mean difference | worst | as good in |", "|---" * 5 + "|"]
    for name in (*CHEAP, *TRAINED):
        pairs = [torch.tensor([row[name], row["folds"]], dtype=torch.float64) for row in cells]
        each = torch.stack([pair[0] - pair[1] for pair in pairs])
        mean = torch.stack([pair[0] for pair in pairs]).mean(0).tolist()
        better = (each >= 0).sum(0).tolist()
        numbers = [each.mean(0).tolist(), each.min(0).values.tolist()]
        columns = [f"{mean[0]:.4f} / {mean[1]:.3f}", *(f"{a:+.4f} / {r:+.3f}" for a, r in numbers)]
        lines.append(f"| {name} | " + " | ".join(columns) + f" | {better[0]} / {better[1]} of {len(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=3, help="the first seed; signals were chosen on 0, 1 and 2")
    parser.add_argument("--costly-seeds", type=int, default=0, help="seeds for signals that need scores or gradients")
    parser.add_argument("--only", default="", help="tasks whose names contain this")
    parser.add_argument("--out", type=Path, default=Path("bench-output/mislabels.json"), help="keeps what was measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [*CHEAP, *TRAINED, *(COSTLY if options.costly_seeds else ()), "suggestion"]
    print("| task | noise | " + " | ".join(names) + " |\n|---|---|" + "---|" * len(names))
    cells = []
    for name in (name for name in TASKS if options.only in name):
        for noise in NOISES:
            rows = []
            for place in range(options.seeds):
                seed = options.first + place
                task = task_of(name, seed)
                if task is None:
                    break
                costly = place < options.costly_seeds and not name.startswith("Fashion")
                key = f"{name}, {noise}, seed {seed}" + (", costly" if costly else "")
                rows.append(
                    kept(options.out, key, lambda t=task, n=noise, s=seed, c=costly: measured(spoilt(t, n, s), c))
                )
            if rows:
                cells.append(means(rows))
                told = ["{:.4f} / {:.3f}".format(*cells[-1][s]) if s in cells[-1] else "" for s in names]
                print(f"| {name} | {noise} | " + " | ".join(told) + " |", flush=True)
    print("\n" + against_folds(cells))


if __name__ == "__main__":
    main()
