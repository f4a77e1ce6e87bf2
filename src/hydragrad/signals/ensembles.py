"""What an ensemble says of the examples: the recorded run, replayed on random halves of its data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from hydragrad.errors import MismatchError, message
from hydragrad.files import sha256
from hydragrad.hypergradient.queries import Columns
from hydragrad.labels import Relabel
from hydragrad.retraining.carrying import carried_out
from hydragrad.retraining.counterfactual import Change
from hydragrad.retraining.measuring import Question, Retrainer
from hydragrad.run import Run
from hydragrad.shapes import Float, Int
from hydragrad.signals.probabilities import PLAIN, Scale
from hydragrad.signals.trying import LabelLosses, el2n
from hydragrad.trajectory.state import State

REPLAYS = 4


def halves(count: int, replays: int, seed: int) -> list[Change]:
    """Replays without a random half of the examples each, in complementary pairs; the other half's losses count twice.

    So each example is out of every second replay, and a step is as large as it was on average. Drawn under ``seed``;
    the first pairs are the same for every larger number. Raises MismatchError for a number that is not even.
    """
    if isinstance(replays, bool) or not isinstance(replays, int) or replays < 2 or replays % 2:
        raise MismatchError(
            message(
                "replays come in pairs, a half and what it leaves", expected="an even number from 2 on", got=replays
            )
        )
    if count < 2:
        raise MismatchError(message("one example has no halves", expected="two or more training examples", got=count))
    generator, changes = torch.Generator().manual_seed(seed), []
    for _ in range(replays // 2):
        order = torch.randperm(count, generator=generator)
        for out in (order[: count // 2], order[count // 2 :]):
            changes.append(Change(tuple(sorted(out.tolist())), others=2.0))
    return changes


@final
@dataclass(frozen=True)
class Errors:
    """||p_i - onehot(y_i)|| (EL2N) of every training example at a state; p: the probabilities that the losses show.

    ``places``: of the examples' own labels among the ``classes``; ``scale``: how losses show probabilities.
    """

    classes: tuple[int, ...]
    places: tuple[int, ...]
    relabel: Relabel
    scale: Scale = PLAIN

    @property
    def description(self) -> dict[str, Any]:
        """Plain values that tell these errors from others."""
        weights = {} if self.scale.weights is None else {"weights of classes": list(self.scale.weights)}
        return {"el2n of": sha256(repr((self.classes, self.places)).encode()), **weights}

    def __call__(self, run: Run) -> Callable[[State], Tensor]:
        losses, own = LabelLosses(run, self.classes, self.relabel), torch.tensor(self.places)
        return lambda state: el2n(torch.softmax(-self.scale.unweighted(losses(state)[1].double()), 1), own)


def ensemble_errors(
    run: Run,
    classes: Sequence[int],
    given: Int[Tensor, " N"],
    relabel: Relabel,
    replays: int = REPLAYS,
    *,
    scale: Scale = PLAIN,
    seed: int = 0,
    jobs: int | None = None,
    resume: str | Path | None = None,
    progress: bool = False,
) -> Float[Tensor, " N"]:
    """||p_i - onehot(y_i)|| at the end of replays on random halves of the data, averaged over the replays.

    ``given``: the place of each example's own label among the classes; ``scale``: how losses show probabilities.
    ``jobs``, ``resume``: as ``validate`` has them.
    """
    question = Question(
        folder=run.trajectory.folder.resolve(),
        problem=run.problem,
        queries=run.problem.data,
        columns=Columns.make(None, run.num_examples),
        until=run.num_steps,
        values=Errors(tuple(classes), tuple(given.tolist()), relabel, scale),
    )
    changes = halves(run.num_examples, replays, seed)
    done, _ = carried_out(Retrainer(question, run), changes, jobs, resume, None, progress)
    return torch.stack([outcome.values for outcome in done]).mean(0)
