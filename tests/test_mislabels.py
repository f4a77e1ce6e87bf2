"""Suspects: every signal against its definition written out; flipped labels of real data are found."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hydragrad as hg
from hydragrad.report.measures import average_ranks, precision_recall
from hydragrad.signals.along import Candidates, stored_along
from hydragrad.signals.probabilities import PLAIN
from hydragrad.tasks.digits import digits
from tests.tasks.small import make_task
from tests.tolerances import UPDATE, assert_close
from tests.trajectory.loops import CLASSES, losses, make_data

TASK = make_task()
POINTS, LABELS = make_data().tensors
QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> hg.Run:
    return hg.train(TASK, tmp_path_factory.mktemp("mislabels") / "run", checkpoint_every=4)


@pytest.fixture(scope="module")
def models(run: hg.Run) -> list[nn.Module]:
    """The networks at the stored steps, the untrained one left out."""
    found = []
    for step in (4, 8, 10):
        model = TASK.build()
        model.load_state_dict(run.trajectory.state(step).params)
        found.append(model)
    return found


@pytest.fixture(scope="module")
def found(run: hg.Run) -> hg.Suspects:
    return hg.mislabels(run, **QUIET)


def test_signals_are_what_they_are_defined_to_be(found: hg.Suspects, models: list[nn.Module]) -> None:
    with torch.no_grad():
        logits = torch.stack([model(POINTS) for model in models])
    p, target = logits.softmax(2), F.one_hot(LABELS, CLASSES)
    own = (p * target).sum(2)
    rival = p.masked_fill(target.bool(), -1.0).max(2).values
    by_hand = {
        "loss": -own.log().mean(0),
        "el2n": (p - target).norm(dim=2).mean(0),
        "margin": (rival - own).mean(0),
        "doubt": 1 - own.mean(0),
        "late": 1 - own[1:].mean(0),  # of steps 4, 8 and 10 the last two are in the second half
    }
    for name, expected in by_hand.items():
        assert_close(found.signals[name], expected, {torch.float32: 1e-5})
    three = [average_ranks(by_hand[name]) for name in ("el2n", "margin", "doubt")]
    assert_close(found.signals["combined"], sum(three) / 66, {torch.float64: 1e-12})  # type: ignore[arg-type]
    assert found.signal == "el2n"
    assert torch.equal(found.score, found.signals["el2n"])
    mean = -logits.log_softmax(2).mean(0)
    assert torch.equal(found.suggested, mean.argmin(1))  # type: ignore[arg-type]
    assert torch.equal(found.label, LABELS)  # type: ignore[arg-type]
    best = p.mean(0).gather(1, mean.argmin(1)[:, None])[:, 0]
    assert_close(found.confidence, best, {torch.float32: 1e-5})  # type: ignore[arg-type]
    assert_close(found.quality, own.mean(0), {torch.float32: 1e-5})  # type: ignore[arg-type]


def test_the_table_is_ranked(found: hg.Suspects, run: hg.Run) -> None:
    order = found.score.argsort(descending=True).tolist()
    assert found.ids.tolist() == order
    assert [row.id for row in found.top(5)] == order[:5]
    row = found.top(1)[0]
    assert row == (
        order[0],
        int(LABELS[order[0]]),
        int(found.suggested[order[0]]),  # type: ignore[index]
        float(found.score[order[0]]),
        float(found.confidence[order[0]]),  # type: ignore[index]
    )
    assert len(found.top(100)) == len(found) == 22
    table = found.to_pandas()
    assert table.index.tolist() == order
    assert table.loc[7, "signal_doubt"] == float(found.signals["doubt"][7])
    assert f"example {order[0]}: score {row.score:.3f}, label {row.label}" in str(found)
    assert "... and 12 more" in str(found)
    other = hg.mislabels(run, signal="loss", **QUIET)
    assert torch.equal(other.score, other.signals["loss"])


def test_cleanlabs_table(found: hg.Suspects) -> None:
    table = found.to_cleanlab()
    assert table.columns.tolist() == ["is_label_issue", "label_quality", "given_label", "predicted_label"]
    assert table.index.tolist() == list(range(22))
    assert table["given_label"].tolist() == LABELS.tolist()
    assert table["predicted_label"].tolist() == found.suggested.tolist()  # type: ignore[union-attr]
    assert table["is_label_issue"].tolist() == (found.suggested != LABELS).tolist()  # type: ignore[union-attr]
    assert bool(table["label_quality"].between(0, 1).all())
    quality, issues = torch.tensor(table["label_quality"].tolist()), found.flagged
    assert 0 < int(issues.sum()) < 22
    assert float(quality[issues].mean()) < float(quality[~issues].mean()), "lower: worse"
    doubtful = replace(found, signal="doubt", score=found.signals["doubt"]).to_cleanlab()
    assert doubtful["label_quality"].tolist() == pytest.approx(found.quality.tolist())  # type: ignore[union-attr]


@pytest.mark.parametrize("signal", ["el2n", "margin", "doubt", "late", "combined", "ensemble", "loss", "self", "class"])
def test_cleanlabs_table_is_in_the_order_of_the_chosen_signal(run: hg.Run, signal: str) -> None:
    found = hg.mislabels(run, signal=signal, **QUIET)
    quality = torch.tensor(found.to_cleanlab()["label_quality"].to_numpy())
    assert 0 <= float(quality.min()) < float(quality.max()) <= 1
    ordered = quality[found.ids]
    assert bool((ordered.diff() >= 0).all()), "the most suspicious first: the least quality first"
    assert len(quality.unique()) == len(found.score.unique())


def test_an_examples_own_gradients(run: hg.Run, models: list[nn.Module]) -> None:
    expected = torch.zeros(22)
    for model in models:
        for i in range(22):
            model.zero_grad()
            losses(model, (POINTS[i : i + 1], LABELS[i : i + 1])).sum().backward()
            expected[i] += sum(float(p.grad.square().sum()) for p in model.parameters()) / 3  # type: ignore[union-attr]
    assert_close(hg.mislabels(run, signal="self", **QUIET).score, expected, {torch.float32: 1e-5})


def test_harm_to_clean_queries_and_to_the_own_class(run: hg.Run) -> None:
    clean = TensorDataset(POINTS[:9] + 0.1, LABELS[:9])
    assert set(LABELS[:9].tolist()) == {0, 1, 2}
    scores = hg.attribute(run, clean, check=False, compile=False, progress=False)
    mean = -scores.values.mean(1)
    for given in (clean, scores):
        assert_close(hg.mislabels(run, signal="harm", clean=given, **QUIET).score, mean, {torch.float32: 1e-4})
    own = torch.stack([-scores.values[i, LABELS[:9] == LABELS[i]].mean() for i in range(22)])
    assert_close(hg.mislabels(run, signal="class", clean=clean, **QUIET).score, own, {torch.float32: 1e-4})
    whole = hg.attribute(run, TASK.train, check=False, compile=False, progress=False).values
    own = torch.stack([-whole[i, LABELS[i] == LABELS].mean() for i in range(22)])
    assert_close(hg.mislabels(run, signal="class", **QUIET).score, own, {torch.float32: 1e-4})


def test_clusters_of_contributions(run: hg.Run) -> None:
    """Three clear directions of contributions: the harmful one comes first, within it the most harmful."""
    scores = hg.attribute(run, TASK.test, check=False, compile=False, progress=False)
    direction = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 0]])
    kind = torch.arange(22) % 3
    size = 1 + torch.arange(22) / 22
    made = replace(scores, values=direction[kind] * size[:, None])
    from hydragrad.signals.by_scores import cluster_harm

    found = cluster_harm(made.values, clusters=3)
    order = found.argsort(descending=True).tolist()
    assert {int(kind[i]) for i in order[:7]} == {2}
    assert order[0] == 20, "the largest of the harmful"
    ranked = hg.mislabels(run, signal="cluster", clean=made, **QUIET)
    assert int(kind[ranked.ids[0]]) == 2


def test_states_are_thinned_evenly(run: hg.Run, tmp_path: Path) -> None:
    assert stored_along(run) == [4, 8, 10]
    assert stored_along(run, 2) == [4, 10]
    assert stored_along(run, 1) == [10]
    last = hg.mislabels(run, states=1, **QUIET)
    model = TASK.build()
    model.load_state_dict(run.trajectory.state(10).params)
    with torch.no_grad():
        assert_close(last.signals["loss"], losses(model, (POINTS, LABELS)), UPDATE)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_flipped_digits_are_found(optimizer: str, tmp_path: Path) -> None:
    """Means over four seeds as measured: AUROC .999 and recall .957 with SGD, .9985 and .948 with AdamW."""
    areas, recalls, right = [], [], []
    for seed in (0, 1):
        task = digits(flipped=0.1, optimizer=optimizer, seed=seed, flip_seed=seed)
        run = hg.train(task, tmp_path / f"run{seed}", checkpoint_every=23)
        found = hg.mislabels(run, **QUIET)
        assert task.flipped_ids is not None
        wrong = torch.zeros(1437, dtype=torch.bool)
        wrong[task.flipped_ids] = True
        pairs = found.score[wrong][:, None] - found.score[~wrong][None]
        areas.append(float((pairs > 0).double().mean()))
        recalls.append(precision_recall(found.score, task.flipped_ids, len(task.flipped_ids)).recall)
        right.append(float((found.suggested == task.true_labels)[wrong].double().mean()))  # type: ignore[union-attr]
    assert sum(areas) / 2 > 0.997
    assert sum(recalls) / 2 > 0.93
    assert sum(right) / 2 > 0.9


@pytest.mark.slow
def test_relabelling_the_suspects_by_default(tmp_path: Path) -> None:
    task = digits(flipped=0.1, train_size=300, test_size=60, epochs=8, momentum=0.0, batch_size=16)
    run = hg.train(task, tmp_path / "run", checkpoint_every=19)
    scores = hg.attribute(run, task.test, check=False, compile=False, progress=False)
    proof = hg.validate(run, scores, task.test, metric="relabel", n=5, **QUIET)
    found = hg.mislabels(run, **QUIET)
    expected = [row for row in found.top(300) if row.suggested != row.label][:5]
    assert [(item.ids[0], item.label) for item in proof.items] == [(row.id, row.suggested) for row in expected]
    assert task.true_labels is not None
    right = [k for k, row in enumerate(expected) if row.suggested == int(task.true_labels[row.id])]
    assert len(right) >= 4
    assert float(proof.actual[right].mean()) < 0, "the right labels lower the test loss"


# --- other kinds of samples ---------------------------------------------------------------------------------------


def squared(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0])[:, 0] - batch[1]).square()


def test_regression_has_losses_but_no_labels(tmp_path: Path) -> None:
    data = TensorDataset(POINTS, POINTS[:, 0])
    run = hg.train(replace(TASK, loss=squared, train=data), tmp_path / "run")
    found = hg.mislabels(run, **QUIET)
    assert found.signal == "loss"
    assert found.suggested is None
    assert found.top(1)[0][1:3] == (None, None)
    assert "no labels to compare" in str(found)
    assert found.to_pandas().columns.tolist() == ["score", "signal_loss"]
    with pytest.raises(hg.UnsupportedError, match=r"no label issues without labels.*do not end in one integer"):
        found.to_cleanlab()
    with pytest.raises(hg.UnsupportedError, match=r"compares labels, and there are none.*signal='loss'"):
        hg.mislabels(run, signal="el2n", **QUIET)
    assert hg.mislabels(run, signal="self", **QUIET).signal == "self"
    with pytest.raises(hg.UnsupportedError, match="needs the labels of the queries"):
        hg.mislabels(run, signal="class", **QUIET)


class Tokens(nn.Module):
    """Predicts each token of a sequence from the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)


