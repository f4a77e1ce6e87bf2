"""Normalization in plain operations against torch's kernels: outputs, new statistics, nothing written."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydragrad.step.buffers import Attached, PureStatistics, running_statistics
from tests.tolerances import UPDATE, assert_close

LAYERS = {
    "1d": (lambda **o: nn.BatchNorm1d(3, **o), (5, 3)),
    "1d of sequences": (lambda **o: nn.BatchNorm1d(3, **o), (5, 3, 4)),
    "2d": (lambda **o: nn.BatchNorm2d(3, **o), (5, 3, 4, 2)),
    "3d": (lambda **o: nn.BatchNorm3d(3, **o), (2, 3, 4, 2, 2)),
    "instance 1d": (lambda **o: nn.InstanceNorm1d(3, **{"track_running_stats": True, **o}), (5, 3, 4)),
    "instance 2d": (lambda **o: nn.InstanceNorm2d(3, **{"track_running_stats": True, **o}), (5, 3, 4, 2)),
    "instance 3d": (lambda **o: nn.InstanceNorm3d(3, **{"track_running_stats": True, **o}), (2, 3, 4, 2, 2)),
}
OPTIONS = [{}, {"momentum": 0.3, "eps": 0.1}, {"momentum": None}, {"affine": False}, {"affine": True}]


def layer_of(name: str, options: dict, dtype: torch.dtype) -> tuple[Any, Tensor]:
    make, shape = LAYERS[name]
    layer = make(**options).to(dtype)
    with torch.no_grad():
        for p in (*layer.parameters(), layer.running_mean, layer.running_var):
            p.copy_(torch.rand_like(p) + 0.5)
    return layer, torch.randn(shape, dtype=dtype) * 2 + 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_equal_to_torch(name, options, training, dtype):
    if options.get("momentum", 0) is None and name.startswith("instance"):
        pytest.skip("torch's instance normalization takes no cumulative average")
    layer, x = layer_of(name, options, dtype)
    torchs = copy.deepcopy(layer).train(training)
    layer.train(training)
    before = (layer.running_mean.clone(), layer.running_var.clone())
    batches = (x, 1.5 * x - 1)  # the second one starts from the statistics that the first one left
    expected = [torchs(x) for x in batches]
    with PureStatistics() as statistics:
        found = [layer(x) for x in batches]
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, {k: 20 * v for k, v in UPDATE.items()})  # a sum over the batch, and a difference from it
    for held, was, moved in zip(
        (layer.running_mean, layer.running_var), before, (torchs.running_mean, torchs.running_var), strict=True
    ):
        assert torch.equal(held, was)
        assert_close(statistics.after(held), moved, UPDATE)
        assert torch.equal(held, moved) != training


def test_called_as_a_function():
    x, mean, var = torch.randn(6, 3), torch.randn(3), torch.rand(3)
    for call in (
        lambda mean, var: F.batch_norm(x, mean, var, training=True, momentum=0.2),
        lambda mean, var: torch.batch_norm(x, None, None, mean, var, True, 0.2, 1e-5, False),
        lambda mean, var: F.instance_norm(x[:, :, None].expand(6, 3, 4) * torch.arange(4), mean, var, momentum=0.2),
        lambda mean, var: torch.instance_norm(
            x[:, :, None].expand(6, 3, 4) * torch.arange(4), None, None, mean, var, True, 0.2, 1e-5, False
        ),
    ):
        moved = [mean.clone(), var.clone()]
        expected = call(*moved)
        with PureStatistics() as statistics:
            assert_close(call(mean, var), expected, {torch.float32: 1e-5})
        for held, new in zip((mean, var), moved, strict=True):
            assert_close(statistics.after(held), new, UPDATE)
            assert not torch.equal(held, new)


def test_half_precision_inputs_keep_statistics_in_single():
    layer = nn.BatchNorm1d(3)
    torchs, x = copy.deepcopy(layer), torch.randn(6, 3).bfloat16()
    with PureStatistics() as statistics:
        out = layer(x)
    expected = torchs(x)
    assert out.dtype == expected.dtype == torch.bfloat16
    held, moved = layer.running_mean, torchs.running_mean
    assert held is not None
    assert moved is not None
    assert_close(statistics.after(held), moved, UPDATE)


def test_without_statistics_torch_does_it():
    layer, x = nn.BatchNorm1d(3, track_running_stats=False), torch.randn(6, 3)
    with PureStatistics():
        out = layer(x)
    assert torch.equal(out, F.batch_norm(x, None, None, layer.weight, layer.bias, True))


def test_nothing_is_detached():
    x = torch.ones(2, requires_grad=True)
    with Attached():
        with torch.no_grad():
            inside = x * 2
        y = inside.detach() + torch.detach(x) + x.data
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [4, 4]
    with torch.no_grad():
        assert not (x * 2).requires_grad
    assert torch.is_grad_enabled()


def test_names_of_running_statistics():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)))
    assert running_statistics(model) == {"1.0.running_mean", "1.0.running_var"}
