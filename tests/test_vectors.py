"""Hypergradient vectors: in memory, on disk, in blocks; what is unfinished, damaged or another run's is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import hydragrad as hg
from hydragrad import vectors as module
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.planning import plan_sweep
from tests.hypergradient.recorded import EPOCHS, recipe_of, recorded, values
from tests.oracles import unroll
from tests.tolerances import ORACLE, SAME, assert_close
from tests.zoo import case

PROBLEM = case("mlp_tanh")
QUERIES = PROBLEM.queries
EXAMPLES = [3, 11, 0, 6, 7]
METHODS = ["exact", "gauss-newton", "hessian-free"]


def found(run: hg.Run, examples: Any = EXAMPLES, **more: Any) -> hg.Hypergradients:
    return hg.hypergradients(run, examples=examples, progress=False, **more)


@pytest.fixture(scope="module")
def recipe():
    return recipe_of(PROBLEM)


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    return recorded(recipe, tmp_path_factory.mktemp("vectors") / "run")


@pytest.fixture(scope="module")
def kept(run, tmp_path_factory):
    """A folder of vectors to copy."""
    folder = tmp_path_factory.mktemp("vectors") / "kept"
    found(run, path=folder)
    return folder


@pytest.fixture
def folder(kept, tmp_path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "kept"))


@pytest.mark.parametrize("method", METHODS)
def test_on_disk_as_in_memory(run, method, tmp_path):
    memory, disk = found(run, method=method), found(run, method=method, path=tmp_path / "deep" / "folder")
    loaded = hg.Hypergradients.load(tmp_path / "deep" / "folder", run)
    assert_close(disk.vectors, memory.vectors, SAME)
    assert torch.equal(loaded.vectors, disk.vectors)
    assert loaded.examples.tolist() == disk.examples.tolist() == memory.examples.tolist() == EXAMPLES
    assert loaded.method == disk.method == memory.method == method
    assert loaded.step == disk.step == memory.step == run.num_steps
    assert loaded.diagnostics.plan == disk.diagnostics.plan
    for aggregate in (None, "mean", torch.tensor([0, 1, 1, 0])):
        expected = memory.scores(QUERIES, aggregate=aggregate)
        for other in (disk, loaded):
            scores = other.scores(QUERIES, aggregate=aggregate)
            assert_close(scores.values, expected.values, SAME)
            assert scores.train_ids.tolist() == EXAMPLES
            assert scores.query_ids.tolist() == expected.query_ids.tolist()


def test_the_file_is_the_vectors(run, kept):
    """Memory-mapped: what is on disk is the array itself, row by row, and a loaded one reads it there."""
    raw = torch.frombuffer(bytearray((kept / "vectors.bin").read_bytes()), dtype=torch.float64)
    assert_close(raw.view(len(EXAMPLES), -1), found(run).vectors, SAME)


def test_loaded_vectors_stay_on_disk(run, folder):
    loaded = hg.Hypergradients.load(folder, run)
    before = loaded.vectors[0, 0].item()
    with open(folder / "vectors.bin", "r+b") as file:
        file.write(torch.tensor([before + 1.0], dtype=torch.float64).numpy().tobytes())
    assert loaded.vectors[0, 0].item() == before + 1.0


class Killed(BaseException):
    """As a kill: nothing of the library catches it."""


@pytest.mark.parametrize("before", ["nothing", "a finished sweep"])
def test_an_interrupted_sweep_leaves_no_answer(run, tmp_path, monkeypatch, before):
    folder = tmp_path / "kept"
    if before != "nothing":
        found(run, path=folder)
        hg.Hypergradients.load(folder, run)
    original = module.forward_sweep

    def killed(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(module, "forward_sweep", killed)
    with pytest.raises(Killed):
        found(run, path=folder, method="hessian-free")
    assert (folder / "vectors.bin").exists()
    with pytest.raises(hg.StoreError, match=r"no finished hypergradients.*stopped early.*Remedy: run .*path="):
        hg.Hypergradients.load(folder, run)
    monkeypatch.undo()
    assert_close(found(run, path=folder).vectors, found(run).vectors, SAME)  # and may be run again
    hg.Hypergradients.load(folder, run)


def test_an_empty_folder_holds_no_answer(run, tmp_path):
    with pytest.raises(hg.StoreError, match=r"no finished hypergradients.*Remedy"):
        hg.Hypergradients.load(tmp_path, run)


@pytest.mark.parametrize("cut", [1, 8, 1000])
def test_truncated_vectors_are_refused(run, folder, cut):
    file = folder / "vectors.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    with pytest.raises(
        hg.StoreError, match=rf"vectors.bin is damaged.*Expected: {len(whole)} bytes.*Got: {len(whole) - cut}"
    ):
        hg.Hypergradients.load(folder, run)
    file.write_bytes(whole + b"\0")
    with pytest.raises(hg.StoreError, match=r"vectors.bin is damaged"):
        hg.Hypergradients.load(folder, run)
    file.unlink()
    with pytest.raises(hg.StoreError, match=r"no finished hypergradients"):
        hg.Hypergradients.load(folder, run)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"format": 1, "shape": [5, 2]}'])
def test_a_damaged_description_is_refused(run, folder, content):
    (folder / "hypergradients.json").write_bytes(content)
    with pytest.raises(hg.StoreError, match=r"no finished hypergradients.*Remedy"):
        hg.Hypergradients.load(folder, run)


@pytest.mark.parametrize("change", ["learning rate", "length"])
def test_vectors_of_another_run_are_refused(folder, change, tmp_path):
    recipe = recipe_of(PROBLEM, hyper={"lr": 0.05, "momentum": 0.9} if change == "learning rate" else None)
    epochs = EPOCHS[:2] if change == "length" else EPOCHS
    other = recorded(recipe, tmp_path / "other", epochs)
    with pytest.raises(hg.MismatchError, match=r"belongs to another run.*Expected: .*Got: "):
        hg.Hypergradients.load(folder, other)


def test_vectors_of_a_run_that_parted_later_are_refused(run, folder, tmp_path):
    """The same first steps, then another learning rate."""
    names = [name for name, _ in run.problem.model.named_parameters()]
    hyper = [{"lr": 0.1 if t < 3 else 0.05, "momentum": 0.9} for t in range(run.num_steps)]
    other = recorded(recipe_of(PROBLEM, groups=[(names, hyper)]), tmp_path / "other")
    assert [torch.equal(a.fingerprint, b.fingerprint) for a, b in zip(run.steps, other.steps, strict=True)].count(False)
    with pytest.raises(hg.MismatchError, match=r"belongs to another run"):
        hg.Hypergradients.load(folder, other)


def test_too_large_for_memory_is_refused_unless_a_folder_is_given(run, tmp_path):
    size = sum(p.numel() for p in run.problem.model.parameters())
    with pytest.raises(
        hg.UnsupportedError, match=rf"do not fit.*Expected: .*MiB.*Got: 5 x {size} numbers.*Remedy: give path="
    ):
        found(run, memory=5 * size * 8 - 1)
    assert_close(found(run, memory=5 * size * 8).vectors, found(run).vectors, SAME)
    assert_close(found(run, memory=1, path=tmp_path / "kept").vectors, found(run).vectors, SAME)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_change_nothing(run, method, tmp_path, monkeypatch):
    """A budget for one vector, or for a few, at a time: as many sweeps, the same vectors."""
    whole, swept = found(run, method=method).vectors, []
    original = module.forward_sweep

    def counted(*args: Any) -> Any:
        swept.append(len(args[4]))
        return original(*args)

    monkeypatch.setattr(module, "forward_sweep", counted)

    def carried(memory: int) -> int:
        given: dict[str, Any] = {"rows": 1, "memory": memory, "block": 1, "compile": None}
        return plan_sweep(Sweep.of(run), len(EXAMPLES), method, forward=True, **given).carried

    few = next(memory for memory in range(1000, 10**6, 500) if 1 < carried(memory) < len(EXAMPLES))
    for memory in (1, few, 10 * few):
        swept.clear()
        blocked = found(run, method=method, memory=memory, block=1, path=tmp_path / str(memory))
        assert sum(swept) == len(EXAMPLES)
        assert max(swept) == carried(memory)
        assert (max(swept) == 1) == (memory == 1)
        assert (len(swept) == 1) == (memory > few)
        assert_close(blocked.vectors, whole, SAME)
    for block in (1, 2, 7):
        assert_close(found(run, method=method, block=block).vectors, whole, SAME)


@pytest.mark.parametrize("step", [1, 4, 7])
def test_vectors_of_an_earlier_step(run, recipe, step, tmp_path):
    vectors = found(run, step=step, path=tmp_path / "kept")
    scores = unroll(recipe).scores(QUERIES, t=step)[EXAMPLES]
    for one in (vectors, hg.Hypergradients.load(tmp_path / "kept", run)):
        assert one.step == step
        assert_close(one.scores(QUERIES).values, scores, ORACLE)
    assert_close(vectors.scores(QUERIES).values, values(run, QUERIES, step=step)[EXAMPLES], ORACLE)


def test_examples_in_any_order_and_twice(run):
    vectors = found(run).vectors
    again = found(run, [7, 3, 7]).vectors
    assert_close(again, vectors[[4, 0, 4]], SAME)
