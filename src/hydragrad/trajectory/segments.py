"""Steps that wait to be written, and their writing beside the training, in a thread that lives as long as it takes."""

import threading
from collections.abc import Callable
from typing import final

import torch

from hydragrad.trajectory.noting import Noted, StepNotes
from hydragrad.trajectory.points import Point
from hydragrad.trajectory.state import State
from hydragrad.trajectory.writer import StoreWriter


@final
class Segments:
    """What was noted since the last checkpoint, written segment by segment in the order of training.

    What could not be written waits for the next segment and is written with it. A process that is killed loses the
    segment under way, as one that is killed while it writes does; the store tells them apart from what counts.
    """

    def __init__(self, writer: StoreWriter, notes: StepNotes, device: torch.device, *, keeps_batches: bool) -> None:
        self._writer, self._notes, self._device = writer, notes, device
        self._steps: list[Noted] = []
        self._aside = _Aside()
        self._under_way: list[Noted] = []
        self._keeps_batches = keeps_batches

    def add(self, step: Noted) -> None:
        """A step was taken."""
        self._steps.append(step)

    def begin(self, step: int, capture: Callable[[], State]) -> bool:
        """Begin to write what waits, with the state before ``step`` if one is due (which is returned).

        Raises what stopped the segment before, when this one is under way, its steps with it.
        """
        failed = self.settle()
        state = capture() if self._writer.thinning.due(step) else None
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)  # the thread has streams of its own
        self._under_way, self._steps = self._steps, []
        self._notes.forget()
        self._aside.start(lambda: self._write(state))
        if failed is not None:
            raise failed
        return state is not None

    def _write(self, state: State | None) -> None:
        steps = self._under_way
        contents = [part for step in steps for part in step.contents()] if self._keeps_batches else None
        self._writer.flush(self._notes.records(steps), state, contents)
        self._under_way = []

    def point(self, point: Point) -> None:
        """Write where the loop stood at a state, once that is stored, and if it is."""
        self._aside.start(lambda: self._writer.point(point) if point.step in self._writer.thinning.kept else None)

    def wait(self) -> None:
        """Until nothing is under way."""
        self._aside.wait()

    def settle(self) -> Exception | None:
        """Wait until nothing is under way; what stopped it, if something did, and then its steps wait again."""
        self._aside.wait()
        failed = self._aside.failed()
        self._under_way, self._steps = [], self._under_way + self._steps
        return failed

    def end(self, state: State | None) -> None:
        """Write what waits, and the state after it (None: it is torn); nothing is under way."""
        if self._steps:
            self._under_way, self._steps = self._steps, []
            self._write(state)
        elif state is not None and state.step not in self._writer.thinning.kept:
            self._writer.keep(state)


@final
class _Aside:
    """Work done one after the other in a thread of its own, which ends with it. After a failure nothing is done."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._failed: Exception | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Do this once what came before is done."""
        with self._lock:
            self._waiting.append(work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="hydragrad-writer")
                self._thread.start()

    def wait(self) -> None:
        """Until all is done."""
        if (thread := self._thread) is not None:
            thread.join()

    def failed(self) -> Exception | None:
        """What failed, told once."""
        failed, self._failed = self._failed, None
        return failed

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                work = self._waiting.pop(0)
            if self._failed is None:
                try:
                    work()
                except Exception as error:
                    self._failed = error
