"""The picture of layers beside each other, read back from its axes."""

import pytest
from matplotlib.figure import Figure

from saefty.metrics.intervals import Interval
from saefty.plots.base import PLOTS
from saefty.plots.layers import Layers

AREA = Interval(0.8, 0.7, 0.9, "bootstrap", 50)


def drawn(fvu):
    names = tuple(str(layer) for layer in range(len(fvu)))
    data = Layers(names, {"best latent": (AREA,) * len(fvu)}, {}, 8, tuple(fvu))
    figure = Figure(figsize=data.size, layout="constrained")
    PLOTS["layers"](data, figure)
    figure.canvas.draw()
    return figure


def test_an_fvu_too_small_for_a_bar_is_told_by_its_number():
    fvu = (0.0011, 0.0, 0.043, None, 0.5, 1.3)
    axes = drawn(fvu).axes[1]
    assert [bar.get_height() for bar in axes.patches] == [one for one in fvu if one is not None]
    assert {text.get_text(): text.xy[0] for text in axes.texts} == pytest.approx(
        {"0.001": 0, "<.001": 1, "0.043": 2, "0.50": 4, "1.30": 5}
    )


@pytest.mark.parametrize("fvu", [(0.001, 0.002), (1.0, 1.0), (1.3, 0.4)])
def test_title_and_numbers_stay_within_their_axes(fvu):
    figure = drawn(fvu)
    above, below = figure.axes
    frame = above.get_window_extent()
    title = above._left_title
    assert frame.x0 - 1 <= title.get_window_extent().x0
    assert title.get_window_extent().x1 <= frame.x1
    assert title.get_window_extent().y1 <= figure.bbox.y1
    for text in below.texts:
        assert text.get_window_extent().y1 <= below.get_window_extent().y1
