"""Opening a store runs no code: what would is refused, or shown as a name; what is written is read again."""

import json
import os
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hydragrad.errors import MismatchError, StoreError, UnsupportedError
from hydragrad.files import dumps, from_json, loads, to_json
from hydragrad.step import known
from hydragrad.trajectory.recording import record
from hydragrad.trajectory.store import Trajectory
from tests.trajectory.forging import (
    content,
    forge,
    pages,
    replace_file,
    tables_of,
    tensor_files,
)
from tests.trajectory.loops import bind, make_model, record_run, sgd


class Payload:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_a_pickle_in_place_of_tensors_is_not_loaded(folder: Path, tmp_path: Path) -> None:
    mark, payload = tmp_path / "mark", b""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        payload = pickle.dumps(Payload(mark), protocol)
        for name in tensor_files(folder):
            kept = (folder / name).read_bytes()
            for data in (payload, struct.pack("<Q", len(payload)) + payload):
                replace_file(folder, name, data)
                with pytest.raises(StoreError, match=rf"{name} cannot be read"):
                    content(folder)
            replace_file(folder, name, kept)
    torch.save(Payload(mark), folder / "odd")
    replace_file(folder, tensor_files(folder)[0], (folder / "odd").read_bytes())
    with pytest.raises(StoreError, match=r"cannot be read"):
        content(folder)
    assert not mark.exists()
    pickle.loads(payload)
    assert mark.exists()  # it would have been seen


@pytest.mark.parametrize(
    ("module", "name"),
    [("os", "system"), ("torch.optim", "lr_scheduler"), ("torch.optim", "Optimizer"), ("torch.optim", "__import__"),
     ("torch.optimizers", "SGD"), ("torch.optim", "sgd"), ("torch.optim", "Own"), ("subprocess", "Popen"),
     ("torch.optim.sgd", "_params_doc")],
)  # fmt: skip
def test_only_optimizers_of_torch_are_ever_made(
    module: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("code was run"))
    manifest, entries = pages(folder)
    about = loads(manifest)
    about["optimizer"] |= {"class": name, "module": module}
    forge(folder, dumps(about).encode(), entries)
    assert len(Trajectory(folder)) == 10
    with pytest.raises(UnsupportedError, match=re.escape(f"the optimizer {module}.{name}")):
        bind(folder)


def test_names_of_functions_are_shown_and_never_called(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("code was run"))
    manifest, entries = pages(folder)
    about = loads(manifest)
    own = {**about["collate"], "default": False, "function": "os.system"}
    forge(folder, dumps({**about, "collate": own}).encode(), entries)
    with pytest.raises(MismatchError, match=r"collate_fn=os\.system"):
        bind(folder)
    about["params"]["0.weight"]["dtype"] = "load"
    forge(folder, dumps(about).encode(), entries)
    with pytest.raises(StoreError, match=r"manifest\.json was altered"):
        Trajectory(folder)


def test_hyperparameters_that_no_optimizer_takes(folder: Path) -> None:
    name = "steps/00000000.safetensors"
    tables = tables_of(folder / name)
    rows: list[Any] = [("lr",), ("lr", "load", 0, "cpu"), ("lr", "float32", 2, "cpu"), ("no", "float32", 0, "cpu")]
    odds = [{"lr": "fast"}, {"momentum": None}, {"nesterov": "yes"}, {"weight_decay": (0.1,)}, {"lr": {}}]
    for odd in [*odds, {"tensors": 1}, *({"tensors": (row,)} for row in rows)]:
        altered = {**tables, "groups": [({**tables["groups"][0][0], **odd},)]}
        save_file(load_file(folder / name), folder / name, {"tables": dumps(altered)})
        replace_file(folder, name, (folder / name).read_bytes())
        with pytest.raises(StoreError, match=rf"{name} holds steps .* hyperparameters of"):
            Trajectory(folder)


def test_json_is_read_as_it_was_written_or_not_at_all() -> None:
    for text in (
        "NaN",
        "[Infinity]",
        '{"$tuple":1}',
        '{"$float":[]}',
        '{"$float":"x"}',
        "[" * 10**5,
        "9" * 5000,
        b"\xff",
    ):
        with pytest.raises(ValueError, match=r".+"):
            loads(text)
    assert json.loads(json.dumps(to_json((1, [2.5, None])))) == {"$tuple": [1, [2.5, None]]}
    assert from_json({"$tuple": [1]}) == (1,)


def test_a_writer_never_writes_what_a_reader_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unusual recordings: no step, frozen parameters, an odd hyperparameter, an optimizer of one's own."""
    with record(tmp_path / "none", model := make_model(), sgd(model)):
        pass
    assert content(tmp_path / "none")["complete"]
    model[0].bias.requires_grad_(False)
    optimizer = sgd(model)
    optimizer.param_groups[0] |= {"note": (1, None, "x"), "loud": True}
    record_run(tmp_path / "odd", model, optimizer)
    assert content(tmp_path / "odd")["complete"]

    class Own(torch.optim.Optimizer):
        """State of its own form."""

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for param in self.param_groups[0]["params"]:
                self.state[param]["history"] = torch.zeros(7, 3)

    monkeypatch.setitem(known._OWN, "Own", (Own, known.update_for("SGD")))
    record_run(tmp_path / "own", model := make_model(), Own(model.parameters(), {"lr": "own"}))
    monkeypatch.delitem(known._OWN, "Own")
    assert content(tmp_path / "own")["complete"]
