"""Charts: what is drawn are the numbers, where the axes say."""

import pytest
import torch

import hydragrad as hg
from hydragrad.hypergradient.queries import Columns
from hydragrad.report import charts
from hydragrad.report.charts import Chart, Mark
from hydragrad.report.overview import share_by_label
from hydragrad.report.subject import Subject
from tests.report.conftest import CLASSES, M


def marks(chart: Chart, tag: str, kind: str = "") -> list[Mark]:
    return [m for m in chart.marks if m.tag == tag and kind in str(m.attributes.get("class", ""))]


def test_influence_is_shared_by_label(run: hg.Run, scores: hg.Attribution, task: hg.Task) -> None:
    subject = Subject(run, scores, task.test, Columns.make(None, M), None, None, None)
    found = share_by_label(subject)
    assert found is not None
    parts, rows, columns = found
    assert rows == list(range(CLASSES))
    train, test = task.train.tensors[1].tolist(), task.test.tensors[1].tolist()
    for c, column in enumerate(columns):
        sums = [0.0] * CLASSES
        for i, label in enumerate(train):
            for j, of in enumerate(test):
                if of == column:
                    sums[label] += abs(float(scores.values[i, j]))
        for r in range(CLASSES):
            assert float(parts[r, c]) == pytest.approx(sums[r] / sum(sums))


def test_a_histogram_counts_every_score() -> None:
    values = torch.cat([torch.full((900,), 0.001), torch.tensor([-0.5] * 10 + [0.5] * 20 + [7.0])])
    chart = charts.histogram(values)
    bars = marks(chart, "rect")
    assert len(bars) == 3, "the middle, and both ends with all that lies beyond"
    assert "931 scores, from −0.500 to 7.00: 99% of them positive" in chart.words
    tallest = max(bars, key=lambda bar: float(bar.attributes["height"]))
    centre = float(tallest.attributes["x"]) + float(tallest.attributes["width"]) / 2
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    assert abs(centre - (left + right) / 2) < (right - left) / charts.BINS
    for zeros in (torch.zeros(10), torch.full((10,), 2.0)):
        assert len(marks(charts.histogram(zeros), "rect")) == 1


def test_a_ladder_stands_above_its_limits_where_it_is_worse() -> None:
    chart = charts.ladder([(0.1, 0.1), (1.0, 0.9)], (0.35, 0.7))
    low, high = (float(m.attributes["cy"]) for m in marks(chart, "circle"))
    limits = sorted(float(m.attributes["y1"]) for m in marks(chart, "line", "limit"))
    assert high < limits[0] < limits[1] < low, "y grows downwards"
    assert [m.text for m in marks(chart, "text", "value")] == ["0.10", "0.90"]
    assert len(marks(charts.ladder([(0.1, 0.1), (1.0, float("nan"))], (0.35, 0.7)), "circle")) == 1


def test_points_lie_on_the_diagonal_where_prediction_is_right() -> None:
    values = torch.tensor([-1.0, 0.0, 3.0])
    chart = charts.scatter(values, values, "")
    ends = [tuple(map(float, p.split(","))) for p in str(marks(chart, "polyline")[0].attributes["points"]).split()]
    (x0, y0), (x1, y1) = ends
    for dot in marks(chart, "circle"):
        part = (float(dot.attributes["cx"]) - x0) / (x1 - x0)
        assert float(dot.attributes["cy"]) == pytest.approx(y0 + part * (y1 - y0), abs=0.2)
    many = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    assert len(marks(charts.scatter(many, many, ""), "circle")) <= charts.POINTS


def test_curves_show_prediction_and_truth() -> None:
    chart = charts.curves({"helpful": [(5, 0.1, 0.2), (10, 0.3, 0.4)], "random": [(5, 0.0, 0.0)]}, "")
    real, said = marks(chart, "polyline", "helpful")
    heights = [[float(p.split(",")[1]) for p in str(line.attributes["points"]).split()] for line in (real, said)]
    assert heights[0][0] == heights[1][0], "both begin at nothing"
    assert heights[0][2] < heights[1][2], "0.4 lies above 0.3"
    assert "dashed" in str(said.attributes["class"])


def test_cells_are_as_dark_as_their_part() -> None:
    parts = torch.tensor([[0.75, 0.2], [0.25, 0.8]])
    chart = charts.heat(parts, ["cat", "dog"], ["cat", "dog"])
    shades = [float(m.attributes["fill-opacity"]) for m in marks(chart, "rect")]
    assert shades == pytest.approx([0.5 * p / 0.8 for p in (0.75, 0.2, 0.25, 0.8)], abs=1e-3)
    assert [m.text for m in marks(chart, "text", "value")] == ["75", "20", "25", "80"]
    assert "cat: most from cat, 75%; dog: most from dog, 80%" in chart.words


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.003, 0.002), (5.0, 5000.0), (-1e6, 1e6)])
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    ticks = charts._Axis(low, high, 0, 100).ticks()
    assert 2 <= len(ticks) <= 6
    assert all(low - 1e-9 * abs(low) <= tick <= high * (1 + 1e-9) for tick in ticks)
    logarithmic = charts._Axis(1e-6, 1e3, 0, 100, log=True)
    assert logarithmic.at(1e-6) == 0
    assert logarithmic.at(1e3) == 100
    assert logarithmic.at(10**-1.5) == pytest.approx(50)
    assert 2 <= len(logarithmic.ticks()) <= 6


def test_a_trace_goes_through_its_values() -> None:
    chart = charts.trace([(0, 1.0), (500, 100.0), (900, float("nan"))], "step", "growth", log=True)
    (line,) = marks(chart, "polyline")
    assert len(str(line.attributes["points"]).split()) == 2
    assert [m.text for m in marks(chart, "text") if m.attributes["text-anchor"] == "end"] == ["1", "10", "100"]
    assert "Growth by step: from 1.00 to 100, at most 100" in chart.words
    assert marks(charts.trace([(0, 0.0), (1, 0.0)], "step", "drift"), "polyline")
