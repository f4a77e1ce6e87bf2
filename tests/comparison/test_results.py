"""Results kept, tabulated, drawn: what is printed is what was measured, and the page in the docs is what is kept."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from comparison import results as kept
from comparison.adding import added
from comparison.page import PAGE, PICTURE, page
from comparison.table import among_all, cell, costs, findings, summary, table
from comparison.tasks import TASKS

NAME = "breast-cancer"


def measured(**values: Any) -> dict[str, Any]:
    return {"status": "ok", "clean": True, **values}


TASK: dict[str, Any] = {
    "about": {"examples": 9, "queries": 40, "removed": 4, "subsets": 2, "training_seconds": [0.1, 0.2]},
    "methods": {
        "exact": [measured(seed=0, loo=0.5, lds_10=0.3, ratio=20.0), measured(seed=1, loo=0.7, lds_10=0.3, ratio=20.0)],
        "exact-unchecked": [measured(seed=0, loo=0.6, ratio=16.0)],
        "el2n": [measured(seed=0, flipped=True, **{"self.auroc": 0.9})],
        "kfac": [{"seed": 0, "status": "unfit", "reason": "no extra. Really."}],
        "tracin": [measured(seed=0, loo=0.2, lds_10=0.4)],
        "dattri-if-cg": [measured(seed=0, loo=0.3, lds_10=0.2, ratio=30.0)],
        "bergson-magic": [measured(seed=0, loo=0.6, lds_10=0.9, ratio=240.0)],
    },
}


def test_results_are_collected_over_seeds_and_runs(tmp_path):
    spec = replace(TASKS[NAME], epochs=1, queries=6)
    assert spec.record(tmp_path / NAME / "seed-0" / "clean", seed=0, flipped=False)
    for seed in (0, 10, 2):
        where = tmp_path / NAME / f"seed-{seed}"
        clean = {"status": "ok", "loo": 1 / 3, "ratio": 3.0, "peak_bytes": 2**21, "training_seconds": 0.1 + seed / 100}
        flipped = {"status": "ok", "harm": {"auroc": 0.9, "recall": 0.1}, "ratio": 5.0, "torch": "x"}
        for run, values in (("clean", clean), ("flipped", flipped)):
            path = where / run / "results" / "exact.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))
    found = kept.collect(tmp_path)["tasks"]
    assert list(found) == [NAME]
    rows = found[NAME]["methods"]["exact"]
    assert [row["seed"] for row in rows] == [0, 2, 10]
    assert rows[0] == {
        "seed": 0, "status": "ok", "harm.auroc": 0.9, "harm.recall": 0.1, "ratio": 3.0, "loo": 0.3333, "peak_mib": 2,
        "clean": True, "flipped": True,
    }  # fmt: skip
    assert found[NAME]["about"]["training_seconds"] == [0.1, 0.2]
    assert found[NAME]["about"]["examples"] == 455
    assert json.loads(kept.one_row_a_line({"machines": ['a "b"'], "tasks": found}))["tasks"] == found


def test_the_table_averages_seeds_and_names_the_silent_and_the_absent():
    text = table("a-task", TASK)
    assert "| **exact** | 0.60 ± 0.14 |  | 0.30 ± 0.00 |  |  |  |  | 20 x |  | 2 / 0 |" in text
    assert "| tracin | 0.20 |  | 0.40 |" in text
    assert "- kfac, seed 0: unfit: no extra\n" in text
    assert "not run on this task: smoothed, smoothed-gauss-newton, gauss-newton" in text
    assert "9 training examples, 40 queries; 4 examples left out one by one, 2 subsets" in text


def test_the_best_of_the_others_is_neither_ours_nor_the_same_derivative():
    row = summary({"a-task": TASK}).splitlines()[-1]
    assert row == ("| a-task | 0.60 ± 0.14 | 0.30 (dattri-if-cg) | 0.30 ± 0.00 |  | 0.40 (tracin) | 0.900 |  |  |")


def test_findings_say_who_is_first_and_who_is_not():
    other = {**TASK, "methods": {**TASK["methods"], "tracin": [measured(seed=0, loo=0.65, **{"self.auroc": 0.95})]}}
    found = findings({"a-task": TASK, "b-task": other})
    assert "- **LOO**: `exact` is first on a-task; not first on b-task (tracin 0.65 against 0.50, one seed)." in found
    assert (
        "- **LDS 10 %**: `exact` is first on b-task; not first on a-task (tracin 0.40 against 0.30, one seed)." in found
    )
    assert "`el2n` is not first on b-task (tracin 0.950 against 0.900, one seed)." in found
    assert "`smoothed`" not in found


def test_methods_are_compared_on_the_seeds_that_both_have():
    rows = [measured(seed=1, loo=0.65), measured(seed=2, loo=0.99)]  # 0.70 there, and no `exact` of seed 2
    found = findings({"a-task": {**TASK, "methods": {**TASK["methods"], "tracin": rows}}})
    assert "- **LOO**: `exact` is first on a-task." in found


def test_among_all_are_our_own_and_the_same_derivative():
    methods = {**TASK["methods"], "smoothed": [measured(seed=0, lds_10=0.5)]}
    found = among_all({"a-task": {**TASK, "methods": methods}})
    assert found == "- **LDS 10 %**: `smoothed` is not first on a-task (bergson-magic 0.90 against 0.50, one seed)."


def test_systems_that_were_left_unsolved_are_told():
    note = "cg of at most 20 iterations to 1e-05; the linear systems are solved to a relative residual of {} only"
    rows = [measured(seed=seed, loo=0.1, note=note.format(left)) for seed, left in enumerate(("3.7e-01", "2.0e-02"))]
    text = table("a-task", {**TASK, "methods": {"influence-cg": rows, "relatif-l": rows[1:]}})
    assert "- influence-cg: its linear systems were left at a relative residual of 0.37\n" in text
    assert "- relatif-l" not in text


def test_costs_are_those_of_all_queries_and_of_one():
    row = costs({"a-task": TASK}).splitlines()[-1]
    assert row == "| a-task | 40 | 20 x | 16 x | 30 x | 240 x | 0.4 | 6 | 15 |"


def test_the_page_is_what_the_kept_results_give():
    assert PAGE.read_text(encoding="utf-8") == page(kept.load()), "run `python -m comparison.page`"
    assert "{{" not in PAGE.read_text(encoding="utf-8")
    assert PICTURE.is_file()


def test_kept_results_are_of_tasks_and_methods_that_there_are():
    for name, task in kept.load()["tasks"].items():
        assert name in TASKS
        assert set(task["methods"]) <= set(kept.ORDER)
        for rows in task["methods"].values():
            numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
            assert all(math.isfinite(value) for value in numbers)


def test_no_two_labels_of_the_picture_meet():
    pytest.importorskip("matplotlib")
    from comparison.figure import draw

    drawn = draw(kept.load()["tasks"])
    drawn.canvas.draw()
    texts = [text for axes in drawn.axes for text in (*axes.texts, axes.title, *axes.get_yticklabels())]
    texts += [text for axes in drawn.axes for text in (axes.get_title(loc="left") and axes._left_title,)]
    boxes = [text.get_window_extent() for text in texts if text.get_visible() and text.get_text()]
    assert len(boxes) > 20
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[place + 1 :])


def test_the_picture_shows_the_means():
    pytest.importorskip("matplotlib")
    from comparison.figure import draw

    axes = draw({"a-task": TASK}).axes[0]
    marks = sorted(float(collection.get_offsets()[0][0]) for collection in axes.collections)
    assert marks == pytest.approx(sorted([0.6, 0.3, 0.2, 0.4, 0.3, 0.2, 0.6, 0.9]))


def test_what_another_machine_measured_is_kept_beside_what_is_found():
    about = {"examples": 9, "queries": 4, "removed": 4, "subsets": 2, "training_seconds": [0.2, 0.3]}
    old = {
        "exact": [{"seed": 0, "status": "ok", "clean": True, "flipped": True, "ratio": 9.0, "loo": 0.1, "harm": 0.6}],
        "kfac": [{"seed": 0, "status": "unfit", "reason": "so", "clean": True}],
        "tracin": [{"seed": 0, "status": "ok", "clean": True, "ratio": 1.0}],
    }
    new = {
        "exact": [
            {"seed": 0, "status": "ok", "clean": True, "ratio": 5.0, "loo": 0.2},
            {"seed": 1, "status": "ok", "clean": True, "ratio": 6.0},
        ],
        "smoothed": [{"seed": 0, "status": "ok", "clean": True, "ratio": 7.0}],
        "kfac": [{"seed": 0, "status": "ok", "clean": True, "ratio": 3.0}],
        "tracin": [{"seed": 0, "status": "ok", "flipped": True, "ratio": 8.0, "self": 0.9}],
    }
    task = {"about": about, "methods": old}
    before = {"machines": ["A"], "tasks": {"t": task, "u": task}}
    found = {
        "machines": ["B"],
        "tasks": {
            "t": {"about": about | {"training_seconds": [0.1, 0.2]}, "methods": new},
            "u": {"about": about | {"examples": 10}, "methods": new},
        },
    }
    both = added(before, found, ["exact", "smoothed", "kfac", "tracin"])
    assert both["machines"] == ["B", "A"]  # that of most rows first
    task = both["tasks"]["t"]
    assert task["about"]["training_seconds"] == [0.1, 0.3]
    assert list(task["methods"]) == ["exact", "smoothed", "kfac", "tracin"]
    assert task["methods"]["exact"] == [
        {"seed": 0, "status": "ok", "clean": True, "flipped": True, "ratio": 5.0, "loo": 0.2, "harm": 0.6},
        {"seed": 1, "status": "ok", "clean": True, "ratio": 6.0},
    ]
    assert task["methods"]["kfac"] == [{"seed": 0, "status": "ok", "clean": True, "ratio": 3.0}]
    assert task["methods"]["tracin"] == [
        {"seed": 0, "status": "ok", "clean": True, "ratio": 1.0, "machine": 1, "flipped": True, "self": 0.9}
    ]
    assert both["tasks"]["u"]["methods"] == new  # another task by now
    assert added(both, {"machines": ["B"], "tasks": {}}, []) == both
    assert "| tracin |  |  |  |  |  |  |  | 1 x† |" in table("t", task)
    elsewhere = {"seed": 2, "status": "ok", "clean": True, "ratio": 99.0, "machine": 1}
    assert cell([*task["methods"]["exact"], elsewhere], "ratio") == "5.5 x"  # costs of one machine alone
