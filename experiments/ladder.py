"""A right derivative that predicts nothing: finite differences over a ladder of steps, for a smooth and a chaotic run.

`python -m experiments.ladder` prints the second table of docs/maths.md: the relative error of the exact scores against
central differences of retraining along one random direction of example weights (-1 or 1 each), in float64.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import hydragrad as hg
from experiments.approximation import relu_network
from hydragrad.retraining.measuring import losses_at
from hydragrad.tasks.digits import digits

STEPS = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
QUERIES, SEED = 50, 0


def double(task: hg.Task) -> hg.Task:
    """The task in float64."""
    single = task.model

    def model() -> nn.Module:
        return single().double()

    def tensors(data: TensorDataset) -> TensorDataset:
        images, labels = data.tensors
        return TensorDataset(images.double(), labels)

    return replace(task, model=model, train=tensors(task.train), test=tensors(task.test))


def errors(task: hg.Task) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        run = hg.train(task, Path(folder) / "run")
        scores = hg.attribute(run, task.test, compile=False, check=False).values
        generator = torch.Generator().manual_seed(SEED)
        direction = torch.randint(0, 2, (run.num_examples,), generator=generator).double() * 2 - 1
        predicted = direction @ scores
        found = []
        for h in STEPS:
            down, up = (losses_at(run, run.replay(weights=1 + sign * h * direction), task.test) for sign in (-1, 1))
            measured = (down - up) / (2 * h)
            found.append(float((measured - predicted).norm() / measured.norm()))
        return found


def main() -> None:
    torch.set_num_threads(1)
    smooth = digits(optimizer="adamw", test_size=QUERIES)
    chaotic = replace(digits(optimizer="adamw", lr=0.003, test_size=QUERIES), model=relu_network)
    print("| AdamW run | " + " | ".join(f"{h:g}" for h in STEPS) + " |\n|---|" + "---|" * len(STEPS))
    for name, task in (("lr 0.001, tanh", smooth), ("lr 0.003, ReLU", chaotic)):
        print(f"| {name} | " + " | ".join(f"{error:.2g}" for error in errors(double(task))) + " |", flush=True)


if __name__ == "__main__":
    main()
