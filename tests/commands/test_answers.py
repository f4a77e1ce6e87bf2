"""The command line: what it prints and what it writes."""

import csv
import os
import re
import sys
from pathlib import Path

import pytest
import torch

import hydragrad as hg
from hydragrad.commands import options
from hydragrad.tasks.naming import READY
from tests.children import ended, fork
from tests.commands.running import TASK, run
from tests.report.reading import Read


def test_the_help_names_every_ready_task_and_what_it_trained() -> None:
    assert all(re.search(rf"[(\s]{name}[,)]", options.TASK) for name in READY), options.TASK
    told = " ".join(run("mislabels", "--help").output.split())
    assert "hydragrad train digits-flipped --out runs/flipped" in told


def test_train_records_the_run_of_the_task(folder: Path) -> None:
    printed = run("train", TASK, "--out", "runs/small").output
    assert "Task('small', 20 training and 10 test examples): 2 epochs in batches of 8, seed 0" in printed
    assert "recorded 6 steps in runs/small; mean test loss " in printed
    assert f"next: hydragrad attribute runs/small --task {TASK}" in printed
    refused = run("train", TASK, "--out", "runs/small", code=1)
    assert "overwrite" in refused.output
    assert "6 steps" in run("train", TASK, "--out", "runs/small", "--overwrite").output


def test_a_killed_training_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        taken = iter(range(9))
        monkeypatch.setattr(
            "hydragrad.tasks.training.tqdm.update", lambda *_: os._exit(9) if next(taken) == 5 else None
        )
        run("train", TASK, "--out", "runs/small", "--resume", "--checkpoint-every", "2")

    assert ended(fork(work)) == 9
    printed = run("train", TASK, "--out", "runs/small", "--resume", "--checkpoint-every", "2").output
    # from 2 where the segment up to 4, or the loop's place there, was still being written
    assert re.search(r"gone on from step (4; 0|2; 0|2; 2) recorded steps after it were taken again", printed)
    assert "recorded 6 steps in runs/small" in printed
    refused = run("train", TASK, "--out", "runs/small", "--resume", "--checkpoint-every", "2", code=1)
    assert "is finished" in refused.output


def test_verify_says_whether_the_replay_is_the_run(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "exact: 6 steps replayed bit for bit" in run("verify", str(trained), "-t", TASK).output
    failed = hg.Verification(ok=False, exact=False, steps=2, reasons=("step 2 differs",))
    monkeypatch.setattr("hydragrad.commands.app.verify_run", lambda run: failed)
    printed = run("verify", str(trained), "-t", TASK, code=1).output
    assert "failed: the replay is not the recorded run" in printed
    assert "- step 2 differs" in printed


def test_attribute_shows_and_saves_what_the_library_computes(trained: Path, folder: Path) -> None:
    shown = ("--query", "3", "-q", "0", "--top", "2")
    printed = run("attribute", str(trained), "--task", TASK, "--out", "new/scores.safetensors", *shown).output
    saved = hg.Attribution.load("new/scores.safetensors")
    sys.path.insert(0, str(folder))
    from hydragrad.tasks.naming import resolve_task

    task = resolve_task(TASK)
    expected = hg.attribute(task.load(trained), task.test, block=1, compile=False)
    torch.testing.assert_close(saved.values, expected.values, rtol=1e-4, atol=1e-6)
    assert printed.index("plan: exact, 10 queries") < printed.index("exact: "), "the plan comes first"
    assert f"exact: {saved.diagnostics.verdict}" in printed
    assert "saved 20 x 10 scores: new/scores.safetensors" in printed
    for query in (3, 0):
        for title, largest in (("Helped most", True), ("Harmed most", False)):
            table = printed[printed.index(f"{title}: test example {query}") :]
            rows = [line.strip("│ ").split("│") for line in table.splitlines() if line.startswith("│")][:2]
            cells = [[cell.strip() for cell in row] for row in rows]
            ranked = saved.top(query, 2, largest=largest)
            labels = [str(int(task.train[row.id][1])) for row in ranked]
            assert cells == [
                [str(row.id), f"{row.score:+.4g}", label] for row, label in zip(ranked, labels, strict=True)
            ]


def test_validate_puts_saved_scores_to_the_proof(trained: Path, folder: Path) -> None:
    printed = run("attribute", str(trained), "-t", TASK, "--no-check", "--out", "s").output
    assert f"next: hydragrad validate {trained} --task {TASK} --scores s" in printed
    common = ("validate", str(trained), "-t", TASK, "-s", "s", "--resume", "kept")
    printed = run(*common, "-n", "4", "--seed", "2", "--out", "proof", "--plot", "proof.png").output
    saved = hg.Validation.load("proof")
    assert printed.index("plan: 5 retrainings") < printed.index("exact scores put to the proof by leaving one out")
    assert str(saved) in printed
    assert Path("proof.png").stat().st_size > 1000
    from hydragrad.tasks.naming import resolve_task

    task = resolve_task(TASK)
    expected = hg.validate(task.load(trained), hg.Attribution.load("s"), task.test, n=4, seed=2, progress=False)
    assert torch.equal(saved.actual, expected.actual)
    assert "(5 of them kept from before)" in run(*common, "-n", "4", "--seed", "2").output
    assert "helpful" in run(*common, "--metric", "remove", "-n", "1").output


@pytest.mark.parametrize("smoothed", [False, True])
def test_validate_advises_the_scores_for_the_question(trained: Path, smoothed: bool) -> None:
    from hydragrad.commands import proving

    more = ("--smoothing", "2", "--fraction", "0.25") if smoothed else ()
    run("attribute", str(trained), "-t", TASK, "--no-check", "--out", "s", *more)
    common = ("validate", str(trained), "-t", TASK, "-s", "s", "--resume", "kept", "-n", "4", "--fraction", "0.25")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proving, "_ENOUGH", 2.0)
        single, many = (run(*common, "--metric", metric).output for metric in ("loo", "subset"))
    assert ("without --smoothing" in single) == smoothed
    assert ("--smoothing 8" in many) != smoothed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proving, "_ENOUGH", -2.0)
        assert "advice" not in run(*common, "--metric", "subset").output


