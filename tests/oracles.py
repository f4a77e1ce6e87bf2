"""Naive second implementations of what hydragrad computes, sharing no code with it. Slow, plain, float64.

- `unroll`: the whole run as one autograd graph in the example weights. Exact, every model, every optimizer.
- `recursion`: the forward sweep with explicit matrices, for `exact`, `gauss-newton` and `hessian-free`.
- `closed_form`: quadratic losses under SGD with momentum, as products of matrices, without automatic differentiation.
- `finite_differences`: central differences of retraining, by `run.replay(weights=...)`.

Score everywhere: `-d m_j / d eps_i`, where example i's loss counts `1 + eps_i` times.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import default_collate

from tests.plain_layers import differentiable
from tests.step.rules import RULES, Scalars, Tensors, full_hyper, initial_state

# ---------------------------------------------------------------------------------------------------------------
# The run


@dataclass(frozen=True)
class Clip:
    """Clipping of the gradients of `names` (None: all), by their p-norm, or elementwise where `p` is None."""

    limit: float
    p: float | None = 2.0
    names: Sequence[str] | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole training run, described. `steps[t]` is a list of micro-batches, each a list of example ids.

    `groups`: (parameter names, hyperparameters) per param group; the hyperparameters are one dict, or one per step.
    `reduction`: "mean", "sum" or `(batch, shape) -> coefficients`. `clip`: a maximal total gradient norm, or `Clip`s
    one after the other.
    `penalty(parameters by name)` is added to every step's objective.
    `modes(model, t)` may change modules' modes before step t, which starts from `model.train()`.
    `weights` `[N]`: example i's loss counts `weights[i] + eps_i` times; 1 unless given.
    `frozen(t)`: names of parameters that do not train at step t, whose gradients the loop keeps as zeros.
    """

    model: nn.Module
    loss: Callable[[Callable[..., Tensor], Any], Tensor]
    samples: Sequence[Any]
    steps: Sequence[Sequence[Sequence[int]]]
    optimizer: str
    groups: Sequence[tuple[Sequence[str], Mapping[str, Any] | Sequence[Mapping[str, Any]]]]
    reduction: Any = "mean"
    clip: "float | Sequence[Clip] | None" = None
    modes: Callable[[nn.Module, int], None] = lambda model, t: None
    penalty: Callable[[Mapping[str, Tensor]], Tensor] = lambda params: torch.zeros(())
    weights: Tensor | None = None
    frozen: Callable[[int], Sequence[str]] | None = None

    def still(self, t: int) -> Sequence[str]:
        """What `frozen` names at step t."""
        return [] if self.frozen is None else self.frozen(t)

    def hyper(self, t: int) -> dict[str, dict[str, Any]]:
        """The full hyperparameters of each parameter at step t."""
        chosen = [(names, given if isinstance(given, Mapping) else given[t]) for names, given in self.groups]
        return {name: full_hyper(self.optimizer, given) for names, given in chosen for name in names}


