"""How well each method predicts leave-one-out retraining on digits, and what its own verdict says.

`python -m experiments.approximation` prints the table of docs/maths.md: for every optimizer setting and method, the
Spearman correlation over really removed examples (mean over test images), and the verdict with the error at the top
of its ladder. Everything is seeded; one thread, so that the numbers do not depend on the cores.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hydragrad as hg
from hydragrad.tasks.digits import digits

METHODS = ("exact", "gauss-newton", "hessian-free")
SEED = 0


def relu_network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def settings(queries: int) -> dict[str, hg.Task]:
    adamw_relu = digits(optimizer="adamw", lr=0.003, test_size=queries)
    return {
        "SGD, lr 0.02": digits(lr=0.02, momentum=0.0, test_size=queries),
        "SGD, lr 0.1": digits(lr=0.1, momentum=0.0, test_size=queries),
        "SGD, lr 0.02, momentum 0.9": digits(lr=0.02, momentum=0.9, test_size=queries),
        "SGD, lr 0.1, momentum 0.9": digits(lr=0.1, momentum=0.9, test_size=queries),
        "AdamW, lr 0.001": digits(optimizer="adamw", test_size=queries),
        "AdamW, lr 0.003, ReLU in place of tanh": replace(adamw_relu, model=relu_network),
    }


def rows(removed: int, queries: int) -> list[dict[str, Any]]:
    found = []
    for name, task in settings(queries).items():
        with tempfile.TemporaryDirectory() as folder:
            run = hg.train(task, Path(folder) / "run")
            for method in METHODS:
                scores = hg.attribute(run, task.test, method=method, compile=False)
                proof = hg.validate(run, scores, task.test, n=removed, seed=SEED, resume=Path(folder) / "kept")
                about = scores.diagnostics
                found.append(
                    {
                        "setting": name,
                        "method": method,
                        "leave_one_out": proof.correlation.mean,
                        "verdict": about.verdict,
                        "ladder": [(rung.step, rung.error, rung.correlation) for rung in about.ladder],
                        "growth": about.growth,
                    }
                )
                print(
                    f"{name:40} {method:13} leave-one-out {found[-1]['leave_one_out']:5.2f}  {about.verdict:12} "
                    + " ".join(f"h={r.step:g}: {r.error:.2f} (r {r.correlation:.2f})" for r in about.ladder)
                    + f"  growth {about.growth:.1f}",
                    flush=True,
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--removed", type=int, default=30)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("bench-output/approximation.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = rows(options.removed, options.queries)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1))
    print("\n| optimizer | `exact` | `gauss-newton` | `hessian-free` |\n|---|---|---|---|")
    for name in dict.fromkeys(row["setting"] for row in found):
        cells = [f"{row['leave_one_out']:.2f}, {row['verdict']}" for row in found if row["setting"] == name]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
