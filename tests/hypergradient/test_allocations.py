"""Counting allocations: by hand on plain operations, and what a plan predicts against what a sweep allocates."""

import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from hydragrad.hypergradient.allocations import Allocations


def test_live_and_peak_by_hand() -> None:
    with Allocations() as counted:
        x = torch.ones(1000)
        y = x + 1
        assert (counted.live, counted.peak) == (8000, 8000)
        del y
        assert (counted.live, counted.peak) == (4000, 8000)
        x.add_(1)
        z = x.view(10, 100)
        assert counted.live == 4000  # in place, and a view: nothing new
        del x
        assert counted.live == 4000
        del z
        assert (counted.live, counted.peak) == (0, 8000)


def test_what_was_there_before_is_not_counted() -> None:
    x = torch.ones(1000)
    with Allocations() as counted:
        y = x.mul_(2)
    assert counted.peak == 0
    assert y is x


def test_inside_transforms_and_backward_passes() -> None:
    model, inputs = nn.Linear(100, 50), torch.rand(8, 100)
    params = {name: p.detach() for name, p in model.named_parameters()}
    with Allocations() as counted:
        tangents = {name: torch.rand(16, *p.shape) for name, p in params.items()}
        before = counted.live
        assert before == 16 * 5050 * 4

        def slope(at: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return grad(lambda p: functional_call(model, p, (inputs,)).square().sum())(at)

        out = vmap(lambda t: jvp(slope, (params,), (t,))[1])(tangents)
        assert counted.live - before == 16 * 5050 * 4
        assert counted.peak - before > 2 * 16 * 50 * 8 * 4
        del out
        assert counted.live == before
        model(inputs).sum().backward()
        assert counted.live - before == 5050 * 4  # the gradients stay