def _collate(samples: Sequence[Any], ids: Sequence[int]) -> Any:
    def double(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.double() if x.is_floating_point() else x
        return type(x)(double(y) for y in x)

    return double(default_collate([samples[i] for i in ids]))


def _bind(model: nn.Module, values: Tensors) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: functional_call(model, values, args, kwargs)


def _objective(recipe: Recipe, model: Callable[..., Tensor], ids: Sequence[int], eps: Tensor) -> Tensor:
    """`reduce_i((w_i + eps_i) loss_i)` of one micro-batch."""
    batch = _collate(recipe.samples, ids)
    losses = recipe.loss(model, batch)
    given = eps[list(ids)]
    given = given[:, : losses.shape[1]] if given.ndim == 2 else given.view(-1, *[1] * (losses.ndim - 1))
    weights = given + (1 if recipe.weights is None else recipe.weights[list(ids)].view(-1, *[1] * (losses.ndim - 1)))
    if callable(recipe.reduction):
        return (torch.as_tensor(recipe.reduction(batch, losses.shape)) * weights * losses).sum()
    return (weights * losses).sum() / (losses.numel() if recipe.reduction == "mean" else 1)


def clips_of(clips: float | Sequence[Clip] | None) -> Sequence[Clip]:
    """A recipe's clips, one by one."""
    if clips is None:
        return []
    return [Clip(clips)] if isinstance(clips, (int, float)) else clips


def _clipped(gradients: dict[str, Tensor], clips: float | Sequence[Clip] | None) -> dict[str, Tensor]:
    for clip in clips_of(clips):
        chosen = {name: g for name, g in gradients.items() if clip.names is None or name in clip.names}
        if clip.p is None:
            gradients = gradients | {name: g.clamp(-clip.limit, clip.limit) for name, g in chosen.items()}
            continue
        flat = torch.cat([g.flatten() for g in chosen.values()]).abs()
        norm = flat.max() if clip.p == float("inf") else flat.pow(clip.p).sum().pow(1 / clip.p)
        scale = torch.clamp(clip.limit / (norm + 1e-6), max=1.0)
        gradients = gradients | {name: scale * g for name, g in chosen.items()}
    return gradients


@dataclass(frozen=True)
class Unrolled:
    """The run as one graph in `eps` `[T, N]` (one weight per step and example), or `[T, N, L]` (and token)."""

    recipe: Recipe
    model: nn.Module
    eps: Tensor
    params: list[Tensors]  # of w_0 ... w_T
    buffers: list[Tensors]  # of v_0 ... v_T

    def flat(self, t: int = -1) -> Tensor:
        """`w_t` as one vector `[P]`, in the order of `named_parameters` (those that train)."""
        return torch.cat([w.flatten() for w in self.params[t].values()])

    def measurements(self, queries: Sequence[Any], measure: Callable | None = None, t: int = -1) -> Tensor:
        """`m_j(w_t, v_t)` in eval mode, `[M]`; the loss by default, summed over tokens."""
        self.model.eval()
        with sdpa_kernel(SDPBackend.MATH):
            bound = _bind(self.model, {**self.params[t], **self.buffers[t]})
            values = (measure or self.recipe.loss)(bound, _collate(queries, range(len(queries))))
        return values.reshape(values.shape[0], -1).sum(1)

    def scores_by_step(self, queries: Sequence[Any], measure: Callable | None = None, t: int = -1) -> Tensor:
        """`-d m_j / d eps[t, i]`, `[T, N, M]` (or `[T, N, L, M]`)."""
        values = self.measurements(queries, measure, t)
        columns = [torch.autograd.grad(m, self.eps, retain_graph=True)[0] for m in values]
        return -torch.stack(columns, dim=-1)

    def scores(self, queries: Sequence[Any], measure: Callable | None = None, t: int = -1) -> Tensor:
        """`-d m_j / d eps_i`, `[N, M]`."""
        return self.scores_by_step(queries, measure, t).sum(0)

    def vectors(self, examples: Sequence[int]) -> Tensor:
        """`d w_T / d eps_i` for chosen examples, `[n, P]`: the transpose of a transpose, by two reverse passes."""
        w = self.flat()
        dual = torch.zeros_like(w, requires_grad=True)
        (pulled,) = torch.autograd.grad(w, self.eps, dual, create_graph=True)
        return torch.stack([torch.autograd.grad(pulled[:, i].sum(), dual, retain_graph=True)[0] for i in examples])


def unroll(recipe: Recipe, create_graph: bool = True, tokens: int | None = None) -> Unrolled:
    """Train by plain autograd, keeping the whole graph. Memory O(T P): tiny models only."""
    model = differentiable(recipe.model)
    shape = [len(recipe.steps), len(recipe.samples), *([] if tokens is None else [tokens])]
    eps = torch.zeros(shape, dtype=torch.float64, requires_grad=create_graph)
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    v = {name: b.detach().clone() for name, b in model.named_buffers()}
    state: dict[str, Any] = {}
    params, buffers = [w], [v]
    for t, micro_batches in enumerate(recipe.steps):
        recipe.modes(model.train(), t)
        summed: Tensors = {}
        for place, ids in enumerate(micro_batches):
            values = {**{name: p.view_as(p) for name, p in w.items()}, **v}
            here = [values[name] for name in w]  # not w itself: the buffers depend on that, and g takes them as given
            with sdpa_kernel(SDPBackend.MATH):
                scalar = _objective(recipe, _bind(model, values), ids, eps[t])
                if not place:
                    scalar = scalar + recipe.penalty({name: values[name] for name in w})
                raw = torch.autograd.grad(scalar, here, create_graph=create_graph, allow_unused=True)
            v = {name: values[name] for name in v}  # functional_call leaves what the model assigned in the dict
            for name, g in zip(w, raw, strict=True):
                if g is not None:
                    summed[name] = summed[name] + g if name in summed else g
        summed |= {name: torch.zeros_like(w[name]) for name in recipe.still(t)}
        gradients = _clipped(summed, recipe.clip)
        w, hyper = dict(w), recipe.hyper(t)
        for name, g in gradients.items():
            slots, scalars = state.get(name) or initial_state(recipe.optimizer, w[name].detach(), hyper[name])
            w[name], *state[name] = RULES[recipe.optimizer](w[name], g, slots, hyper[name], scalars)
        if not create_graph:
            w = {name: p.detach().requires_grad_() for name, p in w.items()}
        params.append(w)
        buffers.append(v)
    return Unrolled(recipe, model, eps, params, buffers)


# ---------------------------------------------------------------------------------------------------------------
# The forward recursion with explicit matrices


def _gauss_newton(recipe: Recipe, model: Callable[[Tensor], Callable[..., Tensor]], u: Tensor, ids: Any) -> Tensor:
    """`J^T H_out J` of one micro-batch; `model(u)` is the model at u, the parameters and float buffers."""
    zero, kept = torch.zeros(len(recipe.samples), dtype=u.dtype), []

    def outputs(x: Tensor) -> Tensor:
        def spy(*args: Any, **kwargs: Any) -> Tensor:
            kept.append(model(x)(*args, **kwargs))
            return kept[-1]

        _objective(recipe, spy, ids, zero)
        return kept.pop()

    z = outputs(u).detach()
    found: Any = jacobian(outputs, u, vectorize=True)
    jac = found.reshape(z.numel(), -1)

    def given(z: Tensor) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: (model(u)(*args, **kwargs), z)[1]  # the model runs, for what it draws

    out: Any = hessian(lambda z: _objective(recipe, given(z), ids, zero), z)
    return jac.T @ out.reshape(z.numel(), -1) @ jac


def _curvature(
    recipe: Recipe, model: Callable[[Tensor], Callable[..., Tensor]], u: Tensor, ids: Any, method: str
) -> Tensor:
    """The method's second derivatives of one micro-batch in (w, v): the Hessian, `J^T H_out J`, or zero."""
    zero = torch.zeros(len(recipe.samples), dtype=u.dtype)
    if method == "hessian-free":
        return torch.zeros(len(u), len(u), dtype=u.dtype)
    if method == "gauss-newton":
        return _gauss_newton(recipe, model, u, ids)
    found: Any = hessian(lambda x: _objective(recipe, model(x), ids, zero), u)
    return found


@dataclass(frozen=True)
class Recursion:
    """`vectors`: `d w_T / d eps_i` under the method's curvature, `[N, P]`; `final`: `w_T`, `[P]`.

    `buffers`: `d v_T / d eps_i` of the float buffers, `[N, Q]`.
    """

    vectors: Tensor
    final: Tensor
    buffers: Tensor
    gradients: Callable[[Sequence[Any]], Tensor]

    def scores(self, queries: Sequence[Any]) -> Tensor:
        """`-(dm_j/dw . h_i + dm_j/dv . y_i)`, `[N, M]`."""
        return -torch.cat([self.vectors, self.buffers], dim=1) @ self.gradients(queries).T


def recursion(recipe: Recipe, method: str) -> Recursion:
    """Forward sweep with dense matrices, w and v together. No parameter without a gradient; P of some 50."""
    model = differentiable(recipe.model).train()
    names = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    floats = {name: v.shape for name, v in model.named_buffers() if v.is_floating_point()}
    counters = {name: v for name, v in model.named_buffers() if name not in floats}
    w = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    v = torch.cat([w[:0], *(model.get_buffer(name).flatten() for name in floats)])

    def unflat(x: Tensor, names: Mapping[str, torch.Size] = names) -> Tensors:
        parts = x.split([shape.numel() for shape in names.values()])
        return {name: part.view(shape) for (name, shape), part in zip(names.items(), parts, strict=True)}

    def tensors(u: Tensor) -> Tensors:
        return unflat(u, {**names, **floats}) | counters

    def at(u: Tensor) -> Callable[..., Tensor]:
        return _bind(model, tensors(u))

    def moved(u: Tensor, ids: Any) -> Tensors:
        values = tensors(u)
        _objective(recipe, _bind(model, values), ids, eps)
        return values

    def flat_moved(u: Tensor, ids: Any) -> Tensor:
        values = moved(u, ids)
        return torch.cat([w[:0], *(values[name].flatten() for name in floats)])

    hypers = [recipe.hyper(t) for t in range(len(recipe.steps))]
    states = {  # slots of all steps: some hyperparameters switch them on and off
        n: ({k: x for h in hypers for k, x in initial_state(recipe.optimizer, p, h[n])[0].items()},)
        for n, p in unflat(w).items()
    }
    scalars = {n: initial_state(recipe.optimizer, p, hypers[0][n])[1] for n, p in unflat(w).items()}
    keys = [(n, slot) for n, state in states.items() for slot in state[0]]
    s = torch.cat([states[n][0][slot].flatten() for n, slot in keys] or [w[:0]])
    h_z = torch.zeros(len(w) + len(s), len(recipe.samples), dtype=w.dtype)
    y = torch.zeros(len(v), len(recipe.samples), dtype=w.dtype)
    eps, sizes = torch.zeros(len(recipe.samples), dtype=w.dtype), [len(w), len(s), len(w)]

    def gradient(u: Tensor, ids: Any, eps: Tensor, first: bool) -> Tensor:
        x = u.detach().requires_grad_()
        scalar = _objective(recipe, at(x), ids, eps)
        scalar = scalar + recipe.penalty(unflat(x[: sizes[0]])) if first else scalar
        return torch.autograd.grad(scalar, x, create_graph=True)[0][: sizes[0]]

    def update(x: Tensor, t: int, scalars: dict[str, Scalars]) -> tuple[Tensor, dict[str, Scalars]]:
        w, s, g = x.split(sizes)
        slots: dict[str, Tensors] = {n: {} for n in names}
        for (n, slot), part in zip(keys, s.split([names[n].numel() for n, _ in keys]), strict=True):
            slots[n][slot] = part.view(names[n])
        ws, gs, hyper = unflat(w), _clipped(unflat(g), recipe.clip), recipe.hyper(t)
        after = {n: RULES[recipe.optimizer](ws[n], gs[n], slots[n], hyper[n], scalars[n]) for n in names}
        parts = [after[n][0].flatten() for n in names] + [after[n][1][k].flatten() for n, k in keys]
        return torch.cat(parts), {n: a[2] for n, a in after.items()}

    for t, step in enumerate(recipe.steps):
        recipe.modes(model.train(), t)
        total, dg = torch.zeros_like(w), torch.zeros(len(w), len(recipe.samples), dtype=w.dtype)
        for place, ids in enumerate(step):
            u, h_y = torch.cat([w, v]), torch.cat([h_z[: sizes[0]], y])
            total += gradient(u, ids, eps, not place).detach()
            if not place and method != "hessian-free":
                bent: Any = hessian(lambda x: recipe.penalty(unflat(x)) + 0 * x.sum(), w)
                dg += bent @ h_z[: sizes[0]]
            dg += _curvature(recipe, at, u, ids, method)[: sizes[0]] @ h_y + jacobian(
                lambda e, u=u, ids=ids, place=place: gradient(u, ids, e, not place), eps
            )
            found: Any = jacobian(partial(flat_moved, ids=ids), u) if len(v) else torch.zeros(0, len(u), dtype=u.dtype)
            after = moved(u, ids)
            y, v = found @ h_y, torch.cat([w[:0], *(after[name].detach().flatten() for name in floats)])
            counters = {name: after[name] for name in counters}
        moves = torch.cat([torch.full((k.numel(),), n not in recipe.still(t)).to(w) for n, k in names.items()])
        total, dg = total * moves, dg * moves[:, None]
        x, now = torch.cat([w, s, total]), partial(update, t=t, scalars=scalars)
        h_z = jacobian(lambda x, now=now: now(x)[0], x, vectorize=True) @ torch.cat([h_z, dg])
        stepped, scalars = now(x)
        w, s = stepped.detach().split(sizes[:2])

    def gradients(queries: Sequence[Any]) -> Tensor:
        model.eval()
        batch = _collate(queries, range(len(queries)))
        measured = lambda u: recipe.loss(at(u), batch).reshape(len(queries), -1).sum(1)  # noqa: E731
        return jacobian(measured, torch.cat([w, v]))

    return Recursion(h_z[: sizes[0]].T, w, y.T, gradients)


# ---------------------------------------------------------------------------------------------------------------
# No automatic differentiation at all


def closed_form(
    a: np.ndarray, y: np.ndarray, w: np.ndarray, batches: Sequence[Sequence[int]], lr: float, momentum: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """`loss_i = |A_i w - y_i|^2 / 2` under mean-reduced SGD with momentum: (w_T `[P]`, d w_T / d eps `[N, P]`).

    `a` is `[N, r, P]`, `y` `[N, r]`. The state (w, buffer) moves by an affine map M_t, so what example i adds at step t
    reaches the end multiplied by M_{T-1} ... M_{t+1}.
    """
    p, n = len(w), len(a)
    eye, maps, kicks, buffer = np.eye(p), [], [], np.zeros(p)
    for batch in batches:
        curvature = sum(a[i].T @ a[i] for i in batch) / len(batch)
        kick = np.zeros((2 * p, n))
        for i in batch:
            grad = a[i].T @ (a[i] @ w - y[i]) / len(batch)
            kick[:, i] += np.concatenate([-lr * grad, grad])
        buffer = momentum * buffer + kick[p:].sum(1)
        w = w - lr * buffer
        maps.append(np.block([[eye - lr * curvature, -lr * momentum * eye], [curvature, momentum * eye]]))
        kicks.append(kick)
    later, vectors = np.eye(2 * p), np.zeros((2 * p, n))
    for matrix, kick in zip(reversed(maps), reversed(kicks), strict=True):
        vectors += later @ kick
        later = later @ matrix
    return w, vectors[:p].T


def finite_differences(run: Any, measure: Callable[[Any], Tensor], direction: Tensor, h: float) -> Tensor:
    """`-d m_j / d eps . direction` by central differences of retraining: `measure(State) -> [M]`."""
    up, down = (measure(run.replay(weights=1 + sign * h * direction)) for sign in (1, -1))
    return -(up - down) / (2 * h)
