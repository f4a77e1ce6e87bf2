"""A gauss-newton engine that forms the outputs' Jacobian of the convolutions once for all queries of a step."""

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hydragrad.errors import UnsupportedError, message
from hydragrad.hypergradient.curvature import Products, over_block, vjp
from hydragrad.hypergradient.gauss_newton import GaussNewton
from hydragrad.hypergradient.tracing import TracedFunction
from hydragrad.shapes import in_rows
from hydragrad.step.objective import Objective, Point, Vectors

_MOST_BYTES = 2**30
"""A Jacobian larger than this is not worth its memory."""


@final
class OutputJacobian(GaussNewton):
    """J gam = sum_e J_e gam_e + J_f gam_f: explicit for the parameters up to the last convolution, functional beyond.

    A tangent costs as much in a convolution as training does, since its maps are large and its parameters few. So for
    these parameters J_e ``[b, C, *shape]`` is formed once a step (C backward passes over the batch for all K queries)
    and each query is a matrix product; linear layers, whose parameters are many, keep forward and reverse mode.
    Right only where an example's outputs do not depend on the rest of its batch; whoever chooses compares.
    """

    name = "output-jacobian"

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        self.explicit = explicit_parameters(objective.module, objective.names)
        self._last: tuple[Point, Vectors] | None = None
        self._rows = TracedFunction(self._jacobian)
        self._rest = TracedFunction(self._with_jacobian, linear=1)

    def held(self, point: Point) -> int:
        """The Jacobian; as many outputs per example as one forward pass of the batch gives."""
        floats, _, _ = self.objective.outputs(point.params, point.rest, point.batch)
        return sum(f.numel() for f in floats) * sum(p.nbytes for p in point.params[: self.explicit]) + self._rest.held

    def products(self, point: Point, gam: Vectors, bet: Vectors = ()) -> Products:
        if not self.explicit or point.carried or point.draws:
            raise UnsupportedError(message("no convolution to form a Jacobian of, or one coupled by its batch"))
        mode = self.objective.mode
        if self._last is None or self._last[0] is not point:
            self._last = (point, self._rows(mode, point.params, point.rest, point.batch, point.coefficients))
        given = (point.params, point.rest, point.batch, point.coefficients, point.weights)
        return self._rest(mode, given, self._last[1], gam, at=point)

    def _split(self, vectors: Vectors) -> tuple[Vectors, Vectors]:
        return vectors[: self.explicit], vectors[self.explicit :]

    def _jacobian(
        self, mode: int, params: Vectors, rest: dict[str, Tensor], batch: Any, coefficients: Tensor
    ) -> Vectors:
        """J_e of every example: a tensor ``[b, C, *shape]`` a parameter, C outputs of all kinds together."""
        leaves, structure = pytree.tree_flatten(batch)
        b = coefficients.shape[0]
        dims = [0 if isinstance(x, Tensor) and x.dim() and x.shape[0] == b else None for x in leaves]
        moving, fixed = self._split(params)

        def one(*rows: Any) -> Vectors:
            alone = [x if dim is None else x.unsqueeze(0) for x, dim in zip(rows, dims, strict=True)]

            def outputs(at: Vectors) -> Tensor:
                floats, _, _ = self.objective.outputs((*at, *fixed), rest, pytree.tree_unflatten(alone, structure))
                flat = torch.cat([f.reshape(-1) for f in floats])
                if b * len(flat) * sum(p.numel() for p in at) * flat.element_size() > _MOST_BYTES:
                    raise UnsupportedError(message("the Jacobian of the outputs is too large to be formed"))
                return flat

            return torch.func.jacrev(outputs)(moving)

        return torch.func.vmap(one, in_dims=tuple(dims))(*leaves)

    def _with_jacobian(self, mode: int, given: tuple[Any, ...], jacobian: Vectors, gam: Vectors) -> Products:
        point = Point(*given)
        explicit, moving = self._split(point.params)
        gam_explicit, gam_moving = self._split(gam)

        def outputs(at: Vectors) -> tuple[Vectors, list[Any]]:
            floats, others, _ = self.objective.outputs((*explicit, *at), point.rest, point.batch)
            return floats, others

        _, others = outputs(moving)
        floats, pull = vjp(lambda at: outputs(at)[0], moving)
        tangents = over_block(lambda t: torch.func.jvp(lambda at: outputs(at)[0], (moving,), (t,))[1], gam_moving)
        tangents = tuple(
            t + e.view_as(t) for t, e in zip(tangents, _pushed(jacobian, gam_explicit, floats), strict=True)
        )
        curved, terms = self.outer(point, floats, others, tangents)
        (back,) = over_block(pull, curved)
        return (*_pulled(jacobian, curved), *back), terms, ()


def explicit_parameters(module: nn.Module, names: tuple[str, ...]) -> int:
    """How many of the parameters, in order, lie up to the last convolution; 0 if none or all do."""
    convolutions = [name for name, part in module.named_modules() if isinstance(part, nn.modules.conv._ConvNd)]
    places = [k for k, name in enumerate(names) if name.rpartition(".")[0] in convolutions]
    return places[-1] + 1 if places and places[-1] + 1 < len(names) else 0


def _sizes(floats: Vectors) -> list[int]:
    return [f[0].numel() for f in floats]


def _pushed(jacobian: Vectors, gam: Vectors, floats: Vectors) -> Vectors:
    """J_e gam_e ``[K, b, C_f]`` for every output f."""
    total = sum(torch.matmul(in_rows(g), in_rows(j, 2).flatten(0, 1).T) for j, g in zip(jacobian, gam, strict=True))
    assert isinstance(total, Tensor)
    b, c = jacobian[0].shape[:2]
    return total.view(len(total), b, c).split(_sizes(floats), dim=2)


def _pulled(jacobian: Vectors, curved: Vectors) -> Vectors:
    """J_e^T u ``[K, *shape]`` for output cotangents u."""
    together = torch.cat([u.flatten(2) for u in curved], dim=2).flatten(1)
    return tuple(
        torch.matmul(together, in_rows(j, 2).flatten(0, 1)).view(len(together), *j.shape[2:]) for j in jacobian
    )
