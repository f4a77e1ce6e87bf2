"""A tiny task through the whole harness: recorded, exchanged, retrained, scored by a worker, tabulated."""

import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from comparison.exchange import Answer, Folder, UnfitError, cpu_seconds, work
from comparison.measures import predictions
from comparison.tasks import TASKS
from comparison.truth import open_run, truth_of
from tests.baselines.dense import leave_one_out

SPEC = replace(TASKS["breast-cancer"], epochs=3, queries=6, removed=4, subsets=2)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    assert SPEC.record(tmp_path / "clean", seed=0, flipped=False)
    return Folder(tmp_path / "clean")


def test_the_folder_holds_the_run_that_was_recorded(folder):
    run = open_run(folder)
    assert folder.about.checkpoints[0] == 0
    assert folder.about.checkpoints[-1] == run.num_steps == len(folder.batches)
    for step in folder.about.checkpoints:
        recorded = run.trajectory.state(step).params
        assert all(torch.equal(recorded[name], value) for name, value in folder.model(step).state_dict().items())
    assert all(torch.equal(ids, step.batches[0]) for ids, step in zip(folder.batches, run.steps, strict=True))


def test_the_plain_loop_is_the_recorded_one(folder, monkeypatch):
    untrained = folder.model(0)
    monkeypatch.setattr(Folder, "model", lambda self, step=None: untrained)
    assert folder.plain_training() > 0
    trained = folder.state(folder.about.checkpoints[-1])
    assert all(torch.equal(trained[name], value) for name, value in untrained.state_dict().items())


def test_truth_is_real_and_goes_on_where_it_stopped(folder, monkeypatch):
    truth = truth_of(folder, SPEC)
    measured = leave_one_out(open_run(folder), truth["ids"], folder.queries)
    assert torch.equal(truth["changes"][:4], measured)
    monkeypatch.setattr("comparison.truth.open_run", lambda folder: pytest.fail("trained again"))
    assert torch.equal(truth_of(folder, SPEC)["changes"], truth["changes"])


def test_flipped_labels_are_recorded(tmp_path):
    assert SPEC.record(tmp_path / "flipped", seed=3, flipped=True)
    numpy = pytest.importorskip("numpy")
    wrong = torch.from_numpy(numpy.load(tmp_path / "flipped" / "flipped.npy"))
    sets = SPEC.sets(SPEC.queries)
    assert sets is not None
    given, true = Folder(tmp_path / "flipped").train.tensors[1], sets[0].tensors[1]
    assert torch.equal((given != true).nonzero().flatten(), wrong)
    assert len(wrong) == round(0.1 * len(true))


def test_a_worker_writes_scores_cost_and_refusals(folder, tmp_path):
    scores = torch.randn(len(folder.train), len(folder.queries), dtype=torch.float64)

    def unfit(folder: Folder) -> Answer:
        raise UnfitError("not for this")

    methods = {
        "good": lambda folder: Answer(scores, note="well"),
        "unfit": unfit,
        "broken": lambda folder: Answer(scores / 0),
    }
    for name in methods:
        work(methods, [str(folder.path), name, str(tmp_path / name)])
    about = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in methods}
    assert [about[name]["status"] for name in methods] == ["ok", "unfit", "not finite"]
    assert about["good"]["ratio"] == pytest.approx(about["good"]["seconds"] / about["good"]["training_seconds"])
    assert about["unfit"]["reason"] == "not for this"
    assert torch.equal(load_file(tmp_path / "good.safetensors")["scores"], scores)
    assert not (tmp_path / "broken.safetensors").exists()


def test_single_precision_is_asked_for_by_name(folder):
    assert folder.model().state_dict()["0.weight"].dtype == torch.float64
    single = folder.single()
    assert single.model().state_dict()["0.weight"].dtype == torch.float32
    assert single.train.tensors[0].dtype == torch.float32
    assert single.train.tensors[1].dtype == torch.int64


def test_the_worker_program_measures_what_ours_answer(folder, tmp_path):
    from comparison.ours import METHODS

    work({"exact": METHODS["exact"]}, [str(folder.path), "exact", str(tmp_path / "exact")])
    found = predictions(load_file(tmp_path / "exact.safetensors")["scores"], truth_of(folder, SPEC), SPEC)
    assert found["loo"] > 0.9


def test_time_is_that_of_all_threads_and_of_children():
    def burn(seconds: float) -> None:
        began = time.thread_time()
        while time.thread_time() - began < seconds:
            pass

    began = cpu_seconds()
    threads = [threading.Thread(target=burn, args=(0.15,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    in_threads = cpu_seconds() - began
    code = "import time\nwhile time.process_time() < 0.4: pass"
    began = cpu_seconds()
    subprocess.run([sys.executable, "-c", code], check=True)
    in_child = cpu_seconds() - began
    asleep = []
    for _ in range(3):  # a processor that the machine's host takes away meanwhile counts as ours: the least is right
        began = cpu_seconds()
        time.sleep(0.3)
        asleep.append(cpu_seconds() - began)
    assert in_threads >= 0.3
    assert in_child >= 0.4
    assert min(asleep) < 0.1


def test_what_is_too_slow_is_stopped_and_says_after_how_many_trainings(folder, tmp_path):
    def endless(folder: Folder) -> Answer:
        while True:
            pass

    began = time.process_time()
    work({"endless": endless}, [str(folder.path), "endless", str(tmp_path / "endless"), "--limit", "0.3"])
    about = json.loads((tmp_path / "endless.json").read_text())
    assert about["status"] == "too slow"
    assert about["reason"].startswith("stopped after ")
    assert time.process_time() - began < 60.0
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