def test_mislabels_shows_and_saves_what_the_library_finds(trained: Path, folder: Path) -> None:
    from hydragrad.tasks.naming import resolve_task

    printed = run("mislabels", str(trained), "-t", TASK, "--top", "3", "--out", "new/suspects.csv").output
    found = hg.mislabels(resolve_task(TASK).load(trained), progress=False)
    rows = [line.strip("│ ").split("│") for line in printed.splitlines() if line.startswith("│")]
    for cells, row in zip(rows, found.top(3), strict=True):
        better = "" if row.suggested == row.label else str(row.suggested)
        assert [cell.strip() for cell in cells] == [
            str(row.id), f"{row.score:.4g}", str(row.label), better, f"{row.confidence:.2f}"
        ]  # fmt: skip
    assert f"for {int(found.flagged.sum())} of 20 another label fits better" in printed
    saved = Path("new/suspects.csv").read_text().splitlines()
    assert saved[0] == "id,score,label,suggested,confidence," + ",".join(f"signal_{name}" for name in found.signals)
    assert [int(line.split(",")[0]) for line in saved[1:]] == found.ids.tolist()
    assert float(saved[1].split(",")[1]) == found.top(1)[0].score
    by_class = run("mislabels", str(trained), "-t", TASK, "--signal", "harm").output
    assert "the most suspicious first, by harm" in by_class
    given = ("--signal", "ensemble", "--replays", "2", "--resume", "kept", "--out", "ensemble.csv")
    assert "the most suspicious first, by ensemble" in run("mislabels", str(trained), "-t", TASK, *given).output
    assert len(list(Path("kept").glob("*.safetensors"))) == 2
    loaded = resolve_task(TASK).load(trained)
    expected = hg.mislabels(loaded, signal="ensemble", replays=2, jobs=1, progress=False).top(1)[0]
    with open("ensemble.csv") as file:
        assert float(next(csv.DictReader(file))["signal_ensemble"]) == expected.score


def test_report_shows_what_was_saved(trained: Path) -> None:
    run("attribute", str(trained), "-t", TASK, "--out", "scores")
    run("validate", str(trained), "-t", TASK, "--scores", "scores", "-n", "4", "--out", "proof")
    asked = ("report", str(trained), "-t", TASK, "--scores", "scores", "--validation", "proof")
    printed = run(*asked, "-q", "3", "-q", "7", "--top", "2", "--out", "new/page.html").output
    saved, proof = hg.Attribution.load("scores"), hg.Validation.load("proof")
    assert f"{saved.diagnostics.verdict}; the page: new/page.html (" in printed
    read = Read(Path("new/page.html"))
    assert [article.attributes["data-query"] for article in read.all("article")] == ["3", "7"]
    assert read.tiles("7", "harmful") == [tuple(row) for row in saved.top(7, 2, largest=False)]
    assert str(proof.correlation) in read.one(id="proof").text
    from hydragrad.tasks.naming import resolve_task

    found = hg.mislabels(resolve_task(TASK).load(trained), progress=False)
    shown = [int(e.attributes["data-suspect"]) for e in read.elements if "data-suspect" in e.attributes]
    assert shown == found.ids.tolist()
    run(*asked, "--no-suspects")
    assert "suspects" not in Read(Path("report.html")).ids
    run("train", "small_tasks.py:slower", "--out", "runs/slower")
    asked = ("report", "runs/slower", "-t", "small_tasks.py:slower", "--scores", "scores")
    refused = run(*asked, "--out", "new/page.html", code=1).output
    assert "MismatchError: the scores are not those of this run" in refused
    assert Read(Path("new/page.html")).ids == read.ids, "what was there stays"


