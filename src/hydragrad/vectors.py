"""Hypergradient vectors dw_T/d eps_i of chosen examples: the forward sweep's answer, ready for any later query."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hydragrad.asked import Asked
from hydragrad.attribution import Attribution
from hydragrad.diagnostics import Diagnostics
from hydragrad.errors import MismatchError, NonFiniteError, StoreError, UnsupportedError, message
from hydragrad.files import dumps, loads, path_of, reserve, write_atomically, writing
from hydragrad.hypergradient.engines import check_method
from hydragrad.hypergradient.finite import FirstBad
from hydragrad.hypergradient.forward import Tangents, forward_sweep
from hydragrad.hypergradient.pages import kept_pages
from hydragrad.hypergradient.queries import Columns, Queries, example_ids
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.planning import Plan, plan_sweep
from hydragrad.run import Run, kept_random_state
from hydragrad.shapes import Float, Int
from hydragrad.trajectory.identity import identity
from hydragrad.trajectory.moments import forwards

_ABOUT, _VECTORS, _BUFFERS = "hypergradients.json", "vectors.bin", "buffers.bin"
_FORMAT = 1


@final
@dataclass(frozen=True)
class Hypergradients:
    """dw_T/d eps_i of n examples, and scores of any queries from them.

    ``vectors`` [n, P]: the trained parameters in the model's order, flattened (memory-mapped if kept on disk);
    ``examples`` [n]: their positions in the training data; ``step``: whose parameters these are derivatives of;
    ``buffers`` [n, Q]: dv_T/d eps_i of the buffers that training changed (BatchNorm's statistics; Q = 0 without any).
    """

    run: Run
    vectors: Float[Tensor, "n P"]
    examples: Int[Tensor, " n"]
    method: str
    step: int
    diagnostics: Diagnostics
    buffers: Float[Tensor, "n Q"]

    def __repr__(self) -> str:
        return f"Hypergradients({len(self.examples)} examples, {self.vectors.shape[1]} parameters, {self.method})"

    def scores(
        self,
        queries: Any,
        *,
        measurement: Callable[[nn.Module, Any], Tensor] | None = None,
        aggregate: str | Tensor | Sequence[int] | None = None,
    ) -> Attribution:
        """score[i, j] = - (dm_j/dw . dw_T/d eps_i + dm_j/dv . dv_T/d eps_i), [n, M]; arguments as in ``attribute``."""
        began = time.perf_counter()
        sweep = Sweep.of(self.run, self.step)
        mode = self.run.trajectory.manifest.collate["mode"]
        device = sweep.replayer.device
        names, carried = sweep.objective.names, sweep.objective.carried
        asked = Queries(self.run.problem, queries, names, measurement, device, mode, carried)
        columns = Columns.make(
            aggregate if isinstance(aggregate, str) or aggregate is None else torch.as_tensor(aggregate), asked.count
        )
        values = torch.empty(len(self.examples), columns.count, dtype=self.vectors.dtype)
        with kept_random_state():
            end = sweep.end()
            for first in range(0, columns.count, 64):
                chosen = slice(first, min(first + 64, columns.count))
                slopes, of_buffers = (
                    torch.cat([x.unsqueeze(-1).flatten(1).cpu() for x in part], dim=1) if part else None
                    for part in asked.sensitivities(end, columns, chosen)
                )
                assert slopes is not None
                for row in range(0, len(self.examples), 256):  # a memory map is read in pieces
                    values[row : row + 256, chosen] = -(self.vectors[row : row + 256] @ slopes.T)
                if of_buffers is not None:
                    values[:, chosen] -= self.buffers @ of_buffers.T
            measured = columns.collect(asked.values(end))
        seconds = self.diagnostics.seconds + time.perf_counter() - began
        diagnostics = Diagnostics(**{**vars(self.diagnostics), "seconds": seconds})
        return Attribution(
            values,
            self.examples,
            torch.arange(columns.count),
            self.method,
            diagnostics,
            run=identity(self.run.steps),
            asked=Asked.of(measured, self.step, measurement=measurement),
        )

    @staticmethod
    def load(path: str | Path, run: Run) -> "Hypergradients":
        """Open what ``hypergradients(..., path=path)`` kept; the vectors stay on disk. Raises StoreError."""
        folder = path_of(path)
        try:
            about = loads((folder / _ABOUT).read_bytes())
            shapes = {_VECTORS: tuple(about["shape"]), _BUFFERS: (about["shape"][0], about["buffers"])}
            dtype = getattr(torch, about["dtype"])
            sizes = {name: (folder / name).stat().st_size if shape[1] else 0 for name, shape in shapes.items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                message(
                    f"{folder} holds no finished hypergradients",
                    got=str(error),
                    cause="the sweep was stopped early",
                    remedy="run hydragrad.hypergradients(..., path=...) to its end",
                )
            ) from error
        for name, shape in shapes.items():
            expected = math.prod(shape) * dtype.itemsize
            if about["format"] != _FORMAT or sizes[name] != expected:
                raise StoreError(message(f"{folder / name} is damaged", expected=f"{expected} bytes", got=sizes[name]))
        given = identity(run.steps)
        if about["run"] != given:
            raise MismatchError(message(f"{folder} belongs to another run", expected=about["run"], got=given))
        vectors, buffers = (
            _mapped(folder / name, shape, dtype) if shape[1] else torch.empty(shape, dtype=dtype)
            for name, shape in shapes.items()
        )
        diagnostics = Diagnostics.from_dict(about["diagnostics"])
        return Hypergradients(
            run, vectors, torch.tensor(about["examples"]), about["method"], about["step"], diagnostics, buffers
        )


def hypergradients(
    run: Run,
    examples: Tensor | Sequence[int],
    *,
    method: str = "exact",
    step: int | None = None,
    path: str | Path | None = None,
    memory: int | None = None,
    block: int | None = None,
    compile: bool | None = None,
    check: bool = True,
    progress: bool = True,
    drift_tolerance: float | None = None,
) -> Hypergradients:
    """dw_T/d eps_i of chosen examples by the forward sweep (HYDRA's Algorithm 1), for any queries afterwards.

        h <- JVP of U_t with dg = C_t h + [i in B_t] dg_t/d eps_i

    With buffers that training changes, dv_T/d eps_i goes along. ``examples``: n positions in the training data;
    ``path``: a folder in which the vectors are kept, memory-mapped (n P numbers may exceed memory); other arguments as
    in ``attribute``. ``check``: refuse non-finite vectors.
    Raises MismatchError, UnsupportedError, NonFiniteError. Source: arXiv 2102.02515.
    Example: ``hydragrad.hypergradients(run, examples=[3, 14]).scores(test_set)``.
    """
    began = time.perf_counter()
    check_method(method)
    ids = example_ids(examples, run.num_examples, "examples")
    sweep = Sweep.of(run, step, drift_tolerance=drift_tolerance)
    with kept_random_state(), kept_pages():
        plan = plan_sweep(sweep, len(ids), method, rows=1, memory=memory, block=block, compile=compile, forward=True)
        manifest, objective = run.trajectory.manifest, sweep.objective
        size = sum(math.prod(manifest.params[name]["shape"]) for name in objective.names)
        size_v = sum(math.prod(manifest.buffers[name]["shape"]) for name in objective.carried)
        vectors = _allocate(path, _VECTORS, (len(ids), size), sweep.dtype, plan)
        buffers = _allocate(path, _BUFFERS, (len(ids), size_v), sweep.dtype, plan)
        _sweep_blocks(sweep, plan, ids, vectors, buffers, check, progress)
    diagnostics = Diagnostics(
        method=method,
        seconds=time.perf_counter() - began,
        check_seconds=0.0,
        replay_seconds=plan.chosen.replay * sweep.stop,
        drift=0.0,
        growth=float("nan"),
        plan=str(plan),
        gradient_gap=plan.gradient_gap,
    )
    if path is not None:
        about = {
            "format": _FORMAT,
            "shape": tuple(vectors.shape),
            "buffers": buffers.shape[1],
            "dtype": str(vectors.dtype).removeprefix("torch."),
            "examples": ids.tolist(),
            "method": method,
            "step": sweep.stop,
            "run": identity(run.steps),
            "diagnostics": diagnostics.to_dict(),
        }
        write_atomically(Path(path) / _ABOUT, dumps(about).encode())
    return Hypergradients(run, vectors, ids, method, sweep.stop, diagnostics, buffers)


def _sweep_blocks(
    sweep: Sweep, plan: Plan, ids: Tensor, vectors: Tensor, buffers: Tensor, check: bool, progress: bool
) -> None:
    run = sweep.run
    state = sweep.replayer.state()
    params = [state.params[name] for name in sweep.objective.names]
    carried = [state.buffers[name] for name in sweep.objective.carried]
    bar = tqdm(total=sweep.stop * plan.sweeps, desc="sweeping forward", unit="step", delay=2, disable=not progress)
    with bar:
        for first in range(0, len(ids), plan.carried):
            chosen = ids[first : first + plan.carried]
            tangents = Tangents(params, sweep.slots, len(chosen), carried)
            bad = FirstBad((*sweep.objective.names, *sweep.objective.carried))

            def watch(step: int, tangents: Tangents = tangents, bad: FirstBad = bad) -> None:
                bar.update()
                if check:
                    bad.see(step, (*tangents.h, *tangents.y))

            moments = forwards(sweep.replayer, run.trajectory, sweep.stop)
            used = None if plan.method == "hessian-free" else plan.chosen.plain
            forward_sweep(moments, sweep.objective, sweep.optimizer, used, chosen, tangents, plan.block, watch)
            if found := bad.first():
                raise _not_finite(sweep, *found)
            vectors[first : first + len(chosen)] = tangents.flat().cpu()
            buffers[first : first + len(chosen)] = tangents.flat_buffers().cpu()


def _not_finite(sweep: Sweep, step: int, names: list[str]) -> NonFiniteError:
    sweep.end()  # where the run itself is not finite, that is the word
    return NonFiniteError(
        message(
            f"a hypergradient is not finite after step {step}, first in {names[0]!r}",
            expected="finite derivatives of the parameters in the examples' weights",
            got=f"NaN or infinity in {len(names)} parameters",
            cause="an unstable run: its derivative grows at every step",
            remedy="try method='gauss-newton', or ask an earlier step with step=",
        )
    )


def _allocate(path: str | Path | None, name: str, shape: tuple[int, int], dtype: torch.dtype, plan: Plan) -> Tensor:
    if path is not None and math.prod(shape):
        folder = path_of(path)
        with writing(folder):
            (folder / _ABOUT).unlink(missing_ok=True)  # until this sweep has ended, there is no answer here
        reserve(folder / name, math.prod(shape) * dtype.itemsize)
        return _mapped(folder / name, shape, dtype)
    if math.prod(shape) * dtype.itemsize > plan.budget:
        raise UnsupportedError(
            message(
                "the vectors do not fit in memory",
                expected=f"at most {plan.budget / 2**20:.0f} MiB",
                got=f"{shape[0]} x {shape[1]} numbers: {math.prod(shape) * dtype.itemsize / 2**20:.0f} MiB",
                remedy="give path=: a folder in which the vectors are kept, memory-mapped",
            )
        )
    return torch.empty(shape, dtype=dtype)


def _mapped(file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