def token_losses(model: nn.Module, batch: Any) -> Tensor:
    """[b, L] of sequences that end in a label."""
    return F.cross_entropy(model(batch[:, :-1]).transpose(1, 2), batch[:, 1:], reduction="none")


def with_last(sample: Tensor, label: int) -> Tensor:
    return torch.cat([sample[:-1], torch.tensor([label])])


def test_tokens_by_their_losses_or_with_labels_told(tmp_path: Path) -> None:
    tokens = torch.randint(0, 7, (20, 5))
    tokens[:, -1] = 5 + (tokens[:, -2] > 3).long()
    tokens[4, -1] = 11 - tokens[4, -1]
    rows = [tokens[i] for i in range(20)]
    task = hg.Task(
        "tokens",
        model=Tokens,
        loss=token_losses,
        train=rows,
        test=rows[:2],
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1.0),
        batch_size=5,
        epochs=10,
    )
    run = hg.train(task, tmp_path / "run", checkpoint_every=10)
    plain = hg.mislabels(run, **QUIET)
    assert (plain.signal, plain.suggested) == ("loss", None)
    model = task.build()
    total = torch.zeros(20)
    for step in (10, 20, 30, 40):
        model.load_state_dict(run.trajectory.state(step).params)
        with torch.no_grad():
            total += token_losses(model, tokens).sum(1) / 4
    assert_close(plain.score, total, {torch.float32: 1e-5})
    told = hg.mislabels(run, labels=tokens[:, -1], classes=[5, 6], relabel=with_last, **QUIET)
    assert told.top(1)[0].id == 4
    assert int(told.suggested[4]) == 11 - int(tokens[4, -1])  # type: ignore[index]
    with pytest.raises(hg.MismatchError, match="labels of the training examples are not known"):
        hg.mislabels(run, classes=[5, 6], relabel=with_last, **QUIET)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"signal": "vibes"}, hg.UnsupportedError, r"unknown signal.*el2n.*'vibes'"),
        ({"states": 0}, hg.MismatchError, "no states"),
        ({"signal": "harm"}, hg.MismatchError, r"asks whom an example harms.*clean="),
        ({"signal": "cluster"}, hg.MismatchError, "asks whom an example harms"),
        ({"signal": "class", "clean": TensorDataset(POINTS[:2], LABELS[:2] * 0)}, hg.MismatchError, "no clean query"),
        ({"labels": LABELS[:5]}, hg.MismatchError, r"labels do not fit.*22 integers.*\[5\]"),
        ({"labels": LABELS.float()}, hg.MismatchError, "labels do not fit"),
        ({"classes": [0, 1]}, hg.MismatchError, r"not among the classes.*\[2\]"),
        ({"classes": [0]}, hg.MismatchError, "two or more"),
        ({"classes": [0, 1, 2, 2]}, hg.MismatchError, "two or more"),
    ],
)
def test_wrong_inputs_are_refused(run: hg.Run, options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        hg.mislabels(run, **QUIET, **options)


def test_scores_that_do_not_cover_the_data_are_refused(run: hg.Run) -> None:
    few = hg.attribute(run, TASK.test, train=[0, 1], check=False, compile=False, progress=False)
    with pytest.raises(hg.MismatchError, match=r"do not cover.*22.*2 rows"):
        hg.mislabels(run, signal="harm", clean=few, **QUIET)


def test_one_label_everywhere_and_too_many(tmp_path: Path) -> None:
    same = replace(TASK, train=TensorDataset(POINTS, LABELS * 0))
    found = hg.mislabels(hg.train(same, tmp_path / "same"), **QUIET)
    assert (found.signal, found.suggested) == ("loss", None)
    assert "all examples have the same" in found.note
    many = TensorDataset(torch.randn(150, 6), torch.arange(150))
    wide = replace(TASK, train=many, model=lambda: nn.Linear(6, 150))
    run = hg.train(wide, tmp_path / "many")
    assert "150 distinct labels: give classes=" in hg.mislabels(run, **QUIET).note
    assert hg.mislabels(run, classes=range(150), **QUIET).signal == "el2n"


def test_what_is_not_finite_is_refused(run: hg.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing, one, table = torch.full((22,), math.nan), torch.ones(22), torch.ones(22, CLASSES)
    broken = Candidates(nothing, table, table, one, one, one, PLAIN)
    monkeypatch.setattr("hydragrad.suspecting.candidate_labels", lambda *given, **options: broken)
    with pytest.raises(hg.NonFiniteError, match="signal 'loss' is not finite"):
        hg.mislabels(run, **QUIET)


def test_a_run_without_later_states_is_refused(run: hg.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.trajectory, "checkpoints", (0,))
    with pytest.raises(hg.MismatchError, match="stored no state after its first"):
        hg.mislabels(run, **QUIET)
