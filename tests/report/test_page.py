"""The page: what it shows is what was computed, what it does not know it leaves out, and nobody's text is markup."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hydragrad as hg
from hydragrad.diagnostics import Smoothing
from hydragrad.report.content import VERDICTS
from hydragrad.report.samples import number
from tests.report.conftest import CLASSES, M, N, make
from tests.report.reading import Read


def everything(page: Path, run: hg.Run, scores: hg.Attribution, task: hg.Task, **options: Any) -> Read:
    return Read(hg.write_report(page, run, scores, task.test, **options))


def test_the_scores_shown_are_those_of_top(page: Path, run: hg.Run, scores: hg.Attribution, task: hg.Task) -> None:
    read = everything(page, run, scores, task, query=[4, 0], top=5)
    assert [article.attributes["data-query"] for article in read.all("article")] == ["4", "0"]
    for kind, largest in (("helpful", True), ("harmful", False)):
        for query in (4, 0):
            assert read.tiles(str(query), kind) == [tuple(row) for row in scores.top(query, 5, largest=largest)]
        mean = scores.values.mean(1)
        expected = mean.argsort(descending=largest, stable=True)[:5]
        assert read.tiles("all", kind) == [(int(i), float(mean[i])) for i in expected]
    for tile in read.all("li", data_kind="helpful"):
        score = float(tile.attributes["data-score"])
        assert f"{'+' if score >= 0 else ''}{number(score)}" in tile.text
        label = int(task.train[int(tile.attributes["data-example"])][1])
        assert f"label {label}" in tile.text
        (image,) = [e for e in read.all("img") if any(parent is tile for parent in e.parents)]
        words = f"removing it would {'raise' if score >= 0 else 'lower'} "
        assert words in image.attributes["alt"]
        assert image.attributes["alt"].endswith(f"by about {number(abs(score))}")


def test_the_worst_predicted_queries_come_first_with_what_the_model_says(
    page: Path, run: hg.Run, scores: hg.Attribution, task: hg.Task
) -> None:
    params = run.trajectory.state(run.num_steps).params
    images, labels = task.test.tensors
    logits = torch.func.functional_call(task.build(), params, (images,))
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    p, wrong = logits.softmax(1), logits.argmax(1) != labels
    assert 0 < int(wrong.sum()) < M, "some of each"
    expected = sorted(range(M), key=lambda j: (not wrong[j], -float(losses[j])))[:6]
    read = everything(page, run, scores, task)
    articles = read.all("article")
    assert [int(article.attributes["data-query"]) for article in articles] == expected
    for article, j in zip(articles, expected, strict=True):
        said, own = int(logits[j].argmax()), int(labels[j])
        assert f"the model says {said} ({float(p[j, said]):.0%})" in article.text
        assert f"labelled {own}" in article.text
        assert f"loss {number(float(losses[j]))}" in article.text
        assert ("but the model says" in article.text) == bool(wrong[j])
    mistakes = int(wrong[expected].sum())
    assert ("misclassified" in read.one(id="queries").text) == (mistakes > 0)


def test_every_part_is_there_when_it_is_known(
    page: Path, run: hg.Run, scores: hg.Attribution, task: hg.Task, proof: hg.Validation, suspects: hg.Suspects
) -> None:
    true = task.train.tensors[1].clone()
    true[suspects.top(1)[0].id] += 7
    read = everything(page, run, scores, task, validation=proof, suspects=suspects, true_labels=true)
    assert [i for i in read.ids if not i.endswith("-title")] == [
        "verdict", "queries", "overall", "suspects", "proof", "checks", "run"
    ]  # fmt: skip
    shown = [int(e.attributes["data-suspect"]) for e in read.elements if "data-suspect" in e.attributes]
    assert shown == suspects.ids[:20].tolist()
    first = read.one(data_suspect=str(suspects.top(1)[0].id)).text
    assert f"truly {suspects.top(1)[0].label + 7}" in first  # type: ignore[operator]
    assert str(proof.correlation) in read.one(id="proof").text
    dots = [mark for mark in read.all("circle") if mark.within(id="proof")]
    assert len(dots) == 5 * M
    about, text = scores.diagnostics, read.one(id="checks").text
    for words in (about.method, f"{about.seconds:.1f} s", f"{about.ratio:.1f} ×", number(about.growth)):
        assert words in text
    assert f"{about.finite_difference_error:.2f}" in text
    assert str(about.range) in text
    drifted = replace(about, drift=1e-3, drift_by_checkpoint=((4, 1e-6), (8, 1e-3)), nondeterminism="a kernel")
    drifted = replace(drifted, smoothing=Smoothing(7, 0.1, 0.2, subsets=8, error=0.4, correlation=0.83))
    text = everything(page, run, replace(scores, diagnostics=drifted), task).one(id="checks").text
    assert "Drift by checkpoint: from 1.00e−06 to 0.00100" in text
    assert "a kernel" in text
    assert "7 runs" in text
    assert "0.83 of predicted and real changes when 8 other subsets are removed" in text
    text = read.one(id="run").text
    for words in (f"SGD lr 0.2, momentum 0.5, 12 in 3 pass(es), batches of 10, {N} examples").split(", "):
        assert words in text
    assert run.trajectory.manifest.torch in text
    assert str(run.trajectory.folder) in text


def test_what_is_not_known_is_left_out(page: Path, run: hg.Run, scores: hg.Attribution, task: hg.Task) -> None:
    read = everything(page, run, scores, task)
    assert not {"suspects", "proof"} & set(read.ids)
    assert not any("#proof" in link.attributes["href"] for link in read.all("a"))
    assert "wrong: is" not in page.read_text()
    one = hg.attribute(run, task.test, aggregate="mean", check=False, compile=False, progress=False)
    read = everything(page, run, one, task, aggregate="mean")
    assert "overall" not in read.ids
    assert "All 9 queries in one" in read.one("article").text
    assert not [image for image in read.all("img") if "Query" in image.attributes["alt"]], "no query to be seen"
    assert read.one(id="verdict").text.startswith(f"unchecked {VERDICTS['unchecked']}")
    (growth,) = [svg for svg in read.all("svg") if svg.within(id="checks")]
    assert growth.attributes["aria-label"].startswith("Growth by step"), "a ladder was not climbed, nothing drifted"
    read = everything(page, run, scores, task, query=[])
    assert "queries" not in read.ids
    assert "overall" in read.ids


def test_groups_measurements_and_steps(page: Path, run: hg.Run, task: hg.Task) -> None:
    groups = torch.arange(N) % 4
    quiet: dict[str, Any] = {"check": False, "compile": False, "progress": False}
    grouped = hg.attribute(run, task.test, groups=groups, **quiet)
    read = everything(page, run, grouped, task, groups=groups, top=4, query=[1])
    assert read.tiles("1", "helpful") == [tuple(row) for row in grouped.top(1, 4)]
    assert "group 2: 10 examples" in read.one("article").text

    def first_logit(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return model(batch[0])[:, 0]

    measured = hg.attribute(run, task.test, measurement=first_logit, step=4, **quiet)
    read = everything(page, run, measured, task, measurement=first_logit, step=4)
    moved = measured.values.abs().sum(0).argsort(descending=True, stable=True)[:6].tolist()
    assert [int(article.attributes["data-query"]) for article in read.all("article")] == moved
    logits = torch.func.functional_call(task.build(), run.replay(until=4).params, (task.test.tensors[0],))
    assert f"measurement {number(float(logits[moved[0], 0]))}" in read.all("article")[0].text
    assert "the measurement would rise" in read.one(id="queries").text


@pytest.mark.parametrize("verdict", list(VERDICTS))
def test_the_verdict_comes_first_with_its_reasons(
    verdict: str, page: Path, run: hg.Run, scores: hg.Attribution, task: hg.Task
) -> None:
    reasons = ("one <reason>", "another")
    judged = replace(scores, diagnostics=replace(scores.diagnostics, verdict=verdict, reasons=reasons))
    read = everything(page, run, judged, task)
    main = read.one("main")
    assert main.text.startswith(f"{verdict} {VERDICTS[verdict]} one <reason> another")


def test_nobodys_text_is_markup(page: Path, run: hg.Run, scores: hg.Attribution, task: hg.Task) -> None:
    bad = '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;{{ 7 * 7 }}'
    clean = everything(page, run, scores, task, show=lambda sample: "plain", query=[1])
    tags = [element.tag for element in clean.elements]
    hurt = replace(scores, diagnostics=replace(scores.diagnostics, reasons=(*scores.diagnostics.reasons[:-1], bad)))
    names = [f"{k}{bad}" for k in range(CLASSES)]
    read = everything(page, run, hurt, task, show=lambda sample: bad, names=names, title=bad, query=[1])
    assert [element.tag for element in read.elements] == tags, "not one element more"
    assert all(not name.startswith("on") for element in read.elements for name in element.attributes)
    assert read.all("title")[0].text == read.one("h1").text == bad
    assert read.one("article").text.count(bad) >= 17
    assert bad in read.one(id="verdict").text


def test_the_page_needs_nothing_and_can_be_read_by_all(
    page: Path, run: hg.Run, scores: hg.Attribution, task: hg.Task, proof: hg.Validation, suspects: hg.Suspects
) -> None:
    read = everything(page, run, scores, task, validation=proof, suspects=suspects)
    for element in read.elements:
        assert element.tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href"):
            if name in element.attributes:
                assert element.attributes[name].startswith(("data:image/png;base64,", "#"))
    assert "url(" not in page.read_text()
    assert "@import" not in page.read_text()
    assert len(read.ids) == len(set(read.ids))
    assert {link.attributes["href"][1:] for link in read.all("a")} <= set(read.ids)
    named = {element.attributes.get("aria-labelledby") for element in read.elements} - {None}
    assert named <= set(read.ids)
    assert len(read.all("img")) > 100
    assert all(image.attributes.get("alt") for image in read.all("img"))
    assert len(read.all("svg")) == 5
    assert all(svg.attributes["role"] == "img" and svg.attributes["aria-label"] for svg in read.all("svg"))
    assert all(cell.attributes.get("scope") in ("row", "col") for cell in read.all("th"))
    assert read.one("html").attributes["lang"] == "en"
    assert "width=device-width" in read.one("meta", name="viewport").attributes["content"]


def test_a_hundred_queries_of_28_pixels_stay_light(page: Path, tmp_path: Path) -> None:
    task = make(side=28, train=60, test=100)
    run = hg.train(task, tmp_path / "run")
    values = torch.randn(60, 100, generator=torch.Generator().manual_seed(0))
    about = hg.Diagnostics("exact", 1.0, 0.0, 1.0, 0.0, 1.0, "")
    scores = hg.Attribution(values, torch.arange(60), torch.arange(100), "exact", about)
    read = everything(page, run, scores, task, query=range(100))
    assert len(read.all("article")) == 100
    assert len(read.all("img")) == 100 * 17 + 16
    assert page.stat().st_size < 3e6, "noise, which compresses worst"


def test_the_same_page_from_the_same_answer(page: Path, run: hg.Run, scores: hg.Attribution, task: hg.Task) -> None:
    random, model = torch.get_rng_state(), run.problem.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    everything(page, run, scores, task)
    first = page.read_bytes()
    everything(page, run, scores, task)
    assert page.read_bytes() == first
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_does_not_belong_together_is_refused_and_the_old_page_stays(
    page: Path, run: hg.Run, scores: hg.Attribution, task: hg.Task, proof: hg.Validation, tmp_path: Path
) -> None:
    page.write_text("old")
    other_task = replace(task, seed=1)
    other = hg.train(other_task, tmp_path / "other")
    foreign = replace(proof, run="another")

    def refused(match: str, *arguments: Any, **options: Any) -> None:
        given: Any = arguments or (run, scores, task.test)
        with pytest.raises(hg.MismatchError, match=match):
            hg.write_report(page, *given, **options)

    refused("not those of this run", other, scores, task.test)
    refused("not those of these queries", run, scores, task.train)
    refused("no such query", query=[3, 9999])
    refused("top of at least 1", top=0)
    refused("a validation is not of this run", validation=foreign)
    refused("a validation is not of these queries", validation=replace(proof, query_ids=proof.query_ids + 1))
    refused("cannot be shown.*ZeroDivisionError", show=lambda sample: 1 / 0)
    refused("cannot be shown.*not an image", show=lambda sample: torch.zeros(3))
    refused("cannot be shown.*int", show=lambda sample: 3)
    with pytest.raises(hg.NonFiniteError, match="not finite"):
        hg.write_report(page, run, replace(scores, values=scores.values * torch.nan), task.test)
    with pytest.raises(hg.StoreError, match="cannot write"):
        hg.write_report(page / "below", run, scores, task.test)
    assert page.read_text() == "old"
    assert [path.name for path in page.parent.iterdir() if "tmp" in path.name] == []
