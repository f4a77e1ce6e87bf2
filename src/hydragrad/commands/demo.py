"""The demo: wrong labels among digits, three methods, real retraining, a page; every number is measured here."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from hydragrad.attributing import attribute
from hydragrad.attribution import Attribution, Ranked
from hydragrad.commands.console import console, interactive, say
from hydragrad.errors import HydragradError
from hydragrad.labels import label_of
from hydragrad.report.measures import Found, mean_spearman, precision_recall
from hydragrad.report.pictures import Tile, draw_evidence
from hydragrad.report.tables import plain_table
from hydragrad.reporting import write_report
from hydragrad.retraining.measuring import losses_at
from hydragrad.run import Run
from hydragrad.signals.along import mean_losses
from hydragrad.suspecting import mislabels
from hydragrad.tasks.task import Task
from hydragrad.tasks.training import loader_of, train
from hydragrad.validating import validate
from hydragrad.validation import Validation
from hydragrad.verification import verify

METHODS = ("exact", "gauss-newton", "hessian-free")
REMOVED_SEED = 0
"""Draws the examples that are really removed."""
TILES = 8

READING = """\
time: of scoring all {pairs} pairs, in plain training runs (the check behind the verdict not counted).
agreement: rank correlation with the exact scores over the training images, mean over the {queries} test images.
leave-one-out: {removed} training images (drawn with seed {seed}) were each really left out and the network trained
again; rank correlation of predicted and measured change of the loss, mean over the test images. 1: scores order the
images as retraining does; 0: they know nothing of it. verdict: each answer's own, from a few retrainings."""


@final
@dataclass(frozen=True)
class MethodResult:
    """One row of the demo's table: cost in training runs, correlations with the exact scores and with retraining."""

    method: str
    time: float
    check: float
    agreement: float
    leave_one_out: float
    verdict: str


@final
@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo printed."""

    methods: tuple[MethodResult, ...]
    found_by_loss: Found
    found_by_harm: Found
    query: int
    picture: Path
    page: Path
    seconds: float


def run_demo(out: Path, task: Task, *, removed: int = 20) -> DemoResult:
    """Train ``task`` (8 x 8 images, some labels flipped), attribute, retrain, draw, and say it all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices: threads would mostly wait for each other, and for other programs
    try:
        return _run(out, task, removed)
    finally:
        torch.set_num_threads(threads)


