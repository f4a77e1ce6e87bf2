"""Environments of their own for the other libraries, outside the repository: `python -m comparison.environments`.

They lie in the folder of HYDRAGRAD_PEERS, else in ~/.cache/hydragrad-compare. Versions are pinned: numbers are theirs.
"""

import argparse
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"
"""Named on every call of pip, or else a package's own range brings another build."""

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Environment:
    """What is installed; what is taken out again since it does not load beside this torch; the room that it takes."""

    requirements: tuple[str, ...]
    without: tuple[str, ...] = ()
    gigabytes: float = 3.0

    @property
    def stamp(self) -> str:
        """What a finished environment says of itself."""
        return "\n".join((TORCH, *self.requirements, *(f"without {name}" for name in self.without)))


@dataclass(frozen=True)
class Peer:
    """A library's adapter `comparison.peers.NAME`, its methods, the environment that it runs in."""

    name: str
    environment: str
    methods: tuple[str, ...]


ENVIRONMENTS: dict[str, Environment] = {
    "shared": Environment(
        (
            "safetensors==0.8.0",
            "captum==0.9.0",
            "dattri==0.3.0",
            "kronfluence==1.0.1",
            "traker==0.3.2",
            "cleanlab==2.9.0",
            "scikit-learn==1.9.1",
        ),
        without=("torchvision",),
    ),
    "bergson": Environment(("safetensors==0.8.0", "bergson==2.5.1"), without=("torchvision", "torchaudio")),
}

PEERS = (
    Peer("dattri", "shared", ("dattri-if-cg", "dattri-ekfac", "dattri-tracin", "dattri-trak", "dattri-dvemb")),
    Peer("captum", "shared", ("captum-tracin", "captum-tracin-fast", "captum-arnoldi")),
    Peer("kronfluence", "shared", ("kronfluence-ekfac", "kronfluence-ekfac-damped")),
    Peer("traker", "shared", ("traker-trak",)),
    Peer("cleanlab", "shared", ("cleanlab-self-confidence",)),
    Peer("bergson", "bergson", ("bergson-magic",)),
)


class NotMadeError(Exception):
    """An environment could not be made: why, in words."""


def home() -> Path:
    """Where the environments are."""
    given = os.environ.get("HYDRAGRAD_PEERS")
    return Path(given) if given else Path.home() / ".cache" / "hydragrad-compare"


def python_of(environment: str) -> Path | None:
    """The interpreter of a finished environment, else None."""
    python = home() / environment / "bin" / "python"
    return python if _stamp(environment).is_file() and python.exists() else None


def make(name: str) -> bool:
    """Build an environment; False where it is there with these very requirements. What fails is removed."""
    wanted, stamp, folder = ENVIRONMENTS[name], _stamp(name), home() / name
    if stamp.is_file() and stamp.read_text() == wanted.stamp:
        return False
    home().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(home()).free / 1e9
    if free < wanted.gigabytes:
        raise NotMadeError(f"{home()} has {free:.1f} GB free, {wanted.gigabytes:.0f} are needed; set HYDRAGRAD_PEERS")
    shutil.rmtree(folder, ignore_errors=True)  # half an environment, or one of other versions
    try:
        venv.create(folder, with_pip=True)
        python = folder / "bin" / "python"
        _call(python, "-m", "pip", "install", TORCH, *wanted.requirements)
        if wanted.without:
            _call(python, "-m", "pip", "uninstall", "--yes", *wanted.without)
        for peer in PEERS:
            if peer.environment == name:  # an adapter that does not load is no environment
                _call(python, "-c", f"import comparison.peers.{peer.name}")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    stamp.write_text(wanted.stamp)
    return True


def _call(python: Path, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run([str(python), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        words = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise NotMadeError(f"`python {' '.join(arguments)}` failed:\n{words}")


def _stamp(name: str) -> Path:
    return home() / name / "requirements-installed.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the environments of the libraries that are compared with.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ENVIRONMENTS)}; all by default")
    names = parser.parse_args().names or list(ENVIRONMENTS)
    if unknown := set(names) - set(ENVIRONMENTS):
        parser.error(f"no environment is called {', '.join(sorted(unknown))}")
    failed = False
    for name in names:
        print(f"{name}: {home() / name} ...", flush=True)
        try:
            print(f"{name}: {'installed' if make(name) else 'is there'}", flush=True)
        except (NotMadeError, OSError) as error:
            failed = True
            print(f"{name}: not installed: {error}\n{name}: its methods are left out", file=sys.stderr)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
