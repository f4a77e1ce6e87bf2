"""Environments: what fails leaves nothing behind, what is there is not built again, another version is."""

from pathlib import Path

import pytest

from comparison import environments
from comparison.environments import ENVIRONMENTS, PEERS, Environment, NotMadeError, make, python_of

NAME = "shared"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Calls of the environment's python instead of a real one."""
    made: list[tuple[str, ...]] = []

    def create(folder: Path, with_pip: bool) -> None:
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").touch()

    monkeypatch.setenv("HYDRAGRAD_PEERS", str(tmp_path / "peers"))
    monkeypatch.setattr(environments.venv, "create", create)
    monkeypatch.setattr(environments, "_call", lambda python, *arguments: made.append(arguments))
    return made


def test_an_environment_is_made_once_and_torch_is_named_in_its_call(calls):
    assert python_of(NAME) is None
    assert make(NAME)
    assert calls[0][:4] == ("-m", "pip", "install", environments.TORCH)
    adapters = {call[1] for call in calls if call[0] == "-c"}
    assert adapters == {f"import comparison.peers.{peer.name}" for peer in PEERS if peer.environment == NAME}
    assert python_of(NAME) is not None
    done = len(calls)
    assert not make(NAME)
    assert len(calls) == done


def test_other_requirements_build_it_anew(calls, monkeypatch):
    make(NAME)
    left = environments.home() / NAME / "left-over"
    left.touch()
    monkeypatch.setitem(ENVIRONMENTS, NAME, Environment(("captum==0.8.0",)))
    assert make(NAME)
    assert not left.exists()


def test_what_fails_leaves_nothing(calls, monkeypatch):
    def fail(python: Path, *arguments: str) -> None:
        if arguments[0] == "-c":
            raise NotMadeError("it does not load")

    monkeypatch.setattr(environments, "_call", fail)
    with pytest.raises(NotMadeError, match="does not load"):
        make(NAME)
    assert not (environments.home() / NAME).exists()
    assert python_of(NAME) is None


def test_a_full_disk_is_told_before(calls, monkeypatch):
    monkeypatch.setitem(ENVIRONMENTS, NAME, Environment(("captum==0.9.0",), gigabytes=1e9))
    with pytest.raises(NotMadeError, match="free"):
        make(NAME)
    assert not calls


def test_every_peer_has_an_adapter_and_an_environment():
    for peer in PEERS:
        assert peer.environment in ENVIRONMENTS
        assert (environments.ROOT / "comparison" / "peers" / f"{peer.name}.py").is_file()
