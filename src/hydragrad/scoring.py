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
    several ``runs``, what is put adds up, and ``finish`` makes it their mean.
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
        self._squares = 0.0

    def open(self, columns: slice, device: torch.device) -> None:
        """Begin a sweep for these columns."""
        width = columns.stop - columns.start
        direct = self.runs == 1 and device.type == "cpu" and width == self.values.shape[2]
        self._open = self.values if direct else self.values.new_zeros(*self.values.shape[:2], width, device=device)

    def add(self, ids: Tensor, chosen: slice, terms: Tensor, epoch: int) -> None:
        """Subtract terms [k, b] or [k, b, L] from the rows of ``ids``, tokens summed unless they are told apart."""
        assert self._open is not None
        assert terms.dim() == 3 or not self.tokens
        terms = terms.flatten(2).sum(2) if terms.dim() > 2 and not self.tokens else terms
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

    def put(self, columns: slice, found: Tensor) -> None:
        """Take one run's scores of these columns."""
        if self.runs == 1:
            self.part(columns).copy_(found)
        else:
            self.part(columns).add_(found)
            self._squares += float(found.double().square().sum())

    def finish(self) -> None:
        """All runs were put."""
        if self.runs > 1:
            self.values /= self.runs

    @property
    def spread(self) -> float:
        """The relative standard error of the mean, as of independent runs; NaN for one."""
        norm = float(self.values.double().square().sum())
        if self.runs == 1 or norm == 0:
            return float("nan")
        return (max(self._squares / norm - self.runs, 0.0) / (self.runs - 1) / self.runs) ** 0.5

    def close(self, columns: slice) -> Tensor:
        """End the sweep; its scores [E or 1, R, k], on the CPU. Refuses NaN and infinities."""
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
        return found
