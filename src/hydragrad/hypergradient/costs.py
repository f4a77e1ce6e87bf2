"""Measured on the spot: what engines cost on this model, and whether they agree with plain autograd."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from hydragrad.hypergradient.agreement import close
from hydragrad.hypergradient.clock import quiet_seconds
from hydragrad.hypergradient.curvature import Engine, Products
from hydragrad.hypergradient.scaled import ScaledEngine
from hydragrad.step.objective import Objective, Point, Vectors


@final
@dataclass(frozen=True)
class Timed:
    """An engine at a block size: seconds a product of one block."""

    engine: Engine | ScaledEngine
    block: int
    seconds: float

    @property
    def per_query(self) -> float:
        return self.seconds / self.block


def quick_seconds(work: Callable[[], object], device: torch.device, least: float = 0.03) -> float:
    """The shortest of a few runs that take ``least`` seconds together; the first is only there to warm up."""
    best, spent, runs = float("inf"), 0.0, 0
    while runs < 4 or (spent < least and runs < 20):
        synchronize(device)
        began = quiet_seconds()
        work()
        synchronize(device)
        took = quiet_seconds() - began
        best, spent, runs = min(best, took) if runs else best, spent + took, runs + 1
        if spent > 3.0:  # long enough to be its own measurement; a single long run may be another program's doing
            return min(best, took)
    return best


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The shortest of a few runs, after one to warm up."""
    best = float("inf")
    for repeat in range(repeats + 1):
        synchronize(device)
        began = quiet_seconds()
        work()
        synchronize(device)
        took = quiet_seconds() - began
        best = min(best, took) if repeat else best
        if took > 5.0:  # long enough to be its own measurement
            return min(took, best)
    return best


def synchronize(device: torch.device) -> None:
    """Wait for the device, where work is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def probe_block(point: Point, count: int) -> Vectors:
    """``count`` random unit-scale vectors at a point, the same on every call; the first do not depend on ``count``."""
    return _random_block(point.params, count, seed=0)


def _random_block(like: Vectors, count: int, seed: int) -> Vectors:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    rows = [[torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in like] for _ in range(count)]
    return tuple(torch.stack(parts).to(p.device) for parts, p in zip(zip(*rows, strict=True), like, strict=True))


def products(engine: Engine | ScaledEngine, point: Point, gam: Vectors) -> Products:
    """The engine's result on a block, whichever kind of engine it is; random cotangents stand for the buffers'."""
    if isinstance(engine, ScaledEngine):
        return None, engine.terms(point, tuple(torch.ones_like(p) for p in point.params), gam), ()
    return engine.products(point, gam, probe_buffers(point, gam[0].shape[0]))


def probe_buffers(point: Point, count: int) -> Vectors:
    """As ``probe_block``, for the buffers that training changes."""
    return _random_block(point.carried, count, seed=1) if point.carried else ()


def agree(a: Products, b: Products) -> bool:
    """Whether two engines' results are the same to rounding."""
    sums = [x.flatten(2).sum(2) if x.dim() > 2 else x for x in (a[1], b[1])]  # per-token terms against summed ones
    both = zip((sums[0], *(a[0] or ()), *a[2]), (sums[1], *(b[0] or ()), *b[2]), strict=True)
    return all(close(x, y) for x, y in both)


@contextlib.contextmanager
def counted_activations() -> Iterator[list[int]]:
    """Bytes that autograd saves in the block: ``counted[0]``, every storage once."""
    counted, seen = [0], set()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            counted[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counted


def activation_bytes(objective: Objective, point: Point) -> int:
    """What one forward pass of the batch keeps for its backward pass, parameters not counted."""
    params = tuple(p.detach().requires_grad_() for p in point.params)
    with torch.enable_grad(), counted_activations() as counted:
        objective.losses(params, point.rest, point.batch, point.carried, point.draws)
    return max(counted[0] - sum(p.numel() * p.element_size() for p in params), point.coefficients.nbytes)
