"""Where influence functions are exact: strongly convex problems trained to their minimum. Signs and scales of all."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hydragrad as hg
from hydragrad import baselines
from hydragrad.report.measures import mean_spearman
from tests.baselines.dense import leave_one_out
from tests.tolerances import assert_close

N, D, DECAY = 30, 4, 0.1
CONVERGED = {torch.float64: 1e-7}
"""What is left of the distance to the minimum after the steps below."""


def squared(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1)


def logistic(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def fitted(path: Path, outputs: int, loss: Any, targets: Tensor, steps: int, lr: float) -> tuple[Any, Tensor]:
    """Full-batch gradient descent with weight decay on a linear model, and the points it was trained on."""
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(N, D, generator=generator, dtype=torch.float64)
    model = nn.Linear(D, outputs, bias=False).double()
    nn.init.zeros_(model.weight)
    data = TensorDataset(points, targets)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=DECAY)
    everything = list(range(N))
    with hg.record(path, model, optimizer, reduction="mean") as recording:
        for batch in recording.batches(([points, targets] for _ in range(steps)), indices=[everything] * steps):
            optimizer.zero_grad()
            loss(model, batch).mean().backward()
            optimizer.step()
    return hg.load(path, model=model, loss=loss, data=data), points


@pytest.fixture(scope="module")
def ridge(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tensor, Tensor, list]:
    generator = torch.Generator().manual_seed(4)
    targets = torch.randn(N, 1, generator=generator, dtype=torch.float64)
    run, points = fitted(tmp_path_factory.mktemp("ridge") / "run", 1, squared, targets, 150, 0.15)
    queries = torch.randn(6, D, generator=generator, dtype=torch.float64)
    measured = torch.randn(6, 1, generator=generator, dtype=torch.float64)
    return run, points, targets, list(zip(queries, measured, strict=True))


def closed_form(points: Tensor, targets: Tensor, queries: list) -> Tensor:
    """-dm_j/deps_i at the minimum of (1/N) sum (1 + eps_i)(x_i w - y_i)^2 + DECAY/2 ||w||^2, in NumPy."""
    x, y = points.numpy(), targets.numpy()[:, 0]
    matrix = 2 * x.T @ x / N + DECAY * np.eye(D)
    w = np.linalg.solve(matrix, 2 * x.T @ y / N)
    scores = np.empty((N, len(queries)))
    for j, (query, target) in enumerate(queries):
        slope = 2 * (query.numpy() @ w - target.item()) * query.numpy()
        for i in range(N):
            moved = np.linalg.solve(matrix, -2 * (x[i] @ w - y[i]) * x[i] / N)  # dw/deps_i
            scores[i, j] = -slope @ moved
    return torch.tensor(scores)


@pytest.mark.parametrize("settings", [{"solver": "dense"}, {"tolerance": 1e-12}, {"curvature": "gauss-newton"}])
def test_influence_is_exact_on_ridge_regression(ridge, settings):
    run, points, targets, queries = ridge
    right = closed_form(points, targets, queries)
    assert_close(baselines.influence(run, queries, damping=DECAY, **settings).values, right, {torch.float64: 1e-6})
    # and so is the hypergradient of the run that went there: the same sign, the same scale
    assert_close(hg.attribute(run, queries, check=False).values, right, CONVERGED)


def test_representer_points_rebuild_the_prediction(ridge):
    run, points, targets, queries = ridge

    def output(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])[:, 0]

    # at the minimum f(x) = sum_i alpha_i phi_i . phi(x), so the scores of a measurement f sum to -f
    found = baselines.representer(run, queries, strength=DECAY / 2, measurement=output).values
    x, y = points.numpy(), targets.numpy()
    w = np.linalg.solve(2 * x.T @ x / N + DECAY * np.eye(D), 2 * x.T @ y / N)
    predicted = torch.tensor(np.stack([query.numpy() @ w[:, 0] for query, _ in queries]))
    assert_close(found.sum(0), -predicted, CONVERGED)


@pytest.fixture(scope="module")
def convex(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list, Tensor, Tensor]:
    """Logistic regression, its queries, some removed examples and what their removal really did."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(3, (N,), generator=generator)
    run, _ = fitted(tmp_path_factory.mktemp("logistic") / "run", 3, logistic, labels, 200, 0.5)
    points = torch.randn(5, D, generator=generator, dtype=torch.float64)
    queries = list(zip(points, torch.randint(3, (5,), generator=generator), strict=True))
    ids = torch.arange(0, N, 2)
    return run, queries, ids, leave_one_out(run, ids, queries)


# The bound of each: what its own approximation leaves. Influence functions are asked the brief question they answer.
BOUNDS = [
    (baselines.influence, {"damping": DECAY}, 0.95),
    (baselines.influence, {"damping": DECAY, "solver": "lissa", "scale": 3.0, "batch": 10, "iterations": 200}, 0.95),
    (baselines.relatif, {"damping": DECAY, "kind": "l"}, 0.7),
    (baselines.relatif, {"damping": DECAY, "kind": "theta"}, 0.7),
    (baselines.gradient_dot, {}, 0.8),
    (baselines.gradient_cosine, {}, 0.7),
    (baselines.tracin, {}, 0.8),
    (baselines.representer, {}, 0.8),
]


@pytest.mark.parametrize(("method", "settings", "bound"), BOUNDS, ids=lambda x: getattr(x, "__name__", ""))
def test_signs_agree_with_really_leaving_one_out(convex, method, settings, bound):
    run, queries, ids, measured = convex
    scores = method(run, queries, **settings).values[ids]
    assert mean_spearman(scores, measured) > bound


def test_influence_has_the_size_of_the_effect(convex):
    run, queries, ids, measured = convex
    scores = baselines.influence(run, queries, damping=DECAY).values[ids]
    slope = float((scores * measured).sum() / scores.square().sum())
    assert 0.9 < slope < 1.3  # second-order effects of a thirtieth of the data
