"""The neutral folder that every method reads, whatever library it is of, and the way its answer comes back.

`about.json`: names of model, loss, optimizer; `data.safetensors`: training data and queries; `order.safetensors`: the
batches of every step; `checkpoints/STEP.safetensors`: parameters and buffers; `run/`: hydragrad's own recording.
Imports torch and safetensors alone.
"""

import argparse
import json
import os
import resource
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from comparison.models import LOSSES, MODELS, OPTIMIZERS


class Answer(NamedTuple):
    """`scores` [N, M], positive: the example helped; `signal` [N], larger: rather mislabelled. One may be None."""

    scores: Tensor | None = None
    signal: Tensor | None = None
    note: str = ""


class UnfitError(Exception):
    """The method does not do this task: its reason, in words."""


@dataclass(frozen=True)
class About:
    task: str
    model: str
    loss: str
    optimizer: str
    options: dict[str, Any]
    batch_size: int
    epochs: int
    seed: int
    classes: int
    checkpoints: list[int]
    dtype: str = "float32"


class Folder:
    """A written exchange folder; `dtype` replaces the recorded one for methods that know no other."""

    def __init__(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        self.path = Path(path)
        self.about = About(**json.loads((self.path / "about.json").read_text()))
        self.dtype: torch.dtype = dtype or getattr(torch, self.about.dtype)
        stored = load_file(self.path / "data.safetensors")
        data = {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in stored.items()}
        self.train = TensorDataset(data["train_inputs"], data["train_targets"])
        self.queries = TensorDataset(data["query_inputs"], data["query_targets"])
        order = load_file(self.path / "order.safetensors")
        self.batches = list(order["ids"].split(order["lengths"].tolist()))
        self.loss: Callable[..., Tensor] = LOSSES[self.about.loss]

    def model(self, step: int | None = None) -> nn.Module:
        """The model in evaluation mode, as it was before a stored step (None: trained)."""
        model = MODELS[self.about.model]().to(self.dtype)
        step = self.about.checkpoints[-1] if step is None else step
        model.load_state_dict(self.state(step))
        return model.eval()

    def single(self) -> "Folder":
        """The same in float32."""
        return self if self.dtype == torch.float32 else Folder(self.path, torch.float32)

    def state(self, step: int) -> dict[str, Tensor]:
        """Parameters and buffers before a stored step."""
        tensors = load_file(self.checkpoint(step))
        return {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in tensors.items()}

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"{step}.safetensors"

    @property
    def trained_checkpoints(self) -> list[int]:
        """Stored steps but the untrained one."""
        return [step for step in self.about.checkpoints if step > 0]

    @property
    def lr(self) -> float:
        return float(self.about.options["lr"])

    def probabilities(self) -> None:
        """Refuse tasks without one label an example."""
        if not self.about.classes:
            raise UnfitError("knows classification with one label an example alone")

    def trained_on(self, ids: Tensor) -> nn.Module:
        """Another model by the same recipe on some of the examples, in batches of its own."""
        torch.manual_seed(self.about.seed)
        model = MODELS[self.about.model]().to(self.dtype).train()
        optimizer = OPTIMIZERS[self.about.optimizer](model.parameters(), **self.about.options)
        for _ in range(self.about.epochs):
            for part in ids[torch.randperm(len(ids))].split(self.about.batch_size):
                optimizer.zero_grad()
                self.loss(model, [tensor[part] for tensor in self.train.tensors]).mean().backward()
                optimizer.step()
        return model.eval()

    def plain_training(self) -> float:
        """CPU seconds of the training loop by itself, on tensors collated beforehand: the unit of every ratio."""
        collated = [[tensor[ids] for tensor in self.train.tensors] for ids in self.batches]
        model = self.model(0).train()
        optimizer = OPTIMIZERS[self.about.optimizer](model.parameters(), **self.about.options)
        began = cpu_seconds()
        for batch in collated:
            optimizer.zero_grad()
            self.loss(model, batch).mean().backward()
            optimizer.step()
        return cpu_seconds() - began


def cpu_seconds() -> float:
    """CPU time of all threads of this process and of the children that it waited for; others' load does not enter."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def write_folder(
    path: Path,
    about: About,
    train: TensorDataset,
    queries: TensorDataset,
    batches: list[Tensor],
    states: Mapping[int, Mapping[str, Tensor]],
) -> None:
    """Write all but the recording; `about.json` comes last, and says that the rest is there."""
    (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    names = ("train_inputs", "train_targets", "query_inputs", "query_targets")
    tensors = dict(zip(names, (*train.tensors, *queries.tensors), strict=True))
    save_file({name: x.contiguous() for name, x in tensors.items()}, path / "data.safetensors")
    lengths = torch.tensor([len(ids) for ids in batches])
    save_file({"ids": torch.cat(batches), "lengths": lengths}, path / "order.safetensors")
    for step, state in states.items():
        save_file({name: x.contiguous() for name, x in state.items()}, path / "checkpoints" / f"{step}.safetensors")
    write_text(path / "about.json", json.dumps(asdict(about), indent=1))


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def peak_bytes() -> int:
    """Most resident memory since the last reset; 0 where /proc does not tell."""
    try:
        with open("/proc/self/status") as file:
            return 1024 * int(next(line for line in file if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        return 0


def reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


_AGAIN = 3.0
_TRAININGS = 5
_SECONDS = itemgetter(1)


class _TooSlowError(BaseException):
    """Not to be caught by a library."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Stop what takes more CPU time in this process; Python stops it between two of its own steps."""

    def stop(number: int, frame: Any) -> None:
        raise _TooSlowError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


def _timed(method: Callable[[Folder], Answer], folder: Folder) -> tuple[Answer, float, int]:
    """The answer, its CPU seconds, the rise of the peak of resident memory."""
    reset_peak()
    before, began = peak_bytes(), cpu_seconds()
    answer = method(folder)
    return answer, cpu_seconds() - began, peak_bytes() - before


def work(methods: Mapping[str, Callable[[Folder], Answer]], argv: list[str] | None = None) -> None:
    """The whole program of a worker: one method on one folder, timed beside plain training in the same process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("method", choices=sorted(methods))
    parser.add_argument("out", type=Path, help="without suffix: .safetensors and .json are written")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1800.0, help="CPU seconds")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    result = _result(methods[options.method], Folder(options.folder), options.out, options.limit)
    write_text(options.out.with_suffix(".json"), json.dumps(result, indent=1))


def _result(method: Callable[[Folder], Answer], folder: Folder, out: Path, limit: float) -> dict[str, Any]:
    folder.plain_training()  # the first is slower
    training = [folder.plain_training() for _ in range(_TRAININGS)]
    try:
        with limited(limit):
            answer, seconds, peak = _timed(method, folder)
        if seconds < _AGAIN:  # the first call also imports and warms up
            answer, seconds, _ = min((answer, seconds, peak), _timed(method, folder), key=_SECONDS)
    except UnfitError as reason:
        return {"status": "unfit", "reason": str(reason)}
    except _TooSlowError:
        trainings = limit / statistics.median(training)
        return {"status": "too slow", "reason": f"stopped after {trainings:.0f} trainings' time ({limit:.0f} s)"}
    training += [folder.plain_training() for _ in range(_TRAININGS)]
    parts = {"scores": answer.scores, "signal": answer.signal}
    tensors = {name: x.detach().double().contiguous() for name, x in parts.items() if x is not None}
    bad = [name for name, x in tensors.items() if not bool(x.isfinite().all())]
    if bad:
        return {"status": "not finite", "reason": f"{' and '.join(bad)} not finite"}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out.with_suffix(".safetensors"))
    unit = statistics.median(training)
    return {
        "status": "ok",
        "seconds": seconds,
        "training_seconds": unit,
        "ratio": seconds / unit,
        "peak_bytes": peak,
        "note": answer.note,
        "torch": torch.__version__,
    }
