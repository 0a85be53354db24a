"""The names beside the plane of repairs: none covers another, each near its point."""

import re
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.figure import Figure

from saefty.plots.base import PLOTS, save_plot
from saefty.plots.repair_plane import LETTERS, RepairPlane, RepairPoint, spread, wrapped


def test_names_are_moved_apart_and_no_further_than_needed():
    assert spread([0.9, 0.5, 0.1], 0.1) == [0.9, 0.5, 0.1]
    moved = spread([0.5, 0.5, 0.49], 0.1)
    assert moved == pytest.approx([0.5, 0.4, 0.3])
    low = spread([0.05, 0.04, 0.0], 0.1)
    assert low == pytest.approx([0.2, 0.1, 0.0])
    crowded = spread(sorted(np.random.default_rng(0).uniform(0, 1, 9), reverse=True), 0.1)
    assert all(a - b >= 0.1 - 1e-9 for a, b in pairwise(crowded))
    assert min(crowded) >= 0


def test_a_long_name_takes_two_lines():
    lines = wrapped("one two three four five six seven eight nine ten eleven twelve " * 2).split(
        "\n"
    )
    assert len(lines) == 2
    assert max(map(len, lines)) <= LETTERS
    assert lines[1].endswith("…")
    assert wrapped("short") == "short"


def test_the_number_of_a_long_name_stays():
    name = (
        "encoder bias off: all thresholds of the latents that fire raised alike, so that θ = 0.1734"
    )
    shown = wrapped(name)
    assert shown.endswith("= 0.1734")
    assert "…" in shown
    assert max(map(len, shown.split("\n"))) <= LETTERS
    assert shown.count("\n") == 1


def drawn(**keys):
    points = (RepairPoint("as it is", 9.0, 0.3, "as it is"),)
    figure = Figure()
    PLOTS["repair_plane"](RepairPlane(points, (), 25.0, 0.5, "Sick", **keys), figure)
    figure.canvas.draw()
    return figure.axes[0]


def test_the_shaded_region_is_not_called_healthy_and_the_record_is_a_line():
    said = {one.get_text() for one in drawn().texts}
    assert "neither dense nor poor" in said
    assert not said & {"healthy", "recorded FVU"}
    recorded = drawn(recorded=0.03)
    assert "recorded FVU" in {one.get_text() for one in recorded.texts}
    assert [line.get_ydata()[0] for line in recorded.lines] == [0.03]


def test_all_ticks_have_one_form():
    ax = drawn()
    for axis in (ax.xaxis, ax.yaxis):
        labels = [
            one.get_text() for one in [*axis.get_majorticklabels(), *axis.get_minorticklabels()]
        ]
        assert any(labels)
        assert all(re.fullmatch(r"[0-9.]*", one) for one in labels)


def test_points_that_cannot_be_drawn_are_left_out(tmp_path):
    points = (
        RepairPoint("as it is", 40.0, 0.5, "as it is"),
        RepairPoint("none fires", 0.0, 1.0, "reading"),
        RepairPoint("not a number", 4.0, float("inf"), "cause"),
        RepairPoint("far off", 4.0, 1e6, "reading"),
    )
    path = save_plot("repair_plane", RepairPlane(points, (), 25.0, 0.5, "Sick"), tmp_path / "a.png")
    assert path.stat().st_size > 10_000
    nothing = RepairPlane(points[1:2], (), 25.0, 0.5, "Sick")
    assert save_plot("repair_plane", nothing, tmp_path / "b.png").exists()
