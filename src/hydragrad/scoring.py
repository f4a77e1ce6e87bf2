"""Where scores are gathered: the rows they count in, and the result in the making."""

from typing import Any, final

import torch
from torch import Tensor

from hydragrad.errors import MismatchError, NonFiniteError, message
from hydragrad.hypergradient.queries import example_ids, group_numbers
from hydragrad.run import Run


@final
class Rows:
    """Which row of the result each training example counts in: ``of`` int64 [N], -1 for none; ``ids`` of the rows."""

    def __init__(self, of: Tensor, ids: Tensor) -> None:
        self.of, self.ids = of, ids
        self.whole = torch.equal(of, torch.arange(len(of)))  # every example its own row: nothing to look up

    @staticmethod
    def make(run: Run, groups: Any, train: Any) -> "Rows":
        count = run.num_examples
        if groups is not None and train is not None:
            raise MismatchError(message("groups and train together", remedy="give one of them"))
        if groups is not None:
            numbers, _, height = group_numbers(groups, count, "groups", "training example")
            return Rows(numbers, torch.arange(height))
        if train is None:
            return Rows(torch.arange(count), torch.arange(count))
        ids = example_ids(train, count, "train")
        if len(ids.unique()) != len(ids):
            raise MismatchError(
                message("train names an example twice", expected="different integers", got=ids.tolist()[:8])
            )
        of = torch.full((count,), -1, dtype=torch.int64)
        of[ids] = torch.arange(len(ids))
        return Rows(of, ids)


@final
class Scores:
    """The result in the making, [E or 1, R, M]; while a sweep lasts, its columns are kept on the device.

    ``tokens`` L: every row is L rows, one for each token, [E or 1, R L, M]; 0: the terms of tokens are summed. With
    several ``runs``, ``finish`` makes what was put their mean, in which a run counts inversely to its size for each
    query: size = ||terms of all examples in all steps||, the same however rows are grouped. A run near an instability
    has scores many times those of its neighbours, and would rule a plain mean. ``open`` says what each example counts.
    """

    def __init__(
        self,
        run: Run,
        stop: int,
        rows: Rows,
        columns: int,
        by_epoch: bool,
        dtype: torch.dtype,
        tokens: int = 0,
        runs: int = 1,
    ) -> None:
        last = max(max(record.epochs or (record.epoch,)) for record in run.steps[:stop])
        epochs = last + 1 if by_epoch else 1
        self.by_epoch, self.tokens = by_epoch, tokens
        self.rows = rows
        self.values = torch.zeros(epochs, len(rows.ids) * max(tokens, 1), columns, dtype=dtype)
        self.height = epochs * self.values.shape[1]
        self.runs = runs
        self._open: Tensor | None = None
        self._counting: Tensor | None = None
        self._sizes = torch.zeros(0)
        self._squares = 0.0
        self._weights = torch.zeros(columns, dtype=torch.float64)
        self.spread = float("nan")
        """The relative standard error of the mean of the runs' scores over their sizes, as of independent runs."""

    def open(self, columns: slice, device: torch.device, counting: Tensor | None = None) -> None:
        """Begin a sweep for these columns; ``counting`` [N]: factors of the examples' terms."""
        self._counting = counting
        width = columns.stop - columns.start
        direct = self.runs == 1 and device.type == "cpu" and width == self.values.shape[2]
        self._open = self.values if direct else self.values.new_zeros(*self.values.shape[:2], width, device=device)
        self._sizes = torch.zeros(width, dtype=torch.float64, device=device)

    def add(self, ids: Tensor, chosen: slice, terms: Tensor, epoch: int) -> None:
        """Subtract terms [k, b] or [k, b, L] from the rows of ``ids``, tokens summed unless they are told apart."""
        assert self._open is not None
        assert terms.dim() == 3 or not self.tokens
        each = terms.flatten(2).sum(2) if terms.dim() > 2 else terms
        if self.runs > 1:
            self._sizes[chosen] += each.double().square().sum(1)
        terms = terms if self.tokens else each
        if self._counting is not None:
            factors = self._counting[ids].to(terms)
            terms = terms * factors.reshape(-1, *[1] * (terms.dim() - 2))
        target = self._open[epoch if self.by_epoch else 0]
        at = ids if self.rows.whole else self.rows.of[ids]
        if not self.rows.whole and bool((at < 0).any()):
            kept = at >= 0
            at, terms = at[kept], terms[:, kept.to(terms.device)]
        if self.tokens:
            at = (at[:, None] * self.tokens + torch.arange(terms.shape[2])).flatten()
            terms = terms.flatten(1)
        target[:, chosen].index_add_(0, at.to(target.device), terms.T, alpha=-1)

    def total(self) -> Tensor:
        """Summed over epochs and tokens, [R, M]."""
        return self.values.sum(0).unflatten(0, (len(self.rows.ids), -1)).sum(1)

    def result(self) -> Tensor:
        """With the axes that were asked for: [N, M], [E, N, M], [N, L, M] or [E, N, L, M]."""
        values = self.values.unflatten(1, (-1, self.tokens)) if self.tokens else self.values
        return values if self.by_epoch else values[0]

    def part(self, columns: slice) -> Tensor:
        """The scores of these columns, as a view."""
        return self.values[:, :, columns]

    def put(self, columns: slice, found: Tensor, sizes: Tensor | None) -> None:
        """Take one run's scores of these columns, and its sizes for them."""
        if sizes is None:
            self.part(columns).copy_(found)
            return
        weights = torch.where(sizes > 0, 1 / sizes, 0.0)
        scaled = found.double() * weights
        self.part(columns).add_(scaled)
        self._squares += float(scaled.square().sum())
        self._weights[columns] += weights

    def finish(self) -> None:
        """All runs were put."""
        if self.runs == 1:
            return
        norm = float(self.values.double().square().sum()) / self.runs
        if norm:
            self.spread = (max(self._squares / norm - 1, 0.0) / (self.runs - 1)) ** 0.5
        self.values /= torch.where(self._weights > 0, self._weights, 1.0)

    def close(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        """End the sweep; its scores [E or 1, R, k] and sizes [k], on the CPU. Refuses NaN and infinities."""
        assert self._open is not None
        found, self._open = self._open.cpu(), None
        bad = (~found.isfinite()).nonzero()
        if len(bad):
            row, column = int(self.rows.ids[bad[0, 1] // max(self.tokens, 1)]), columns.start + int(bad[0, 2])
            raise NonFiniteError(
                message(
                    "the scores are not finite",
                    expected="finite numbers",
                    got=f"NaN or infinity, first for training example (or group) {row} and query {column}",
                    cause="the adjoint overflowed (an unstable run), or a loss with an infinite second derivative",
                    remedy="try method='gauss-newton', which is stable, or ask an earlier step with step=",
                )
            )
        return found, self._sizes.sqrt().cpu() if self.runs > 1 else None
