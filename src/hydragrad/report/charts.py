"""Charts of a page as plain SVG: shapes named by class, coloured by the page's style in light and in dark."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hydragrad.report.samples import number
from hydragrad.shapes import Float

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 40
POINTS, BINS = 1500, 41
"""Points of a scatter (more are thinned evenly), bars of a histogram."""


class Mark(NamedTuple):
    """One SVG element."""

    tag: str
    attributes: Mapping[str, str | float]
    text: str = ""


class Chart(NamedTuple):
    """A drawing with the words that stand for it where it cannot be seen."""

    words: str
    marks: Sequence[Mark]
    width: float = WIDTH
    height: float = HEIGHT


class _Axis(NamedTuple):
    """A range of numbers on a range of pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, x = (
            (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        part = (x - low) / (high - low) if high > low else 0.5
        return round(self.start + (self.end - self.start) * min(max(part, 0.0), 1.0), 1)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            every = max(1, (last - first) // 4)
            return [10.0**power for power in range(first, last + 1, every)]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 2 or 1))
        step = next((s for s in (step, 2 * step, 5 * step) if (self.high - self.low) / s <= 5), 10 * step)
        return [k * step for k in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def histogram(values: Float[Tensor, " n"]) -> Chart:
    """How the scores are distributed: numbers of pairs, on a logarithmic axis; the farthest 1 % in the outer bars."""
    sample = values[:: max(1, len(values) // 1_000_000)].double()
    reach = float(sample.abs().quantile(0.995)) or float(sample.abs().max()) or 1.0
    counts = torch.histc(values.double().clamp(-reach, reach), BINS, -reach, reach)
    x, y = _axes((-reach, reach), (0.5, max(float(counts.max()), 1.0)), log_y=True)
    width = (x.end - x.start) / BINS
    bars = [
        Mark("rect", {
            "class": "harmed" if place < BINS // 2 else "helped" if place > BINS // 2 else "quiet",
            "x": round(x.start + place * width + 0.5, 1), "width": round(width - 1, 1),
            "y": y.at(count), "height": round(y.start - y.at(count), 1),
        })
        for place, count in enumerate(counts.tolist()) if count
    ]  # fmt: skip
    share = float((values > 0).double().mean())
    words = (
        f"Histogram of all {len(values):,} scores, from {number(float(values.min()))} to "
        f"{number(float(values.max()))}: {share:.0%} of them positive."
    )
    return Chart(words, [*_frame(x, y, "score (outer bars: and beyond)", "pairs"), *bars])


def ladder(rungs: Sequence[tuple[float, float]], limits: tuple[float, float]) -> Chart:
    """The relative error of the scores for changes of weight h, against the limits of the verdict."""
    steps, errors = [h for h, _ in rungs], [error for _, error in rungs if math.isfinite(error)]
    high = max([1.0, *errors]) * 1.05
    x, y = _axes((min(steps) / 2, max(steps) * 2), (0.0, min(high, 3.0)), log_x=True)
    marks = [
        Mark("line", {"class": "limit", "x1": x.start, "x2": x.end, "y1": y.at(limit), "y2": y.at(limit)})
        for limit in limits
    ]
    marks += [
        Mark("text", {"class": "note", "x": x.start + 4, "y": y.at(limit) - 4, "text-anchor": "start"}, word)
        for limit, word in zip(limits, ("reliable up to here", "doubtful up to here"), strict=True)
    ]
    shown = [(x.at(h), y.at(error), error) for h, error in rungs if math.isfinite(error)]
    marks.append(_line("accent", [(a, b) for a, b, _ in shown]))
    marks += [Mark("circle", {"class": "accent", "cx": a, "cy": b, "r": 4}) for a, b, _ in shown]
    marks += [
        Mark("text", {"class": "value", "x": a, "y": b - 9, "text-anchor": "middle"}, f"{error:.2f}")
        for a, b, error in shown
    ]
    told = "; ".join(f"{error:.2f} for weights 1 ± {h:g}" for h, error in rungs)
    return Chart(f"Relative error of the scores against really reweighting a few examples: {told}.",
                 [*_frame(x, y, "change of the weights, h", "relative error"), *marks])  # fmt: skip


def trace(values: Sequence[tuple[float, float]], across: str, up: str, *, log: bool = False) -> Chart:
    """A line through (place, value)."""
    finite = [(a, b) for a, b in values if math.isfinite(b) and (b > 0 or not log)]
    places, heights = [a for a, _ in finite], [b for _, b in finite]
    low, high = min([0.0, *heights]), max(heights)
    if log:
        low, high = 10 ** math.floor(math.log10(min(heights))), 10 ** math.ceil(math.log10(max(heights)))
    if high <= low:
        low, high = (low / 10, low * 10) if log else (low, low + 1)
    x, y = _axes((min(places), max(places)), (low, high), log_y=log)
    first, last, most = (number(height) for height in (heights[0], heights[-1], max(heights)))
    words = f"{up.capitalize()} by {across}: from {first} to {last}, at most {most}."
    return Chart(words, [*_frame(x, y, across, up), _line("accent", [(x.at(a), y.at(b)) for a, b in finite])])


def heat(parts: Float[Tensor, "R C"], rows: Sequence[str], columns: Sequence[str]) -> Chart:
    """A matrix of parts (each column adds to 1) as shaded cells, the percentages in them."""
    cell = min(34.0, max(14.0, 320 / max(len(columns), 1)))
    left = 12 + 6.5 * max(len(name) for name in rows)
    top = 14 + 6.5 * (max(len(name) for name in columns) if len(columns[0]) > 3 else 1)
    largest = float(parts.max()) or 1.0
    marks: list[Mark] = []
    for r, name in enumerate(rows):
        marks.append(Mark("text", {"x": left - 5, "y": top + (r + 0.5) * cell + 4, "text-anchor": "end"}, name))
        for c in range(len(columns)):
            part, place = float(parts[r, c]), {"x": left + c * cell, "y": top + r * cell}
            shade = round(0.5 * part / largest, 3)  # half at most: the number in it stays legible
            size = {"width": cell - 1, "height": cell - 1, "fill-opacity": shade}
            marks.append(Mark("rect", {"class": "accent", **place, **size}))
            centre = {"x": left + (c + 0.5) * cell, "y": top + (r + 0.5) * cell + 4, "text-anchor": "middle"}
            if cell >= 22 and part >= 0.005:
                marks.append(Mark("text", {"class": "value", **centre}, f"{100 * part:.0f}"))
    for c, name in enumerate(columns):
        centre = left + (c + 0.5) * cell
        turned = {"transform": f"rotate(-90 {centre + 4} {top - 5})", "x": centre + 4, "text-anchor": "start"}
        level = {"x": centre, "text-anchor": "middle"}
        marks.append(Mark("text", {"y": top - 5, **(turned if len(columns[0]) > 3 else level)}, name))
    best = [int(parts[:, c].argmax()) for c in range(len(columns))]
    told = "; ".join(f"{columns[c]}: most from {rows[r]}, {float(parts[r, c]):.0%}" for c, r in enumerate(best))
    words = f"Share of influence on the queries of each label by the label of the training examples. {told}."
    return Chart(words, marks, left + cell * len(columns) + 4, top + cell * len(rows) + 4)


def scatter(predicted: Float[Tensor, " n"], actual: Float[Tensor, " n"], words: str) -> Chart:
    """Predicted against real changes, with the line on which they agree."""
    every = -(-len(predicted) // POINTS)
    low, high = (float(f(torch.stack([predicted, actual]))) for f in (torch.min, torch.max))
    low, high = (low, high) if high > low else (low - 1, high + 1)
    x, y = _axes((low, high), (low, high))
    marks = [_line("limit", [(x.at(low), y.at(low)), (x.at(high), y.at(high))])]
    marks += [
        Mark("circle", {"class": "dot", "cx": x.at(a), "cy": y.at(b), "r": 2.2})
        for a, b in zip(predicted[::every].tolist(), actual[::every].tolist(), strict=True)
    ]
    return Chart(words, [*_frame(x, y, "predicted change (sum of scores)", "real change"), *marks])


def curves(lines: Mapping[str, Sequence[tuple[float, float, float]]], words: str) -> Chart:
    """Real (full) and predicted (dashed) change by size, for lines of (size, predicted, real) named by a class."""
    points = [point for line in lines.values() for point in line]
    heights = [0.0, *(v for _, a, b in points for v in (a, b) if math.isfinite(v))]
    low, high = min(heights), max(heights)
    room = 0.12 * (high - low or 1)  # for the names of the lines
    x, y = _axes((0.0, max(size for size, _, _ in points)), (low, high + room))
    marks: list[Mark] = []
    for kind, line in lines.items():
        for place, dashes in ((2, ""), (1, " dashed")):
            marks.append(_line(kind + dashes, [(x.at(0), y.at(0)), *((x.at(p[0]), y.at(p[place])) for p in line)]))
    for place, kind in enumerate(lines):
        marks.append(Mark("text", {"class": kind, "x": x.start + 8 + 62 * place, "y": TOP + 2}, kind))
    marks.append(Mark("text", {"x": x.end, "y": TOP + 2, "text-anchor": "end"}, "full: real, dotted: predicted"))
    return Chart(words, [*_frame(x, y, "training examples (or groups) removed", "change of the loss"), *marks])


def _axes(
    across: tuple[float, float], up: tuple[float, float], *, log_x: bool = False, log_y: bool = False
) -> tuple[_Axis, _Axis]:
    return _Axis(*across, LEFT, WIDTH - RIGHT, log_x), _Axis(*up, HEIGHT - BOTTOM, TOP, log_y)


def _frame(x: _Axis, y: _Axis, across: str, up: str) -> list[Mark]:
    marks = [Mark("line", {"class": "axis", "x1": x.start, "x2": x.end, "y1": y.start, "y2": y.start})]
    for tick in x.ticks():
        marks.append(Mark("text", {"x": x.at(tick), "y": y.start + 14, "text-anchor": "middle"}, _tick(tick)))
    for tick in y.ticks():
        marks.append(Mark("line", {"class": "grid", "x1": x.start, "x2": x.end, "y1": y.at(tick), "y2": y.at(tick)}))
        marks.append(Mark("text", {"x": x.start - 5, "y": y.at(tick) + 4, "text-anchor": "end"}, _tick(tick)))
    middle = (y.start + y.end) / 2
    marks.append(Mark("text", {"x": (x.start + x.end) / 2, "y": HEIGHT - 8, "text-anchor": "middle"}, across))
    turned = {"x": 11, "y": middle, "transform": f"rotate(-90 11 {middle})", "text-anchor": "middle"}
    return [*marks, Mark("text", turned, up)]


def _tick(value: float) -> str:
    if value and not 1e-4 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    return f"{value:.6g}".replace("-", "−")


def _line(kind: str, points: Sequence[tuple[float, float]]) -> Mark:
    return Mark("polyline", {"class": f"line {kind}", "points": " ".join(f"{a},{b}" for a, b in points)})
