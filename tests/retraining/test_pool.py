"""Retrainings side by side, by whatever stands behind joblib: the same numbers as one after another."""

import sys
from pathlib import Path
from typing import Any

import joblib
import pytest
import torch

import hydragrad as hg
from hydragrad.retraining import pool
from hydragrad.retraining.pool import default_threads, workers
from tests.retraining.by_hand import right
from tests.tasks.small import make_task, write_source
from tests.trajectory.loops import losses


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> hg.Run:
    return hg.train(make_task(), tmp_path_factory.mktemp("pool") / "run", checkpoint_every=4)


@pytest.fixture(scope="module")
def scores(run: hg.Run) -> hg.Attribution:
    return hg.attribute(run, make_task().test, check=False, compile=False, progress=False)


def proof(run: hg.Run, scores: hg.Attribution, **options: Any) -> hg.Validation:
    given = {"n": 5, "accuracy": right, "progress": False, "measurement": losses, **options}
    return hg.validate(run, scores, make_task().test, **given)


def assert_same(a: hg.Validation, b: hg.Validation) -> None:
    assert a.items == b.items
    assert torch.equal(a.actual, b.actual)
    assert torch.equal(a.accuracy, b.accuracy)
    assert a.threads == b.threads == 1
    assert a.bitwise
    assert b.bitwise


@pytest.fixture
def single(run: hg.Run, scores: hg.Attribution) -> hg.Validation:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return proof(run, scores, jobs=1)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_workers_give_what_one_process_gives(
    backend: str, run: hg.Run, scores: hg.Attribution, single: hg.Validation
) -> None:
    threads = torch.get_num_threads()
    with joblib.parallel_config(backend=backend):
        assert_same(proof(run, scores, jobs=2), single)
    with joblib.parallel_config(backend=backend, n_jobs=2):
        assert_same(proof(run, scores), single)  # jobs=None: the surroundings decide
    assert torch.get_num_threads() == threads


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dask's and tornado's own
def test_a_dask_cluster_serves(run: hg.Run, scores: hg.Attribution, single: hg.Validation) -> None:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        assert_same(proof(run, scores), single)


def test_a_backend_that_gives_lists_serves(
    run: hg.Run, scores: hg.Attribution, single: hg.Validation, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = type(joblib.parallel.get_active_backend()[0])
    monkeypatch.setattr(backend, "supports_return_generator", False)
    assert_same(proof(run, scores, jobs=2), single)


def test_tasks_of_a_file_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydragrad.tasks.naming import resolve_task

    monkeypatch.setattr(sys, "path", list(sys.path))
    task = resolve_task(f"{write_source(tmp_path)}:small")
    run = hg.train(task, tmp_path / "run")
    scores = hg.attribute(run, task.test, check=False, compile=False, progress=False)
    one, two = (hg.validate(run, scores, task.test, n=3, jobs=jobs, progress=False).actual for jobs in (1, 2))
    torch.testing.assert_close(one, two)


def test_what_cannot_travel_is_refused(run: hg.Run, scores: hg.Attribution) -> None:
    lock = __import__("threading").Lock()

    def locked(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        with lock:
            return losses(model, batch)

    with pytest.raises(hg.UnsupportedError, match=r"cannot travel to workers.*pickle.*jobs=1"):
        proof(run, scores, jobs=2, measurement=locked)


def test_numbers_of_jobs() -> None:
    assert workers(1) is None
    assert workers(None) is None
    assert workers(2) == 2
    assert workers(-1) == joblib.cpu_count()
    assert default_threads(2) == 1
    assert default_threads(1) == torch.get_num_threads()
    for wrong in (0, 1.5, "two"):
        with pytest.raises(hg.UnsupportedError, match="number of jobs"):
            workers(wrong)  # type: ignore[arg-type]


def test_a_missing_joblib_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(hg.UnsupportedError, match=r"pip install 'hydragrad\[parallel\]'"):
        workers(2)


def test_random_steps_are_replayed_one_at_a_time(run: hg.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydragrad.retraining import measuring

    entered = []

    class Lock:
        def __enter__(self) -> None:
            entered.append(1)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(measuring, "_RANDOM", Lock())
    question = measuring.Question(
        run.trajectory.folder, run.problem, make_task().test, measuring.Columns.make(None, 4), run.num_steps
    )
    retrainer = measuring.Retrainer(question, run)
    retrainer.outcome(pool.Change((1,)), early=True, threads=1)
    assert not entered
    retrainer._random = True
    retrainer.outcome(pool.Change((1,)), early=True, threads=1)
    assert entered == [1]
