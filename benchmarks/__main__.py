"""`python -m benchmarks`: measure everything, print the table, write it as JSON."""

import argparse
import json
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory, recording, scale, speed


def main() -> None:
    parser = argparse.ArgumentParser(description="Costs as ratios to plain training, recording overhead, peak memory.")
    parser.add_argument("--out", type=Path, default=Path("bench-output/benchmarks.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=scale.STEPS, help="of the long run (0: left out)")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled rows out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{platform.machine()}, torch {torch.__version__}, {options.threads} threads")
    print("ratio: seconds per query / seconds of one plain training run; planning and replay counted, checks not")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in speed.all_rows(Path(folder), compile=not options.no_compile):
            rows.append(row)
            kind = "compiled" if row["compiled"] else ""
            goal = "no goal" if row["goal"] is None else f"goal {row['goal']:.2f}"
            print(
                f"{row['workload']:8} {row['method']:13} {row['queries']:4} queries {kind:8} {row['ratio']:7.3f}x  "
                f"({goal})  training {row['training_seconds']:.3f} s, "
                f"compilation {row['compile_seconds']:.0f} s; {row['plan']}",
                flush=True,
            )
        overheads = {}
        for name, training in recording.trainings().items():
            overheads[name] = recording.overhead(training, Path(folder) / f"overhead {len(overheads)}", seconds=30)
            print(recording.described(name, overheads[name], options.threads), flush=True)
    peaks = memory.compare()
    few, many, result = (peaks[key] / 2**20 for key in ("few_bytes", "many_bytes", "result_bytes"))
    print(
        f"peak memory above training's: {few:.1f} MiB for N = {peaks['few']}, {many:.1f} MiB for N = {peaks['many']} "
        f"of which the result {result:.1f} MiB; without it {100 * peaks['excess']:+.1f} % (goal within 5 %)"
    )
    found: dict[str, Any] = {
        "about": {"torch": torch.__version__, "machine": platform.machine(), "threads": options.threads},
        "speed": rows, "recording": overheads, "memory": peaks, "scale": [],
    }  # fmt: skip
    write(options.out, found)
    if options.steps:
        with tempfile.TemporaryDirectory() as folder:
            work = scale.works([scale.QUERIES], scale.USUAL, tiers=False, others=True)
            for row in scale.rows(Path(folder), options.steps, scale.STORED, work):
                found["scale"].append(asdict(row))
                print(row, flush=True)
                write(options.out, found)
    print(f"written to {options.out}")


def write(path: Path, found: dict[str, Any]) -> None:
    """What is known so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
