"""`python -m comparison`: train, retrain, run every method in its own process, measure; goes on where it stopped."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from comparison.environments import PEERS, python_of
from comparison.exchange import Folder, write_text
from comparison.measures import mislabels, predictions
from comparison.ours import METHODS
from comparison.tasks import TASKS, Spec
from comparison.truth import truth_of

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "bench-output" / "comparison"
_RUNS = ("clean", "flipped")
_PATIENCE = 20
"""Seconds by the clock that a worker may take for a second of its limit: the machine is others' too."""


@dataclass(frozen=True)
class Job:
    """A method and the command that runs it, without its arguments."""

    method: str
    command: tuple[str, ...]


def jobs(chosen: list[str] | None, peers: bool) -> Iterator[Job]:
    """Ours, then the libraries whose environment is there."""
    for method in METHODS:
        if chosen is None or method in chosen:
            yield Job(method, (sys.executable, "-m", "comparison.ours"))
    for peer in PEERS if peers else ():
        wanted = [method for method in peer.methods if chosen is None or method in chosen]
        python = python_of(peer.environment)
        if wanted and python is None:
            print(f"{peer.name} is left out: make its environment with `python -m comparison.environments`")
            continue
        for method in wanted:
            yield Job(method, (str(python), "-m", f"comparison.peers.{peer.name}"))


def run(job: Job, folder: Path, out: Path, limit: float, threads: int) -> dict[str, Any]:
    """One method on one folder; whatever happens to its process becomes a status."""
    command = [*job.command, str(folder), job.method, str(out), "--threads", str(threads), "--limit", str(limit)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(_paths(job))}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_PATIENCE * limit
        )
    except subprocess.TimeoutExpired:  # it waits for something; one that computes stops itself
        return {"status": "too slow", "reason": f"no answer within {_PATIENCE * limit:.0f} s by the clock"}
    result = out.with_suffix(".json")
    if done.returncode or not result.is_file():
        last = " ".join(done.stderr.replace("\x1b[A", "").strip().splitlines()[-1:])[:300]
        killed = f"killed by signal {-done.returncode}, perhaps for want of memory: " if done.returncode < 0 else ""
        return {"status": "failed", "reason": killed + last}
    return json.loads(result.read_text())


def _paths(job: Job) -> list[str]:
    """The adapters' package; hydragrad's sources for our own methods, however this process found them."""
    return [str(ROOT), *(path for path in sys.path if path and job.command[0] == sys.executable)]


def measured(result: dict[str, Any], out: Path, folder: Folder, spec: Spec, flipped: bool) -> dict[str, Any]:
    """The result with its measures."""
    if result["status"] != "ok":
        return result
    answer = load_file(out.with_suffix(".safetensors"))
    if not flipped:
        judged = "scores" in answer and spec.removed
        return result | predictions(answer["scores"], truth_of(folder, spec), spec) if judged else result
    wrong = torch.from_numpy(np.load(folder.path / "flipped.npy"))
    if "scores" in answer:  # who harms the queries most
        result["harm"] = mislabels(-answer["scores"].mean(1), wrong)
    if "signal" in answer:
        result["self"] = mislabels(answer["signal"], wrong)
    return result


def compare(spec: Spec, seed: int, flipped: bool, options: argparse.Namespace) -> None:
    folder = options.out / spec.name / f"seed-{seed}" / ("flipped" if flipped else "clean")
    if not (folder / "about.json").is_file() and not spec.record(folder, seed, flipped):
        if not flipped:
            print(f"{spec.name} is left out: its data is not here (set HYDRAGRAD_DATA to the data's folder)")
        return
    where = Folder(folder)
    if not flipped and spec.removed:
        truth_of(where, spec)
    for job in jobs(options.methods, options.peers):
        final = folder / "results" / f"{job.method}.json"
        if final.is_file() and not options.again:
            continue
        out = folder / "answers" / job.method
        out.with_suffix(".json").unlink(missing_ok=True)
        result = measured(run(job, folder, out, options.limit, options.threads), out, where, spec, flipped)
        write_text(final, json.dumps(result, indent=1))
        numbers = {k: v for k, v in result.items() if k not in ("note", "torch", "seconds", "training_seconds")}
        print(f"{spec.name} seed {seed} {folder.name:7} {job.method:26}", _short(numbers), flush=True)


def _short(values: dict[str, Any]) -> str:
    parts = []
    for name, value in values.items():
        if isinstance(value, dict):
            parts += [f"{name}.{k} {v:.3f}" for k, v in value.items()]
        elif name == "peak_bytes":
            parts.append(f"peak {value / 2**20:.0f} MiB")
        else:
            parts.append(f"{name} {value:.3f}" if isinstance(value, float) else str(value))
    return "  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=list(TASKS))
    known = [*METHODS, *(method for peer in PEERS for method in peer.methods)]
    parser.add_argument("--methods", nargs="+", choices=known, metavar="METHOD", help="all by default: %(choices)s")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", choices=_RUNS, default=list(_RUNS), help="right labels, a tenth flipped")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="hydragrad's own methods alone")
    parser.add_argument("--limit", type=float, default=1800.0, help="CPU seconds that one method may take on one run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="run methods that have a result once more")
    options = parser.parse_args()
    options.out = options.out.resolve()
    torch.set_num_threads(options.threads)
    for seed in options.seeds:  # all tasks once before any a second time
        for name in options.tasks:
            for kind in options.runs:
                compare(TASKS[name], seed, kind == "flipped", options)


if __name__ == "__main__":
    main()
