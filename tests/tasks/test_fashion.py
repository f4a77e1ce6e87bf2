"""The packaged Fashion-MNIST images are what they are said to be."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import hydragrad as hg
from hydragrad.tasks.fashion import fashion, images
from hydragrad.tasks.naming import resolve_task


def test_the_packaged_images_are_the_first_of_the_original_files() -> None:
    folders = [os.environ.get("HYDRAGRAD_DATA"), Path(__file__).parents[3] / "shared" / "data"]
    file = next((p for f in folders if f and (p := Path(f) / "fashion_mnist.npz").is_file()), None)
    if file is None:
        pytest.skip("the original files are not here")
    train, test = images()
    with np.load(file) as original:
        for found, part in ((train, "train"), (test, "test")):
            n = len(found)
            pixels, labels = found.tensors
            assert np.array_equal((255 * pixels[:, 0]).round().byte().numpy(), original[f"x_{part}"][:n])
            assert np.array_equal(labels.numpy(), original[f"y_{part}"][:n].ravel())


def test_the_images_have_their_labels() -> None:
    train, test = images()
    (pixels, labels), (others, expected) = train.tensors, test.tensors
    assert (len(train), len(test)) == (2000, 500)
    nearest = labels[torch.cdist(others.flatten(1), pixels.flatten(1)).argmin(1)]
    # one nearest neighbour of 2000 knows three quarters of the clothes; shuffled labels a tenth
    assert float((nearest == expected).float().mean()) > 0.7


def test_lenet_learns_them_and_replays(tmp_path: Path) -> None:
    task = resolve_task("fashion")
    assert repr(task) == repr(fashion())
    run = hg.train(fashion(epochs=3), tmp_path / "run", progress=False)
    end = run.replay()
    model = task.build()
    model.load_state_dict(end.params)
    assert task.accuracy is not None
    rightness = task.accuracy(model, task.test.tensors).mean()
    assert float(rightness) > 0.4, "96 steps; chance is 0.1"
