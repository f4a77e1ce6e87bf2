"""The verb: gather what is known of some scores, and write the page."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hydragrad.attribution import Attribution
from hydragrad.errors import MismatchError, message
from hydragrad.files import path_of, write_atomically
from hydragrad.fitting import check_question, columns_of, groups_of
from hydragrad.report.charts import histogram
from hydragrad.report.content import Page
from hydragrad.report.display import Display
from hydragrad.report.evidence import all_queries, chosen_queries, query_of
from hydragrad.report.facts import charts_of, checks_of, facts_of
from hydragrad.report.overview import SUSPECTS, heat_by_label, suspects_note, suspicious
from hydragrad.report.page import render
from hydragrad.report.proof import proof_of
from hydragrad.report.samples import Show, image_side
from hydragrad.report.subject import Subject
from hydragrad.run import Run
from hydragrad.suspects import Suspects
from hydragrad.validation import Validation


def write_report(
    path: str | Path,
    run: Run,
    scores: Attribution,
    queries: Any,
    *,
    query: Sequence[int] | None = None,
    top: int = 8,
    validation: Validation | Sequence[Validation] | None = None,
    suspects: Suspects | None = None,
    show: Show | None = None,
    names: Sequence[str] | None = None,
    true_labels: Tensor | None = None,
    measurement: Callable[[nn.Module, Any], Tensor] | None = None,
    aggregate: str | Tensor | Sequence[int] | None = None,
    groups: Tensor | Sequence[int] | None = None,
    step: int | None = None,
    title: str = "What made the model do this?",
) -> Path:
    """Write one self-contained HTML page of what ``scores`` say of ``run``; returns its path.

    It shows the verdict with its reasons; for each query (``query``: query ids; default: the six worst predicted, or
    those with the largest scores where something else than the loss was measured) the ``top`` most helpful and most
    harmful training examples,

        score[i, j] = how much m_j rises without example i        (to first order),

    and those for all queries together; who moves whom by label; ``suspects`` (of ``mislabels``) and ``validation``
    (proofs by retraining) if given; cost, checks, the run. Inputs [1 | 3, h, w] are drawn, strings printed, other
    inputs tabled; ``show(sample) -> image or text`` decides otherwise. ``names``: of the labels 0, 1, ...;
    ``true_labels`` [N], where they are known. ``queries``, ``measurement``, ``aggregate``, ``groups``, ``step``: as
    they were given to ``attribute``. Needs jinja2. Raises MismatchError, NonFiniteError, UnsupportedError, StoreError;
    a file that was there stays whole.

    Example: ``hydragrad.write_report("report.html", run, scores, test_set)``.
    """
    proofs = [] if validation is None else [validation] if isinstance(validation, Validation) else list(validation)
    columns, of_groups = columns_of(scores, queries, aggregate), groups_of(run, scores, groups)
    until = run.num_steps if step is None else step
    check_question(run, scores, queries, columns, measurement=measurement, groups=groups, step=until)
    for proof in proofs:
        _check_proof(scores, proof)
    if top < 1:
        raise MismatchError(message("nothing to show", expected="top of at least 1", got=top))
    subject = Subject(run, scores, queries, columns, of_groups, measurement, step)
    chosen, how = chosen_queries(subject, query)
    images = 2 * top * (len(chosen) + 1) + len(chosen) + SUSPECTS
    display = Display(run.problem.data, of_groups, show, names, true_labels, image_side(images))
    said = subject.said(chosen)
    page = Page(
        title=title,
        summary=_summary(subject),
        verdict=scores.diagnostics.verdict,
        reasons=scores.diagnostics.reasons,
        queries=[query_of(subject, display, place, said.get(place), top) for place in chosen],
        chosen=how,
        what=subject.what,
        overall=all_queries(subject, display, top),
        histogram=histogram(scores.total.flatten()),
        by_class=heat_by_label(subject, display),
        suspects=suspicious(suspects, display),
        suspects_note=suspects_note(suspects),
        proofs=[proof_of(proof) for proof in proofs],
        facts=facts_of(run),
        checks=checks_of(scores.diagnostics),
        charts=charts_of(scores.diagnostics),
    )
    write_atomically(path_of(path), render(page).encode())
    return Path(path)


def _summary(subject: Subject) -> str:
    rows, columns = subject.scores.total.shape
    what = "training examples" if subject.groups is None else "groups of training examples"
    return (
        f"{rows:,} {what} of a recorded run of {subject.run.num_steps:,} steps, scored for {columns:,} "
        f"{'queries' if subject.single else 'combinations of queries'} by {subject.scores.method}."
    )


def _check_proof(scores: Attribution, proof: Validation) -> None:
    if scores.run and proof.run and scores.run != proof.run:
        raise MismatchError(
            message(
                "a validation is not of this run",
                expected="a validation of the scores that are shown",
                got=f"{len(proof.items)} retrainings of a run with other steps",
                remedy="validate these scores: hydragrad.validate(run, scores, queries)",
            )
        )
    if proof.query_ids.tolist() != scores.query_ids.tolist():
        raise MismatchError(
            message(
                "a validation is not of these queries",
                expected=f"{len(scores.query_ids)} queries, as the scores have",
                got=f"{len(proof.query_ids)}",
                remedy="validate these scores: hydragrad.validate(run, scores, queries)",
            )
        )
