"""Environments of their own for the other libraries, outside the repository: `python -m comparison.environments`.

They lie in the folder of HYDRAGRAD_PEERS, else in ~/.cache/hydragrad-compare. Versions are pinned: numbers are theirs.
"""

import argparse
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"
"""Named on every call of pip, or else a package's own range brings another build."""


@dataclass(frozen=True)
class Peer:
    """A library's adapter `comparison.peers.NAME`, its methods, the environment that it runs in."""

    name: str
    environment: str
    methods: tuple[str, ...]


ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "shared": (
        "safetensors==0.8.0",
        "captum==0.9.0",
        "dattri==0.3.0",
        "kronfluence==1.0.1",
        "traker==0.3.2",
        "cleanlab==2.9.0",
        "scikit-learn==1.9.1",
    ),
}

PEERS = (
    Peer("dattri", "shared", ("dattri-if-cg", "dattri-ekfac", "dattri-tracin", "dattri-trak", "dattri-dvemb")),
    Peer("captum", "shared", ("captum-tracin", "captum-tracin-fast", "captum-arnoldi")),
    Peer("kronfluence", "shared", ("kronfluence-ekfac",)),
    Peer("traker", "shared", ("traker-trak",)),
    Peer("cleanlab", "shared", ("cleanlab-self-confidence",)),
)


def home() -> Path:
    """Where the environments are."""
    given = os.environ.get("HYDRAGRAD_PEERS")
    return Path(given) if given else Path.home() / ".cache" / "hydragrad-compare"


def python_of(environment: str) -> Path | None:
    """The interpreter of a finished environment, else None."""
    folder = home() / environment
    python = folder / "bin" / "python"
    return python if _stamp(environment).is_file() and python.exists() else None


def make(environment: str) -> None:
    """Build an environment unless it is there with these very requirements."""
    wanted, stamp = "\n".join((TORCH, *ENVIRONMENTS[environment])), _stamp(environment)
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    print(f"installing the environment {environment!r} into {home() / environment}: some minutes", flush=True)
    venv.create(home() / environment, with_pip=True)
    python = str(home() / environment / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", TORCH, *ENVIRONMENTS[environment]], check=True)
    stamp.write_text(wanted)


def _stamp(environment: str) -> Path:
    return home() / environment / "requirements-installed.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the environments of the libraries that are compared with.")
    parser.add_argument("names", nargs="*", default=list(ENVIRONMENTS))
    for name in parser.parse_args().names:
        try:
            make(name)
        except subprocess.CalledProcessError as error:
            print(f"{name}: not installed ({error}); its methods are left out", file=sys.stderr)


if __name__ == "__main__":
    main()