def _run(out: Path, task: Task, removed: int) -> DemoResult:
    began = time.perf_counter()
    assert task.flipped_ids is not None
    removed = min(removed, len(task.train))
    say(
        f"{len(task.train)} handwritten digits, {len(task.flipped_ids)} of them with a wrong label on purpose; "
        f"{len(task.test)} test images; one thread"
    )
    plain = [plain_training_seconds(task)]
    steps_an_epoch = -(-len(task.train) // task.batch_size)
    run = train(task, out / "run", overwrite=True, checkpoint_every=steps_an_epoch)
    say(f"trained: {run.num_steps} steps, {plain[0]:.2f} s without recording; recorded in {out / 'run'}")
    verified = verify(run)
    say(f"replayed: {verified}")
    if not verified:
        raise HydragradError("the recorded run could not be replayed, so nothing can be said about it")
    say(f"attributing {len(task.test)} test images to {len(task.train)} training images, by three methods:")
    scores: dict[str, Attribution] = {}
    for method in METHODS:
        scores[method] = _attributed(run, task, method)
        plain.append(plain_training_seconds(task))  # again, between the methods: other programs come and go
    say(f"retraining {removed} times, each time without one example (seed {REMOVED_SEED})")
    proof = validate(run, scores["exact"], task.test, n=removed, seed=REMOVED_SEED, progress=interactive())
    results = tuple(_compared(scores[method], scores["exact"], proof, statistics.median(plain)) for method in METHODS)
    by_loss, by_harm = _flipped_found(run, task, scores["exact"])
    query, picture = _draw(out / "demo.png", run, task, scores["exact"])
    scores["exact"].save(out / "scores.safetensors")
    proof.save(out / "proof.safetensors")
    page = write_report(
        out / "report.html", run, scores["exact"], task.test, validation=proof,
        suspects=mislabels(run, progress=interactive()), show=task.show, true_labels=task.true_labels,
        title="Why did the network say so?",
    )  # fmt: skip
    seconds = time.perf_counter() - began
    result = DemoResult(results, by_loss, by_harm, query, picture, page, seconds)
    _tell(result, out, task, removed)
    return result


def plain_training_seconds(task: Task, repeats: int = 3) -> float:
    """Median time of the task's loop on batches that lie ready: what the costs are compared with."""
    loader = loader_of(task)
    batches = [batch for _ in range(task.epochs) for batch in loader]

    def once() -> float:
        model = task.build()
        optimizer = task.optimizer(model)
        began = time.perf_counter()
        for batch in batches:
            optimizer.zero_grad()
            task.loss(model, batch).mean().backward()
            optimizer.step()
        return time.perf_counter() - began

    once()  # the first run also sets torch up
    return statistics.median(once() for _ in range(repeats))


def _attributed(run: Run, task: Task, method: str) -> Attribution:
    scores = attribute(run, task.test, method=method, progress=interactive())
    say(f"  {scores.diagnostics.plan}")
    return scores


def _compared(scores: Attribution, exact: Attribution, proof: Validation, plain: float) -> MethodResult:
    about, removed = scores.diagnostics, [item.ids[0] for item in proof.items]
    return MethodResult(
        method=scores.method,
        time=(about.seconds - about.check_seconds) / plain,
        check=about.check_seconds / plain,
        agreement=mean_spearman(scores.values, exact.values),
        leave_one_out=mean_spearman(scores.values[removed], proof.actual),
        verdict=about.verdict,
    )


def _flipped_found(run: Run, task: Task, exact: Attribution) -> tuple[Found, Found]:
    """Among the first tenth of the training examples: by their own loss along the run, and by harm to the test set."""
    assert task.flipped_ids is not None
    first = max(1, round(len(task.train) / 10))
    by_loss = precision_recall(mean_losses(run), task.flipped_ids, first)
    return by_loss, precision_recall(-exact.values.sum(1), task.flipped_ids, first)


def _draw(path: Path, run: Run, task: Task, exact: Attribution) -> tuple[int, Path]:
    """The misclassified test image with the largest loss (if none is misclassified: the largest loss), explained."""
    end = run.trajectory.state(run.num_steps)
    images, labels = (torch.stack(parts) for parts in zip(*(task.test[i] for i in range(len(task.test))), strict=True))
    model = task.build().eval()
    with torch.no_grad():
        predicted = torch.func.functional_call(model, end.params, (images,)).argmax(1)
    losses = losses_at(run, end, task.test)
    wrong = predicted != labels
    query = int((losses if not bool(wrong.any()) else losses.where(wrong, -torch.inf)).argmax())
    verdict = "mistaken for" if bool(wrong[query]) else "rightly read as"
    caption = [
        f"a {int(labels[query])}, {verdict} a {int(predicted[query])}",
        f"test image {query}, loss {losses[query]:.2f}",
    ]
    tiles = [[_tile(task, row) for row in exact.top(query, TILES, largest=largest)] for largest in (True, False)]
    title = "Why did the network say so?"
    return query, draw_evidence(path, images[query].reshape(8, 8), caption, *tiles, title=title)


def _tile(task: Task, row: Ranked) -> Tile:
    assert task.true_labels is not None
    image, given = task.train[row.id][0], label_of(task.train, row.id)
    true = int(task.true_labels[row.id])
    return Tile(image.reshape(8, 8), str(given), row.score, None if given == true else str(true))


def _tell(result: DemoResult, out: Path, task: Task, count: int) -> None:
    rows = [
        (
            row.method,
            f"{row.time:.0f} x",
            f"{row.time / len(task.test):.2f} x",
            f"{row.agreement:.2f}",
            f"{row.leave_one_out:.2f}",
            row.verdict,
        )
        for row in result.methods
    ]
    headers = ("method", "time", "per image", "agreement", "leave-one-out", "verdict")
    console.print()
    console.print(plain_table(headers, rows))
    pairs = f"{len(task.train):,} x {len(task.test):,}"
    say(READING.format(removed=count, seed=REMOVED_SEED, queries=len(task.test), pairs=pairs), "")
    signals = [
        ("own loss, averaged over the run", result.found_by_loss),
        ("harm to the test set (exact scores)", result.found_by_harm),
    ]
    table = [(words, f"{found.precision:.2f}", f"{found.recall:.2f}") for words, found in signals]
    console.print(plain_table(("wrong labels in the worst tenth, by", "precision", "recall"), table))
    of_run, of_scores = f"{out / 'run'} --task {task.name}", f"--scores {out / 'scores.safetensors'}"
    removed = out / "removed.safetensors"
    say(
        "own loss: comes free with a recording. harm: asks what hurts these test images, not which labels are wrong.",
        "",
        f"the page:    {result.page} (open it in a browser: evidence, suspects, proof, checks)",
        f"the picture: {result.picture} (the misclassified test image with the largest loss: {result.query})",
        f"the scores:  {out / 'scores.safetensors'}",
        f"{result.seconds:.0f} s in all",
        "",
        "next, prove the scores (retrains again, and keeps what is done if you stop it):",
        f"  hydragrad validate {of_run} {of_scores} --metric remove --jobs -1 --resume {out / 'retrained'} "
        f"--out {removed}",
        "put that and other queries on a page:",
        f"  hydragrad report {of_run} {of_scores} --validation {removed} --query 3 --query 5 "
        f"--out {out / 'queries.html'}",
        "and find the wrong labels, with suggestions of the right ones:",
        f"  hydragrad mislabels {of_run}",
    )
