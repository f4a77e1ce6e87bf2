"""How often the 95 % interval of a validation covers the correlation of all examples and queries there could be.

`python -m experiments.intervals` draws samples of known rank correlation, and prints the table of docs/validation.md:
coverage / median width, for n retrainings and M queries. "normal": predicted a, actual a + noise e, all independent
normals; "shared": most of a and e is the same for all queries; "unequal": the queries' noises differ (log-normal, 0.7);
"mixed": a tenth of the actual changes has nothing to do with the predicted ones.
"""

import argparse
import math
from typing import Any

import numpy as np
import torch

from hydragrad.report.intervals import mean_interval
from hydragrad.report.measures import spearman

KINDS = ("normal", "shared", "unequal", "mixed")
NOISES = (0.01, 0.1, 0.3, 1.0)
SIZES = ((6, 1), (12, 1), (30, 1), (100, 1), (6, 5), (12, 30), (30, 3), (30, 30), (50, 40))


def draw(generator: np.random.Generator, n: int, M: int, noise: float, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted and actual changes [n, M]."""

    def normals() -> Any:
        one = generator.standard_normal((n, M))
        return 0.8 * generator.standard_normal((n, 1)) + 0.6 * one if kind == "shared" else one

    a = normals()
    of_columns = noise * np.exp(0.7 * generator.standard_normal(M)) if kind == "unequal" else noise
    b = a + of_columns * normals()
    if kind == "mixed":
        unrelated = math.sqrt(1 + noise**2) * generator.standard_normal((n, M))
        b = np.where(generator.random((n, M)) < 0.1, unrelated, b)
    return torch.from_numpy(a), torch.from_numpy(b)


def truth(noise: float, kind: str) -> float:
    """The rank correlation of infinitely many: of normals 6 / pi arcsin(rho / 2), else of very many."""
    if kind == "mixed":
        a, b = draw(np.random.default_rng(1), 100_000, 1, noise, kind)
        return spearman(a[:, 0], b[:, 0])
    spread = 0.7 if kind == "unequal" else 0.0
    noises = noise * np.exp(spread * np.random.default_rng(1).standard_normal(50_000))
    return float(np.mean(6 / math.pi * np.arcsin(1 / np.sqrt(1 + noises**2) / 2)))


def covered(n: int, M: int, noise: float, kind: str, samples: int) -> tuple[float, float]:
    """How often the interval holds the truth, and its median width."""
    real, widths, hits = truth(noise, kind), [], 0
    for number in range(samples):
        _, low, high = mean_interval(*draw(np.random.default_rng(number), n, M, noise, kind))
        hits += low <= real <= high
        widths.append(high - low)
    return hits / samples, float(np.median(widths))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| samples | noise | true | " + " | ".join(f"n {n}, M {M}" for n, M in SIZES) + " |")
    print("|---" * (len(SIZES) + 3) + "|")
    for kind in KINDS:
        for noise in NOISES:
            cells = []
            for n, M in SIZES:
                if M == 1 and kind in ("shared", "unequal"):
                    cells.append("")
                    continue
                coverage, width = covered(n, M, noise, kind, options.samples)
                cells.append(f"{coverage:.2f} / {width:.2f}")
            print(f"| {kind} | {noise:g} | {truth(noise, kind):.3f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
