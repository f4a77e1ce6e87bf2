"""Finished retrainings on disk, so that nothing is done twice: neither after a kill nor for another method's scores."""

from pathlib import Path
from typing import Any, final

from hydragrad.errors import MismatchError, StoreError, message
from hydragrad.files import dumps, load_tensors, loads, path_of, save_tensors, sha256, write_atomically
from hydragrad.retraining.counterfactual import Change
from hydragrad.retraining.measuring import Outcome, Retrainer

_QUESTION = "question.json"
_FORMAT = 1


@final
class Ledger:
    """A folder with one file a finished retraining, named by the hash of its change.

    All of them answer one question (the same run, queries, measurement, machine and number of threads), which the
    folder names; another question is refused with MismatchError. ``threads``: those of the folder.
    """

    def __init__(self, folder: str | Path, retrainer: Retrainer, threads: int) -> None:
        self.folder, self._problem = path_of(folder, "resume"), retrainer.run.problem
        asked = {"format": _FORMAT, **retrainer.description}
        path = self.folder / _QUESTION
        if path.is_file():
            self.threads = self._checked(path, asked)
        else:
            self.threads = threads
            try:
                write_atomically(path, dumps({**asked, "threads": threads}).encode())
            except OSError as error:
                raise StoreError(
                    message(f"cannot write into {self.folder}", got=str(error), remedy="name a folder of its own")
                ) from error

    @staticmethod
    def _checked(path: Path, asked: dict[str, Any]) -> int:
        try:
            kept = loads(path.read_bytes())
            threads = int(kept.pop("threads"))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise StoreError(message(f"{path} cannot be read", got=str(error), remedy="name another folder")) from error
        different = [name for name in asked if kept.get(name) != asked[name]]
        if different:
            raise MismatchError(
                message(
                    f"{path.parent} holds retrainings for another question: its {', '.join(different)} differ(s)",
                    expected=", ".join(f"{name} {kept.get(name)}" for name in different),
                    got=", ".join(f"{name} {asked[name]}" for name in different),
                    remedy="give resume= a folder of its own for each run, set of queries and measurement",
                )
            )
        return threads

    def get(self, change: Change) -> Outcome | None:
        """The outcome that was kept, or None. Raises StoreError for a damaged file."""
        path = self._path(change)
        if not path.is_file():
            return None
        tensors, tables = load_tensors(path, path.read_bytes())
        about = tables["outcome"]
        return Outcome(tensors["values"], tensors.get("hits"), about["seconds"], about["bitwise"])

    def put(self, change: Change, outcome: Outcome) -> None:
        """Keep an outcome: whole or not at all."""
        tensors = {"values": outcome.values} | ({} if outcome.hits is None else {"hits": outcome.hits})
        about = {"seconds": outcome.seconds, "bitwise": outcome.bitwise, "change": change.describe(self._problem)}
        write_atomically(self._path(change), save_tensors(tensors, {"outcome": about}))

    def _path(self, change: Change) -> Path:
        return self.folder / f"{sha256(dumps(change.describe(self._problem)).encode())[:32]}.safetensors"
