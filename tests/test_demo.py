"""The demo, whole, on a few images: what it prints is what it measured."""

import shlex
from pathlib import Path

import matplotlib.image
import pytest
import torch
from typer.testing import CliRunner

import hydragrad as hg
from hydragrad.commands.app import app
from hydragrad.commands.demo import METHODS, DemoResult, plain_training_seconds, run_demo
from hydragrad.report.measures import mean_spearman
from hydragrad.tasks.digits import digits
from hydragrad.tasks.naming import READY
from tests.report.reading import Read


@pytest.fixture(scope="module")
def small() -> hg.Task:
    return digits(flipped=0.1, train_size=120, test_size=20, epochs=12, batch_size=16)


@pytest.fixture(scope="module")
def result(small: hg.Task, tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run_demo(tmp_path_factory.mktemp("demo"), small, removed=4)


def test_what_was_measured_is_what_the_scores_say(small: hg.Task, result: DemoResult) -> None:
    folder = result.picture.parent
    scores = hg.Attribution.load(folder / "scores.safetensors")
    run = small.load(folder / "run")
    assert hg.verify(run).exact
    assert tuple(row.method for row in result.methods) == METHODS
    exact = result.methods[0]
    assert exact.agreement == pytest.approx(1.0)
    assert scores.values.shape == (120, 20)
    # Retrained here again: the four examples of seed 0, one at a time.
    ids = torch.randperm(120, generator=torch.Generator().manual_seed(0))[:4]
    images, labels = (torch.stack(parts) for parts in zip(*(small.test[i] for i in range(20)), strict=True))

    def losses(state: hg.State) -> torch.Tensor:
        logits = torch.func.functional_call(small.build(), state.params, (images,))
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none").detach().double()

    def without(i: int) -> torch.Tensor:
        weights = torch.ones(120)
        weights[i] = 0
        return losses(run.replay(weights=weights)) - losses(run.replay())

    changes = torch.stack([without(i) for i in ids.tolist()])
    assert exact.leave_one_out == pytest.approx(mean_spearman(scores.values[ids], changes), abs=0.02)
    # The suspects by harm, counted here.
    worst = scores.values.sum(1).argsort()[:12]
    hits = sum(int(i) in set(small.flipped_ids.tolist()) for i in worst)  # type: ignore[union-attr]
    assert result.found_by_harm == (hits / 12, hits / 12)
    assert result.found_by_loss.precision > 0.5, "a tenth would be chance"


def test_the_picture_explains_the_worst_mistake(small: hg.Task, result: DemoResult) -> None:
    pixels = matplotlib.image.imread(result.picture)
    assert pixels.shape[:2] == (613, 1653), "4.72 x 12.72 inches of 130 pixels"
    assert pixels[..., :3].std() > 0.1
    assert result.picture.stat().st_size < 200_000
    run = small.load(result.picture.parent / "run")
    params = run.trajectory.state(run.num_steps).params
    images, labels = (torch.stack(parts) for parts in zip(*(small.test[i] for i in range(20)), strict=True))
    logits = torch.func.functional_call(small.build(), params, (images,))
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    wrong = logits.argmax(1) != labels
    assert bool(wrong.any())
    assert result.query == int(losses.where(wrong, -1.0).argmax())


def test_the_page_shows_what_was_measured(result: DemoResult) -> None:
    folder = result.page.parent
    read, scores = Read(result.page), hg.Attribution.load(folder / "scores.safetensors")
    assert {"verdict", "queries", "overall", "suspects", "proof", "checks", "run"} <= set(read.ids)
    assert read.all("article")[0].attributes["data-query"] == str(result.query), "the worst mistake comes first"
    assert read.tiles(str(result.query), "helpful") == [tuple(row) for row in scores.top(result.query, 8)]
    assert str(hg.Validation.load(folder / "proof.safetensors").correlation) in read.one(id="proof").text


def test_the_commands_it_ends_with_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    small = digits(flipped=0.1, train_size=60, test_size=8, epochs=2)
    monkeypatch.setitem(READY, "digits-flipped", lambda: small)
    sizes = ["--train-size", "60", "--test-size", "8", "--epochs", "2", "--removed", "3"]
    lines = CliRunner().invoke(app, ["demo", "--out", "shown", *sizes]).output.splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("  hydragrad ")]
    assert [command[0] for command in commands] == ["validate", "report", "mislabels"]
    for command in commands:
        result = CliRunner().invoke(app, [word if word != "-1" else "1" for word in command])
        assert result.exit_code == 0, result.output
    articles = Read(Path("shown/queries.html")).all("article")
    assert [article.attributes["data-query"] for article in articles] == ["3", "5"]


def test_times_are_ratios_to_the_plain_loop(small: hg.Task, result: DemoResult) -> None:
    assert plain_training_seconds(small, repeats=1) > 0
    assert all(0 < row.time < 1e4 for row in result.methods)


def test_the_command_prints_table_words_and_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    sizes = ["--train-size", "60", "--test-size", "6", "--epochs", "2", "--removed", "3"]
    first, done = [CliRunner().invoke(app, ["demo", "--out", "pictures", *sizes]) for _ in range(2)]
    assert first.exit_code == done.exit_code == 0, "a second time it replaces what it wrote"
    assert "60 handwritten digits, 6 of them with a wrong label on purpose; 6 test images" in done.output
    assert "exact: 2 steps replayed bit for bit" in done.output
    for words in (*METHODS, "leave-one-out", "3 training images (drawn with seed 0)", "precision"):
        assert words in done.output
    assert "disagrees" not in done.output, "every engine that was tried computes the same"
    assert "the picture: pictures/demo.png" in done.output
    assert "hydragrad validate pictures/run --task digits-flipped --scores pictures/scores.safetensors" in done.output
    assert Path("pictures/demo.png").is_file()
    assert Path("pictures/scores.safetensors").is_file()
