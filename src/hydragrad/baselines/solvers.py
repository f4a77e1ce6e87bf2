"""Linear systems A x = b for many right-hand sides at once, A known by its products: rows X = B A^{-1}."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hydragrad.errors import NonFiniteError, UnsupportedError, message

Product = Callable[[Tensor], Tensor]
"""Rows [k, P] times a symmetric matrix."""

DENSE_BYTES = 2**30
"""The largest explicit matrix that ``dense_inverse`` makes."""


class Solved(NamedTuple):
    """``x`` [k, P]; ``residual``: largest ||b - A x|| / ||b|| of a row; ``stopped``: rows where A was not positive."""

    x: Tensor
    residual: float
    stopped: int


def conjugate_gradients(product: Product, b: Tensor, iterations: int, tolerance: float) -> Solved:
    """Conjugate gradients from zero, each row by itself; ends at ``tolerance`` or after ``iterations`` products.

    A row whose direction has no positive curvature stays where it is: beyond, A is not positive definite and the
    method has no meaning.
    """
    x, r = torch.zeros_like(b), b.clone()
    d, rr = r.clone(), r.square().sum(1)
    goal = tolerance**2 * rr
    alive, stopped = rr > 0, torch.zeros(len(b), dtype=torch.bool, device=b.device)
    for _ in range(iterations):
        alive = alive & (rr > goal)
        if not bool(alive.any()):
            break
        at = alive.nonzero().flatten()
        ad = product(d[at])
        curved = (d[at] * ad).sum(1)
        bad = curved <= 0
        stopped[at[bad]], alive[at[bad]] = True, False
        at, ad, curved = at[~bad], ad[~bad], curved[~bad]
        alpha = (rr[at] / curved).unsqueeze(1)
        x[at] += alpha * d[at]
        r[at] -= alpha * ad
        new = r[at].square().sum(1)
        d[at] = r[at] + (new / rr[at]).unsqueeze(1) * d[at]
        rr[at] = new
    return Solved(x, _largest(rr, b), int(stopped.sum()))


def lissa(draw: Callable[[], Product], b: Tensor, iterations: int, scale: float, repeats: int) -> Solved:
    """LiSSA: x <- b + x - A_s x / scale with a fresh sample A_s each time; the mean of ``repeats`` such x / scale.

    Converges in the mean if every A_s lies between 0 and 2 scale. Source: Agarwal, Bullins, Hazan, arXiv 1602.03943.
    ``residual``: how far the last iteration of a repeat moved x.
    """
    total, moved = torch.zeros_like(b), 0.0
    for _ in range(repeats):
        x = before = b
        for _ in range(iterations):
            before, x = x, b + x - draw()(x) / scale
        if not bool(x.isfinite().all()) or float(x.norm()) > 1e6 * scale * float(b.norm()):
            raise NonFiniteError(
                message(
                    "LiSSA diverged",
                    expected=f"curvature below 2 scale = {2 * scale:g} in every sampled batch",
                    got=f"||x|| = {float(x.norm()):.1e} after {iterations} iterations",
                    cause="scale is below the largest eigenvalue, or the curvature has negative ones below -damping",
                    remedy="raise scale or damping, or choose curvature='gauss-newton' or solver='cg'",
                )
            )
        moved = max(moved, float(((x - before).norm(dim=1) / x.norm(dim=1).clamp_min(1e-30)).max()))
        total += x / scale
    return Solved(total / repeats, moved, 0)


def explicit(product: Product, size: int, block: int, like: Tensor) -> Tensor:
    """The matrix [P, P] behind ``product``; refused if it does not fit."""
    if size * size * like.element_size() > DENSE_BYTES:
        raise UnsupportedError(
            message(
                "the explicit matrix is too large",
                expected=f"at most {DENSE_BYTES / 2**20:.0f} MiB",
                got=f"{size} x {size} numbers: {size * size * like.element_size() / 2**20:.0f} MiB",
                remedy="choose solver='cg', or the parameters of one layer with layer=",
            )
        )
    rows = torch.arange(size, device=like.device).split(block)
    matrix = torch.cat([product(_units(at, size, like)) for at in rows])
    return (matrix + matrix.T) / 2


def dense(matrix: Tensor, b: Tensor) -> Solved:
    """By factorising the explicit symmetric matrix."""
    x = torch.linalg.solve(matrix, b.T).T
    return Solved(x, _largest((b - x @ matrix).square().sum(1), b), 0)


def _units(at: Tensor, size: int, like: Tensor) -> Tensor:
    block = torch.zeros(len(at), size, dtype=like.dtype, device=like.device)
    block[torch.arange(len(at), device=like.device), at] = 1
    return block


def _largest(squares: Tensor, b: Tensor) -> float:
    return float((squares / b.square().sum(1).clamp_min(1e-30)).max().sqrt())
