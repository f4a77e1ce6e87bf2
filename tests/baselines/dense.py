"""A trained model as dense arrays, by plain autograd on its live modules: gradients, Hessian, Gauss-Newton matrix."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.utils.data import default_collate

from hydragrad.retraining.measuring import losses_at
from tests.hypergradient.recorded import EPOCHS, load, recipe_of, train
from tests.oracles import Recipe
from tests.zoo import Case, case


@dataclass(frozen=True)
class Dense:
    """Everything at one set of parameters, float64, evaluation mode, one example at a time."""

    model: nn.Module
    loss: Callable[..., Tensor]
    samples: Sequence[Any]
    queries: Sequence[Any]
    mean_tokens: bool = True

    @cached_property
    def names(self) -> list[str]:
        return [name for name, p in self.model.named_parameters() if p.requires_grad]

    @cached_property
    def w(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters() if p.requires_grad])

    def bound(self, w: Tensor) -> Callable[..., Tensor]:
        """The model with flat parameters."""
        shapes = dict(self.model.named_parameters())
        pieces = w.split([shapes[name].numel() for name in self.names])
        values = {name: piece.view(shapes[name].shape) for name, piece in zip(self.names, pieces, strict=True)}
        return lambda *inputs: functional_call(self.model, values, inputs)

    def one(self, w: Tensor, sample: Any, mean: bool) -> Tensor:
        losses = self.loss(self.bound(w), default_collate([sample]))
        return losses.mean() if mean else losses.sum()

    def objective(self, w: Tensor) -> Tensor:
        """L(w)."""
        return torch.stack([self.one(w, sample, self.mean_tokens) for sample in self.samples]).mean()

    def _gradients(self, samples: Sequence[Any], mean: bool) -> Tensor:
        rows = []
        for sample in samples:
            w = self.w.clone().requires_grad_()
            rows.append(torch.autograd.grad(self.one(w, sample, mean), w)[0])
        return torch.stack(rows)

    @cached_property
    def gradients(self) -> Tensor:
        return self._gradients(self.samples, self.mean_tokens)

    @cached_property
    def query_gradients(self) -> Tensor:
        return self._gradients(self.queries, False)

    def curvature(self, kind: str) -> Tensor:
        """[P, P] of L(w)."""
        if kind == "hessian":
            found: Any = hessian(self.objective, self.w)
            return found
        return torch.stack([self._gauss_newton(sample) for sample in self.samples]).mean(0)

    def _gauss_newton(self, sample: Any) -> Tensor:
        batch = default_collate([sample])

        def outputs(w: Tensor) -> Tensor:
            return self.bound(w)(batch[0])

        def head(z: Tensor) -> Tensor:
            losses = self.loss(lambda *_: z, batch)
            return losses.mean() if self.mean_tokens else losses.sum()

        z = outputs(self.w).detach()
        jac: Any = jacobian(outputs, self.w)
        curved: Any = hessian(head, z)
        jac = jac.reshape(z.numel(), -1)
        return jac.T @ curved.reshape(z.numel(), -1) @ jac


def trained(name: str, path: Path, **more: Any) -> tuple[Any, Dense, Case, Recipe]:
    """A recorded run of a zoo case, its dense arrays (of the live model that the loop left), the case, the recipe."""
    problem = case(name)
    recipe = recipe_of(problem, **more)
    model = train(recipe, path, EPOCHS)
    live = copy.deepcopy(model).eval()
    dense = Dense(live, problem.loss, problem.samples, problem.queries, mean_tokens=recipe.reduction != "sum")
    return load(recipe, path), dense, problem, recipe


def leave_one_out(run: Any, ids: Tensor, queries: Any) -> Tensor:
    """Measured rise of each query's loss without each example, [n, M], by really training again."""
    before = losses_at(run, run.trajectory.state(run.num_steps), queries).double()
    rows = []
    for i in ids:
        weights = torch.ones(run.num_examples)
        weights[i] = 0.0
        rows.append(losses_at(run, run.replay(weights=weights), queries).double() - before)
    return torch.stack(rows)
