"""What rounding depends on beside model and data: noted when a run is recorded, compared when it is replayed."""

from typing import Any

import torch

from hydragrad.trajectory.state import Manifest


def surroundings() -> dict[str, Any]:
    """Of this process: threads split sums, and a processor's vectors order them."""
    return {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}


def differing(manifest: Manifest, device: str) -> list[str]:
    """How this process differs from the one that recorded, in words."""
    here = {"torch": torch.__version__, "device": device, **surroundings()}
    there = {"torch": manifest.torch, "device": manifest.device, **manifest.extra}
    said = {"torch": "with torch {}", "device": "on {}", "threads": "with {} thread(s)", "cpu": "with {} kernels"}
    return [
        f"recorded {words.format(there[key])}, replayed {words.format(here[key])}"
        for key, words in said.items()
        if there.get(key, here[key]) != here[key]
    ]