def test_known_wrong_labels_are_counted(folder: Path) -> None:
    from hydragrad.tasks.digits import digits

    task = digits(flipped=0.1, train_size=120, test_size=10, epochs=20, batch_size=16)
    Path("flipped.py").write_text(
        "from hydragrad.tasks.digits import digits\n"
        "task = digits(flipped=0.1, train_size=120, test_size=10, epochs=20, batch_size=16)\n"
    )
    found = hg.mislabels(hg.train(task, "runs/flipped"), progress=False)
    hits = len(set(found.ids[:12].tolist()) & set(task.flipped_ids.tolist()))  # type: ignore[union-attr]
    assert hits >= 6
    printed = run("mislabels", "runs/flipped", "-t", "flipped.py:task").output
    assert f"known wrong labels: 12; among the first 12 suspects {hits / 12:.1%} of them" in printed
    assert "true label" in printed


def test_without_a_query_the_whole_test_set_is_shown(trained: Path) -> None:
    printed = run("attribute", str(trained), "-t", TASK, "-m", "hessian-free", "--no-check", "--out", "s").output
    mean = hg.Attribution.load("s").values.mean(1)
    assert "hessian-free: unchecked" in printed
    table = printed[printed.index("Helped most: the mean over 10 test examples") :]
    first = next(line for line in table.splitlines() if line.startswith("│"))
    assert [cell.strip() for cell in first.strip("│").split("│")[:2]] == [
        str(int(mean.argmax())),
        f"{float(mean.max()):+.4g}",
    ]


def test_the_memory_budget_is_heeded(trained: Path) -> None:
    printed = run("attribute", str(trained), "-t", TASK, "--memory", "3").output
    assert "10 queries" in printed
    given = ("--memory", "3MB", "--disk", "1 GB", "--replays", "4")
    assert "10 queries" in run("attribute", str(trained), "-t", TASK, *given).output
    for wrong in ("0", "much", "-1"):
        assert run("attribute", str(trained), "-t", TASK, "--memory", wrong, code=2).output
    assert run("attribute", str(trained), "-t", TASK, "--disk", "much", code=2).output


def test_attribute_smooths(trained: Path, folder: Path) -> None:
    asked = ("--smoothing", "2", "--fraction", "0.25", "--no-check", "--out", "smooth")
    printed = run("attribute", str(trained), "-t", TASK, *asked).output
    assert "2 reweighted run(s)" in printed
    assert "mean over 2 runs without 0.25 of the examples each (seed 0)" in printed
    sys.path.insert(0, str(folder))
    from hydragrad.tasks.naming import resolve_task

    task = resolve_task(TASK)
    expected = hg.attribute(task.load(trained), task.test, smoothing=2, fraction=0.25, check=False)
    torch.testing.assert_close(hg.Attribution.load("smooth").values, expected.values, rtol=1e-4, atol=1e-6)
    assert run("attribute", str(trained), "-t", TASK, "--smoothing", "0", code=2).output


def test_attribute_goes_on_in_a_folder_and_refuses_another_question(trained: Path) -> None:
    asked = ("attribute", str(trained), "-t", TASK, "--no-check", "--resume", "pieces")
    printed = run(*asked, "--out", "first").output
    assert "finished blocks are kept in pieces" in printed
    assert "saved when it is finished" in printed.replace("\n", " ")
    assert "as chosen when this attribution began" in run(*asked, "--out", "second").output.replace("\n", " ")
    assert torch.equal(hg.Attribution.load("first").values, hg.Attribution.load("second").values)
    refused = run(*asked, "--method", "gauss-newton", code=1).output.replace("\n", " ")
    assert "MismatchError: pieces holds an attribution that was begun with another question: method differs" in refused
