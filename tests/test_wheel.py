"""What users get: the wheel, built from the sdist and installed in an environment that has never seen this checkout."""

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

pytestmark = pytest.mark.xdist_group("wheel")  # one worker, so that it is built once

# Runs inside the clean environment and tells what it saw. Of all the installed packages only those that the wheel
# requires (without extras, and with what these require in turn) can be imported, as on a user's machine.
PROBE = """
import json, sys
from importlib.metadata import packages_distributions, requires, version
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

def required(name, seen):
    if name not in seen:
        seen.add(name)
        for requirement in map(Requirement, requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                required(canonicalize_name(requirement.name), seen)
    return seen

present = required("hydragrad", set())
absent = {
    module for module, owners in packages_distributions().items() if not present & set(map(canonicalize_name, owners))
}
wanted = set()

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            wanted.add(name.partition(".")[0])
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import hydragrad
print(json.dumps({
    "file": hydragrad.__file__,
    "version": hydragrad.__version__,
    "metadata": version("hydragrad"),
    "missing": [name for name in hydragrad.__all__ if not hasattr(hydragrad, name)],
    "wanted": sorted(wanted),
}))
"""

# What `import hydragrad` may ask for though the wheel does not require it: signatures name shapes where jaxtyping is
# there, and torch itself looks for opt_einsum.
OPTIONAL = {"jaxtyping", "opt_einsum"}
SHIPPED_SUFFIXES = {".py", ".typed", ".npz", ".json", ".css", ".html", ".svg", ".txt"}
SDIST_FOLDERS = {"src", "tests", "benchmarks", "comparison", "docs", "examples", "experiments"}


@dataclass(frozen=True)
class Installed:
    sdist: Path
    wheel: Path
    environment: Path

    def run(self, program: str, *arguments: str) -> str:
        """Output of a program of the clean environment, away from the checkout; warnings are errors there too."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return run(
            [str(self.environment / "bin" / program), *arguments],
            cwd=self.environment,
            env=inherited | {"PYTHONWARNINGS": "error", "COLUMNS": "120"},
        )


def run(command: Sequence[str], cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def third_party_folders() -> list[str]:
    """Where this environment keeps the dependencies; its editable hydragrad is elsewhere, in the checkout."""
    return [folder for folder in sys.path if Path(folder).name in {"site-packages", "dist-packages"}]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    root = Path(__file__).resolve().parent.parent
    folder = tmp_path_factory.mktemp("wheel")
    dist, environment = folder / "dist", folder / "clean"
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist)], cwd=root)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")

    venv.create(environment, symlinks=True)
    python = str(environment / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    run([*pip, str(wheel)], cwd=folder)
    # A .pth file appends folders to sys.path and does not read the .pth files in them: the dependencies become
    # visible behind the wheel's own hydragrad, and this environment's link to the checkout does not.
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text("\n".join(third_party_folders()) + "\n")
    return Installed(sdist, wheel, environment)


def test_wheel_works_in_a_clean_environment(installed: Installed):
    seen = json.loads(installed.run("python", "-c", PROBE))
    assert Path(seen["file"]).is_relative_to(installed.environment), f"imported {seen['file']}, not the wheel's"
    assert seen["version"] == seen["metadata"]
    assert seen["missing"] == [], "names in hydragrad.__all__ that hydragrad does not have"
    # So neither scikit-learn, matplotlib, pandas nor typer: they belong to extras.
    assert set(seen["wanted"]) <= OPTIONAL, "`import hydragrad` imports what the wheel does not require"


def test_console_script_explains_itself(installed: Installed):
    assert "demo" in installed.run("hydragrad", "--help")


def test_wheel_holds_the_package_and_nothing_else(installed: Installed, repository: Path):
    with zipfile.ZipFile(installed.wheel) as archive:
        names = [PurePosixPath(name) for name in archive.namelist()]
    shipped = {name for name in names if not name.parts[0].endswith(".dist-info")}
    assert {name.parts[0] for name in shipped} == {"hydragrad"}
    assert PurePosixPath("hydragrad/py.typed") in shipped
    source = repository / "src"
    assert {name for name in shipped if name.suffix == ".py"} == {
        PurePosixPath(path.relative_to(source).as_posix()) for path in source.rglob("*.py")
    }
    assert [str(name) for name in shipped if name.suffix not in SHIPPED_SUFFIXES] == []
    assert [str(name) for name in shipped if is_test(name)] == []
    assert any(name.match("licenses/LICENSE") for name in names)


def test_sdist_holds_no_junk(installed: Installed):
    with tarfile.open(installed.sdist) as archive:
        names = [PurePosixPath(*PurePosixPath(name).parts[1:]) for name in archive.getnames()]
    assert {name.parts[0] for name in names if len(name.parts) > 1} <= SDIST_FOLDERS
    assert [str(name) for name in names if "__pycache__" in name.parts or name.suffix == ".pyc"] == []


def is_test(name: PurePosixPath) -> bool:
    return "tests" in name.parts or name.name.startswith("test_") or name.name == "conftest.py"
