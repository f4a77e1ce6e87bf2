"""The queries of a page with the training examples behind them, and all queries together."""

from collections.abc import Sequence

from hydragrad.attribution import Attribution
from hydragrad.errors import MismatchError, message
from hydragrad.report.content import Example, Query
from hydragrad.report.display import Display
from hydragrad.report.samples import number
from hydragrad.report.subject import Said, Subject

WORST = 6
"""Queries that are shown unless others are named."""


def chosen_queries(subject: Subject, named: Sequence[int] | None) -> tuple[list[int], str]:
    """The query ids to show, and by what they were chosen, in words. Raises MismatchError for unknown ones."""
    known = subject.scores.query_ids.tolist()
    if named is not None:
        chosen = list(dict.fromkeys(int(query) for query in named))
        if unknown := [query for query in chosen if query not in known]:
            raise MismatchError(message("no such query", expected=f"query ids from 0 to {max(known)}", got=unknown[:8]))
        return chosen, f"The {len(chosen)} of {len(known)} queries that were asked for."
    if subject.measurement is not None:
        moved = subject.scores.total.abs().sum(0).argsort(descending=True, stable=True)
        chosen = [known[place] for place in moved[:WORST].tolist()]
        return chosen, f"The {len(chosen)} of {len(known)} queries with the largest scores."
    order = subject.values.argsort(descending=True, stable=True).tolist()
    said = subject.said([known[place] for place in order[: 4 * WORST]])
    worst = sorted(order[: 4 * WORST], key=lambda place: not _mistaken(said.get(known[place])))  # stable: by loss
    chosen = [known[place] for place in worst[:WORST]]
    mistakes = sum(_mistaken(said.get(query)) for query in chosen)
    which = "predicted worst: misclassified" if mistakes == len(chosen) else "with the largest loss"
    if 0 < mistakes < len(chosen):
        which = "predicted worst: the misclassified first"
    return chosen, f"The {len(chosen)} of {len(known)} queries {which}, the largest loss first."


def query_of(subject: Subject, display: Display, place: int, said: Said | None, top: int) -> Query:
    """A query with its ``top`` most helpful and most harmful training examples."""
    value = f"{subject.what.removeprefix('the ')} {number(float(subject.values[place]))}"
    name = f"Query {place}"
    if not subject.single:
        members = int((subject.columns.of == place).sum())
        name = f"All {members} queries in one" if subject.columns.count == 1 else f"Group {place} of {members} queries"
    words = value
    if said is not None:
        likely = f"{display.named(said.predicted)} ({said.confidence:.0%})"
        if _mistaken(said):
            words = f"labelled {display.named(said.label)} ({said.own:.0%}), but the model says {likely}; {value}"
        else:
            words = f"labelled {display.named(said.label)}, and the model says {likely}; {value}"
    return Query(
        id=place,
        name=name,
        said=words,
        wrong=_mistaken(said),
        look=display.look(subject.queries, place) if subject.single else None,
        helpful=_ranked(subject.scores, display, place, subject.what, top, True),
        harmful=_ranked(subject.scores, display, place, subject.what, top, False),
    )


def all_queries(subject: Subject, display: Display, top: int) -> Query | None:
    """The mean over all queries as one; None where there is only one."""
    count = len(subject.scores.query_ids)
    if count < 2:
        return None
    mean = subject.scores.averaged()
    what = f"the mean {subject.what.removeprefix('the ')} over all queries"
    total = mean.values[:, 0]
    helping, harming = (int((sign * total > 0).sum()) for sign in (1, -1))
    value = f"{subject.what.removeprefix('the ')} {number(float(subject.values.mean()))}"
    said = (
        f"On the mean of {count:,} queries ({value}) "
        f"{helping:,} training {'groups' if subject.groups is not None else 'examples'} help and {harming:,} do harm."
    )
    helpful, harmful = (_ranked(mean, display, 0, what, top, largest) for largest in (True, False))
    return Query(0, "All queries together", said, False, helpful, harmful)


def _ranked(scores: Attribution, display: Display, query: int, what: str, top: int, largest: bool) -> list[Example]:
    return [display.example(row, what) for row in scores.top(query, top, largest=largest)]


def _mistaken(said: Said | None) -> bool:
    return said is not None and said.predicted != said.label
