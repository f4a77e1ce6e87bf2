"""The verb: compute what the recorded run says of its training examples, and rank them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from hydragrad.attributing import attribute
from hydragrad.attribution import Attribution
from hydragrad.errors import MismatchError, NonFiniteError, UnsupportedError, message
from hydragrad.fitting import check_run
from hydragrad.labels import Relabel, labels_of, with_label
from hydragrad.report.measures import average_ranks
from hydragrad.run import Run
from hydragrad.signals.along import MOST, Candidates, candidate_labels, mean_losses, self_influence
from hydragrad.signals.by_scores import cluster_harm, harm, harm_to_own_class
from hydragrad.signals.ensembles import REPLAYS, ensemble_errors
from hydragrad.suspects import Suspects

OF_LABELS = ("el2n", "margin", "doubt", "late", "combined", "ensemble")
OF_SCORES = ("harm", "class", "cluster")
_MOST_CLASSES = 100
"""More distinct labels than these are only tried if they are given: each costs a loss an example and state."""


def mislabels(
    run: Run,
    *,
    signal: str | None = None,
    clean: Any = None,
    labels: Tensor | Sequence[int] | None = None,
    classes: Sequence[int] | None = None,
    relabel: Relabel = with_label,
    states: int = MOST,
    method: str = "exact",
    replays: int = REPLAYS,
    seed: int = 0,
    jobs: int | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
) -> Suspects:
    """Rank the training examples by how suspicious their labels are, and suggest the labels that fit better.

    All but "ensemble" is read off the recorded run: averages over at most ``states`` stored states, the untrained one
    left out, in evaluation mode. p_i are the model's probabilities, y_i is the label of example i: the softmax over the
    labels c of minus the loss that it has with label c, divided by the weights of classes where the losses show that
    they are a weighted cross entropy. With another loss p_i is only this softmax, and ``note`` says so. ``signal``:

    - "el2n" (default): ||p_i - onehot(y_i)||, averaged; the evidence for it is in docs/mislabels.md;
    - "margin": max over c != y_i of p_i(c) minus p_i(y_i), averaged;
    - "doubt": 1 - p_i(y_i), averaged; "late": over the states in the second half of the run alone;
    - "combined": the mean of the ranks by el2n, margin and doubt, in (0, 1];
    - "ensemble": "late" plus ||p_i - onehot(y_i)|| at the end of ``replays`` (4), averaged: trainings without a random
      half of the examples each, the losses of the others doubled; in complementary pairs, drawn under ``seed``;
    - "loss" (default where no labels can be tried: regression, tokens): the training loss, averaged;
    - "self": ||grad loss_i||^2, averaged;
    - "harm": to the mean of the ``clean`` queries (a data set, or their Attribution by any method);
    - "class": to the queries of its own label: ``clean`` ones (a data set), else the training data;
    - "cluster": contribution vectors to ``clean`` queries in k-means clusters, the most harmful cluster first.

    Labels are the last part of (input, integer) samples. Otherwise give ``relabel(sample, label) -> sample``,
    ``labels`` [N] and ``classes`` (default: the labels that occur). ``method``: of the scores computed here; ``jobs``
    and ``resume``: of the replays, as in ``validate``. The suggestion is the label with the smallest average loss, its
    confidence the average softmax.
    Raises MismatchError, UnsupportedError, NonFiniteError.

    Example: ``hydragrad.mislabels(run).top(20)``.
    """
    if not isinstance(states, int) or states < 1:
        raise MismatchError(message("no states to look at", expected="states of at least 1", got=states))
    known = _Known.of(run, labels, classes, relabel)
    chosen = signal or ("el2n" if known.places is not None else "loss")
    if chosen not in (*OF_LABELS, "loss", "self", *OF_SCORES):
        expected = ", ".join((*OF_LABELS, "loss", "self", *OF_SCORES))
        raise UnsupportedError(message("unknown signal", expected=f"one of {expected}", got=repr(signal)))
    if chosen in OF_LABELS and known.places is None:
        raise UnsupportedError(
            message(
                f"signal={chosen!r} compares labels, and there are none to compare",
                got=known.why,
                remedy="choose signal='loss' or 'self'; or give relabel=, labels= and classes=",
            )
        )
    signals: dict[str, Tensor] = {}
    found: dict[str, Any] = {"note": known.why}
    if known.places is not None:
        tried = candidate_labels(run, known.classes, known.places, relabel, states, progress=progress)
        doubt = 1 - tried.confidence.gather(1, known.places[:, None])[:, 0]
        signals["loss"] = tried.loss
        three = {"el2n": tried.el2n, "margin": tried.margin, "doubt": doubt}
        signals |= three
        signals["late"] = tried.late
        signals["combined"] = torch.stack([average_ranks(x) for x in three.values()]).mean(0) / run.num_examples
        found |= _suggestions(tried, known) | {"note": tried.scale.note}
        if chosen == "ensemble":
            options = {"seed": seed, "jobs": jobs, "resume": resume, "progress": progress, "scale": tried.scale}
            errors = ensemble_errors(run, known.classes, known.places, relabel, replays, **options)
            signals["ensemble"] = tried.late + errors
    else:
        signals["loss"] = mean_losses(run, states)
    if chosen == "self":
        signals["self"] = self_influence(run, states)
    elif chosen in OF_SCORES:
        signals[chosen] = _of_scores(run, chosen, clean, known, {"method": method, "progress": progress})
    for name, values in signals.items():
        if not bool(values.isfinite().all()):
            raise NonFiniteError(
                message(f"the signal {name!r} is not finite", got="NaN or infinity", cause="a diverged run")
            )
    return Suspects(signal=chosen, score=signals[chosen], signals=signals, **found)


@final
@dataclass(frozen=True)
class _Known:
    """The labels of the examples, if they can be tried: values, the classes, their places among them; else why not."""

    labels: Tensor | None
    classes: list[int]
    places: Tensor | None
    why: str = ""

    @staticmethod
    def of(run: Run, labels: Any, classes: Sequence[int] | None, relabel: Relabel) -> "_Known":
        data, count = run.problem.data, run.num_examples
        given = labels_of(data) if labels is None else torch.as_tensor(labels)
        if given is None:
            if classes is not None or relabel is not with_label:
                raise MismatchError(
                    message(
                        "the labels of the training examples are not known",
                        expected="labels=: one integer for each, since they are not the last part of the samples",
                    )
                )
            return _Known(None, [], None, "no labels to compare: the samples do not end in one integer")
        if given.shape != (count,) or given.is_floating_point():
            raise MismatchError(
                message("labels do not fit the data", expected=f"{count} integers", got=f"shape {list(given.shape)}")
            )
        given = given.to("cpu", torch.int64)
        known = given.unique().tolist() if classes is None else [int(label) for label in classes]
        if classes is None and len(known) > _MOST_CLASSES:
            return _Known(given, [], None, f"{len(known)} distinct labels: give classes= to have all of them tried")
        if len(set(known)) < 2 or len(set(known)) != len(known):
            if classes is not None:
                raise MismatchError(message("nothing to compare", expected="two or more distinct classes", got=known))
            return _Known(given, [], None, "no labels to compare: all examples have the same")
        outside = [label for label in given.unique().tolist() if label not in known]
        if outside:
            raise MismatchError(
                message("a label is not among the classes", expected=f"classes with {outside[:5]}", got=known[:20])
            )
        places = {label: place for place, label in enumerate(known)}
        return _Known(given, known, torch.tensor([places[label] for label in given.tolist()]))


def _suggestions(tried: Candidates, known: _Known) -> dict[str, Tensor]:
    assert known.labels is not None
    assert known.places is not None
    best = tried.losses.argmin(1)
    return {
        "label": known.labels,
        "suggested": torch.tensor(known.classes)[best],
        "confidence": tried.confidence.gather(1, best[:, None])[:, 0],
        "quality": tried.confidence.gather(1, known.places[:, None])[:, 0],
    }


def _of_scores(run: Run, signal: str, clean: Any, known: _Known, options: dict[str, Any]) -> Tensor:
    if signal == "class":
        return _to_own_class(run, clean, known, options)
    if clean is None:
        raise MismatchError(
            message(
                f"signal={signal!r} asks whom an example harms",
                expected="clean=: examples whose labels are right, or an Attribution for them",
                got="clean=None",
            )
        )
    if isinstance(clean, Attribution):
        check_run(run, clean)
        if not torch.equal(clean.train_ids, torch.arange(run.num_examples)):
            raise MismatchError(
                message(
                    "the scores do not cover the training data",
                    expected=f"a row for each of {run.num_examples} examples",
                    got=f"{len(clean.train_ids)} rows",
                )
            )
        scores = clean.total
    else:
        aggregate = "mean" if signal == "harm" else None
        scores = attribute(run, clean, aggregate=aggregate, check=False, **options).values
    return harm(scores) if signal == "harm" else cluster_harm(scores)


def _to_own_class(run: Run, clean: Any, known: _Known, options: dict[str, Any]) -> Tensor:
    queries = run.problem.data if clean is None else clean
    of_queries: Tensor | None = known.labels
    if clean is not None:
        of_queries = None if isinstance(clean, Attribution) else labels_of(clean)
    if known.labels is None or of_queries is None:
        raise UnsupportedError(
            message(
                "signal='class' needs the labels of the queries",
                expected="clean=: a data set of (input, integer label) samples, or None: the training data",
                got=type(clean).__name__ if known.labels is not None else known.why,
            )
        )
    present, places = of_queries.unique(return_inverse=True)
    missing = sorted(set(known.labels.tolist()) - set(present.tolist()))
    if missing:
        raise MismatchError(message("a class has no clean query", expected="queries of every class", got=missing[:8]))
    scores = attribute(run, queries, aggregate=places, check=False, **options).values
    scores = scores / places.bincount()  # sums of unequal classes: means
    return harm_to_own_class(scores, torch.searchsorted(present, known.labels))
