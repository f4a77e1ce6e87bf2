"""Peak memory of attribution above training's, for few and many training examples: it must not grow with N x P.

Each number comes from a process of its own: `python -m benchmarks.memory N` trains, attributes 64 queries three times,
and prints the smallest rise of the peak of resident memory. One engine serves both, since the clock decides which of
two equally fast ones is chosen. Linux only: the peak is reset through /proc.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

import hydragrad as hg
from benchmarks.workloads import LeNet5, loss
from hydragrad.hypergradient import exact, searching

STEPS, BATCH, QUERIES, CALLS = 20, 64, 64, 3


def peak() -> int:
    """Bytes of resident memory at most since the last reset."""
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith("VmHWM")).split()[1])


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def risen(examples: int) -> dict[str, float]:
    searching.candidates = lambda method, objective: (exact.ReverseOverReverse(objective),)
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(examples, 1, 28, 28), torch.randint(0, 10, (examples,)))
    queries = TensorDataset(torch.rand(QUERIES, 1, 28, 28), torch.randint(0, 10, (QUERIES,)))
    ids = [torch.randint(0, examples, (BATCH,)).tolist() for _ in range(STEPS)]
    model = LeNet5()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with tempfile.TemporaryDirectory() as folder:
        with hg.record(Path(folder) / "run", model, optimizer, reduction="mean") as recording:
            for batch in recording.batches(([t[i] for t in data.tensors] for i in ids), indices=ids):
                optimizer.zero_grad()
                loss(model, batch).mean().backward()
                optimizer.step()
        run = hg.load(Path(folder) / "run", model=model, loss=loss, data=data)
        rises, result = [], 0
        for _ in range(CALLS):
            reset_peak()
            before = peak()
            scores = hg.attribute(run, queries, method="exact", block=16, check=False, progress=False)
            rises.append(peak() - before)
            result = scores.values.nbytes
            del scores
        return {"examples": examples, "risen": min(rises), "result": result}


def compare(few: int = 2_000, many: int = 60_000) -> dict[str, float]:
    """Rises for few and many examples, in processes of their own."""
    found = []
    for examples in (few, many):
        command = [sys.executable, "-m", "benchmarks.memory", str(examples)]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    a, b = found
    return {
        "few": few,
        "many": many,
        "few_bytes": a["risen"],
        "many_bytes": b["risen"],
        "result_bytes": b["result"],
        "excess": (b["risen"] - b["result"]) / (a["risen"] - a["result"]) - 1,
        "goal": 0.05,
    }


if __name__ == "__main__":
    print(json.dumps(risen(int(sys.argv[1]))))
