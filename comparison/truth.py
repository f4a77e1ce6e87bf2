"""What really happens: the recorded run trained again without examples, one by one and by subsets."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import hydragrad as hg
from comparison.exchange import Folder
from comparison.tasks import Spec
from hydragrad.retraining.measuring import losses_at

FRACTIONS = (0.01, 0.1, 0.3)
_SAVED_EVERY = 5


def open_run(folder: Folder) -> hg.Run:
    """The recording in the folder, bound."""
    return hg.load(folder.path / "run", model=folder.model(), loss=folder.loss, data=folder.train)


def weights_of(spec: Spec, examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids left out one by one [n], and weights [n + fractions * subsets, N] of every retraining."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(examples, generator=generator)[: spec.removed]
    rows = [torch.ones(examples).index_fill(0, i.reshape(1), 0.0) for i in ids]
    for fraction in FRACTIONS:
        count = max(1, round(fraction * examples))
        for _ in range(spec.subsets):
            rows.append(torch.ones(examples).index_fill(0, torch.randperm(examples, generator=generator)[:count], 0.0))
    return ids, torch.stack(rows)


def truth_of(folder: Folder, spec: Spec) -> dict[str, Tensor]:
    """`ids`, `weights` [R, N], `changes` [R, M] of the queries' losses; computed once, goes on where it stopped."""
    path = folder.path / "truth.safetensors"
    ids, weights = weights_of(spec, len(folder.train), folder.about.seed)
    changes = torch.full((len(weights), len(folder.queries)), float("nan"), dtype=torch.float64)
    if path.is_file():
        changes = load_file(path)["changes"]
    waiting = changes[:, 0].isnan().nonzero().flatten().tolist()
    if waiting:
        run = open_run(folder)
        before = losses_at(run, run.trajectory.state(run.num_steps), folder.queries).double()
        for place, row in enumerate(
            tqdm(waiting, desc=f"retraining {spec.name}", unit="run", delay=2, disable=None), start=1
        ):
            changes[row] = losses_at(run, run.replay(weights=weights[row]), folder.queries).double() - before
            if place % _SAVED_EVERY == 0 or place == len(waiting):
                _save(path, changes)
    return {"ids": ids, "weights": weights, "changes": changes}


def _save(path: Path, changes: Tensor) -> None:
    temporary = path.with_suffix(".tmp")
    save_file({"changes": changes}, temporary)
    temporary.replace(path)
