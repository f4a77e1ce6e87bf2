"""hydragrad's own methods and baselines: `python -m comparison.ours FOLDER METHOD OUT`."""

from collections.abc import Callable
from typing import Any

import hydragrad as hg
from comparison.exchange import Answer, Folder, UnfitError, work
from comparison.truth import open_run
from hydragrad import baselines
from hydragrad.signals.along import mean_losses


def _attributed(method: str, **settings: Any) -> Callable[[Folder], Answer]:
    def attributed(folder: Folder) -> Answer:
        try:
            # as a user calls it: its check against retraining is counted
            found = hg.attribute(open_run(folder), folder.queries, method=method, progress=False, **settings)
        except hg.HydragradError as error:
            raise UnfitError(str(error)) from error
        return Answer(found.values, note=f"verdict: {found.diagnostics.verdict}; {found.diagnostics.plan}")

    return attributed


def _baseline(method: Callable[..., hg.Attribution], **settings: object) -> Callable[[Folder], Answer]:
    def scored(folder: Folder) -> Answer:
        try:
            found = method(open_run(folder), folder.queries, **settings)
        except hg.HydragradError as error:
            raise UnfitError(str(error)) from error
        return Answer(found.values, note="; ".join([found.diagnostics.plan, *found.diagnostics.reasons[1:]]))

    return scored


def _suspects(signal: str | None) -> Callable[[Folder], Answer]:
    def suspected(folder: Folder) -> Answer:
        if not folder.about.classes:
            raise UnfitError("compares labels, and there are none")
        found = hg.mislabels(open_run(folder), signal=signal, progress=False)
        return Answer(
            signal=found.score, note=f"hydragrad.mislabels: {found.signal}{'' if signal else ', the default'}"
        )

    return suspected


def _signal(method: Callable[..., object], **settings: object) -> Callable[[Folder], Answer]:
    def signalled(folder: Folder) -> Answer:
        return Answer(signal=method(open_run(folder), **settings))  # type: ignore[arg-type]

    return signalled


Methods = dict[str, Callable[[Folder], Answer]]

HYPERGRADIENTS: Methods = {
    "exact": _attributed("exact"),
    "exact-unchecked": _attributed("exact", check=False),
    "smoothed": _attributed("exact", smoothing=8),
    "smoothed-gauss-newton": _attributed("gauss-newton", smoothing=8),
    "gauss-newton": _attributed("gauss-newton"),
    "hessian-free": _attributed("hessian-free"),
}
SIGNALS: Methods = {
    "el2n": _suspects(None),
    "ensemble": _suspects("ensemble"),
    "mean-loss": _signal(mean_losses),
}
"""Read off the recorded run; `ensemble` and four trainings on halves of the data."""
BASELINES: Methods = {
    "influence-cg": _baseline(baselines.influence, iterations=20),
    "influence-cg-gn": _baseline(baselines.influence, iterations=20, curvature="gauss-newton"),
    "influence-lissa": _baseline(baselines.influence, solver="lissa", iterations=500, repeats=3, batch=64),
    "kfac": _baseline(baselines.kfac),
    "ekfac": _baseline(baselines.kfac, corrected=True),
    "tracin": _baseline(baselines.tracin),
    "gradient-dot": _baseline(baselines.gradient_dot),
    "gradient-cosine": _baseline(baselines.gradient_cosine),
    "representer": _baseline(baselines.representer),
    "relatif-l": _baseline(baselines.relatif, kind="l", iterations=20),
    "relatif-theta": _baseline(baselines.relatif, kind="theta", iterations=20),
    "tracin-self": _signal(baselines.tracin_self),
}
"""Others' methods, by hydragrad."""
METHODS: Methods = {**HYPERGRADIENTS, **SIGNALS, **BASELINES}

if __name__ == "__main__":
    work(METHODS)
