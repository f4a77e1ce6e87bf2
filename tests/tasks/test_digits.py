"""The digits are scikit-learn's, split and flipped as said."""

import pytest
import torch
from sklearn.datasets import load_digits

import hydragrad as hg
from hydragrad.tasks.digits import digits, flip_labels, flipped_digits


def test_every_image_is_in_one_half_with_its_own_label() -> None:
    task = digits()
    images = torch.cat([task.train.tensors[0], task.test.tensors[0]])
    labels = torch.cat([task.train.tensors[1], task.test.tensors[1]])
    assert task.flipped_ids is not None
    assert (len(task.train), len(task.test), len(task.flipped_ids)) == (1437, 360, 0)
    raw = load_digits()  # pyright: ignore[reportAssignmentType]
    given = sorted(
        (tuple((16 * image).int().tolist()), int(label)) for image, label in zip(images, labels, strict=True)
    )
    expected = sorted((tuple(map(int, image)), int(label)) for image, label in zip(raw.data, raw.target, strict=True))  # type: ignore
    assert given == expected


def test_a_tenth_of_the_labels_is_wrong_and_known() -> None:
    clean, task = digits(), flipped_digits()
    assert task.flipped_ids is not None
    assert torch.equal(task.true_labels, clean.train.tensors[1])  # type: ignore[arg-type]
    assert torch.equal(task.train.tensors[0], clean.train.tensors[0])
    assert torch.equal((task.train.tensors[1] != task.true_labels).nonzero().flatten(), task.flipped_ids)
    assert len(task.flipped_ids) == 144  # 10 % of 1437, rounded
    assert torch.equal(task.test.tensors[1], clean.test.tensors[1]), "test labels are never flipped"
    again, other = digits(flipped=0.1), digits(flipped=0.1, flip_seed=1)
    assert torch.equal(again.train.tensors[1], task.train.tensors[1])
    assert not torch.equal(other.train.tensors[1], task.train.tensors[1])


def test_a_flipped_label_is_any_other_class_alike() -> None:
    labels = torch.full((9000,), 4)
    given, ids = flip_labels(labels, 1.0, 10, seed=0)
    counts = given.bincount(minlength=10)
    assert counts[4] == 0
    assert torch.equal(ids, torch.arange(9000))
    others = counts[counts > 0]
    assert len(others) == 9
    assert int(others.min()) > 1000 - 5 * 30, "1000 expected each, with a standard deviation of 30"


def test_variants_are_what_they_are_called() -> None:
    def group(task: hg.Task) -> dict[str, object]:
        return task.optimizer(task.build()).param_groups[0]

    sgd = group(digits())
    assert (sgd["lr"], sgd["momentum"], sgd["weight_decay"]) == (0.1, 0.9, 0.0)
    sgd = group(digits(lr=0.02, momentum=0.0, weight_decay=0.5))
    assert (sgd["lr"], sgd["momentum"], sgd["weight_decay"]) == (0.02, 0.0, 0.5)
    task = digits(optimizer="adamw", train_size=100, test_size=7)
    adamw = group(task)
    assert (adamw["lr"], adamw["weight_decay"]) == (0.001, 0.01)
    assert task.flipped_ids is not None
    assert (len(task.train), len(task.test)) == (100, 7)
    assert torch.equal(task.train.tensors[0], digits().train.tensors[0][:100])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "rmsprop"}, "'sgd' or 'adamw'.*'rmsprop'"),
        ({"optimizer": "adamw", "momentum": 0.5}, "no momentum.*0.5"),
        ({"flipped": 1.5}, "flipped is out of range.*1.5"),
        ({"train_size": 1438}, "train_size is out of range.*1 to 1437"),
        ({"test_size": 0}, "test_size is out of range"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(hg.MismatchError, match=words):
        digits(**options)  # type: ignore[arg-type]


def test_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(hg.UnsupportedError, match=r"pip install 'hydragrad\[data\]'"):
        digits()
