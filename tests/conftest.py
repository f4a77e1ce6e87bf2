"""What holds for every test: signatures are checked, randomness is seeded, threads do not crowd each other.

This file runs before `hydragrad` is imported, and must not import it itself.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook

# The modules whose functions users call. Their annotated shapes, dtypes and types are enforced while tests run. The
# rest of the package is left as it is: a checked function cannot be traced by torch.compile or torch.func transforms.
CHECKED_MODULES = [
    "hydragrad.attribution",
    "hydragrad.attributing",
    "hydragrad.run",
    "hydragrad.problem",
    "hydragrad.planning",
    "hydragrad.validating",
    "hydragrad.validation",
    "hydragrad.suspecting",
    "hydragrad.suspects",
]
install_import_hook(CHECKED_MODULES, "beartype.beartype")

# Two workers with a thread pool each would measure how they fight over the cores; another number of threads than in the
# children that tests fork rounds otherwise. Child processes inherit the variable.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

os.environ["MPLBACKEND"] = "Agg"  # pictures go to files: no screen is needed

# The same examples on every run, and no deadline: the first call of a torch operator is slow.
hypothesis.settings.register_profile("reproducible", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("reproducible")


class Everywhere:
    """Fixtures that also hold for the docstring examples in src/, which this folder's own would not reach."""

    @pytest.fixture(autouse=True)
    def reproducible(self) -> Iterator[None]:
        """Seeds every generator before a test, and puts back what tests like to change globally."""
        dtype = torch.get_default_dtype()
        deterministic = torch.are_deterministic_algorithms_enabled()
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        yield
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic)

    @pytest.fixture(autouse=True)
    def docstring_examples_in_an_empty_folder(self, request: pytest.FixtureRequest) -> None:
        """Examples may write files under names like "runs/digits"."""
        if isinstance(request.node, pytest.DoctestItem):
            request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("tmp_path"))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Everywhere(), "everywhere")


@pytest.fixture
def repository() -> Path:
    """The root of the working copy."""
    return Path(__file__).resolve().parent.parent
