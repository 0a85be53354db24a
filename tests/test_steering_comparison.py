"""Ways to steer compared by scores that are given: what is chosen, tested, told and drawn."""

import numpy as np
import pytest
from scipy.stats import binomtest

from saefty import fsio, steering_compare_report
from saefty.errors import InputError
from saefty.metrics.steering import halves
from saefty.sae_ts.fit import HeldOut
from saefty.steering import PLAIN, UNSTEERED, Dose
from saefty.steering_compare_report import write_comparison
from saefty.steering_comparison import compare
from saefty.steering_tables import OffTargets, WayFacts


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    monkeypatch.setattr(
        steering_compare_report,
        "save_plot",
        lambda name, data, path, *, size: fsio.commit_text(path, f"{name} {size} {data}"),
    )


def scored(behaviour, coherence, coverage=0.95, controls=()):
    """Compare with scores that are given; the way of each dose is its own arm at alpha 1."""
    n = len(next(iter(behaviour.values())))
    shown = {PLAIN: np.full(n, 0.2), **{Dose(a, 1.0): v for a, v in behaviour.items()}}
    fluent = {PLAIN: np.ones(n), **{Dose(a, 1.0): v for a, v in coherence.items()}}
    return compare(
        shown, fluent, list(behaviour), [0.0, 1.0], None, controls=controls, coverage=coverage,
        boots=100, permutations=100, seed=0,
    )  # fmt: skip


def written(folder, found, controls=(), facts=None):
    """Write the report; return its figures and its text."""
    facts = facts or {way.name: WayFacts(1.0) for way in found.ways}
    figures = write_comparison(
        folder, found, OffTargets(), facts, controls=controls, behaviour="b", judges=("x", "y"),
        unit="residual", coverage=0.95,
    )  # fmt: skip
    return figures, (folder / "summary.md").read_text(encoding="utf-8")


def few_scores(n=64):
    """Scores of a model that is broken: six of all replies, three on either side, are perfect."""
    first = halves(n, None, seed=0)
    values = np.full(n, np.nan)
    values[np.flatnonzero(first)[:3]] = values[np.flatnonzero(~first)[:3]] = 1.0
    return values


def test_a_strength_that_breaks_the_model_does_not_win(tmp_path):
    found = scored({"caa": few_scores()}, {"caa": few_scores()})
    way = found.ways[0]
    assert way.best.alpha == 0.0
    assert (way.strengths[1].missing, way.strengths[1].scored) == (29, 3 / 32)
    assert np.isnan(way.strengths[1].score.estimate)
    assert way.strengths[1].score.method == "too few scored"
    assert scored({"caa": few_scores()}, {"caa": few_scores()}, coverage=0.0).ways[0].best.alpha
    figures, text = written(tmp_path, found)
    assert figures["coverage"] == {"unsteered": 1.0, "caa": 3 / 32}
    assert "No strength beats not steering, for any vector" in text
    assert "Left out: caa: alpha 1 (9% of those reported)" in text


def test_replies_that_were_never_scored_are_refused_with_the_share():
    shown = {PLAIN: few_scores(), Dose("a", 1.0): few_scores()}
    with pytest.raises(InputError, match=r"9\.4% at best, and 95% are needed"):
        compare(
            shown, shown, ["a"], [0.0, 1.0], None, coverage=0.95, boots=100, permutations=100,
            seed=0,
        )  # fmt: skip


def test_perfect_scores_claim_no_certainty_and_neither_do_their_differences():
    near = np.full(64, 0.21)
    found = scored({"a": np.ones(64), "b": near}, {"a": np.ones(64), "b": np.ones(64)})
    best = found.way("a").best.score
    low = binomtest(32, 32).proportion_ci(0.95, method="wilson").low ** 2
    assert (best.estimate, best.high) == (1.0, 1.0)
    assert best.low == pytest.approx(low, abs=1e-9)
    one = next(d for d in found.differences if {d.first, d.second} == {"a", "b"})
    other = found.way("b").best.score
    below = np.hypot(best.estimate - best.low, other.high - other.estimate)
    assert one.difference.estimate == pytest.approx(0.79)
    assert one.difference.low == pytest.approx(0.79 - below)


def test_ways_that_do_the_same_differ_by_nothing():
    same = np.linspace(0.3, 0.9, 64)
    found = scored({"a": same, "b": same}, {"a": np.ones(64), "b": np.ones(64)})
    one = next(d for d in found.differences if {d.first, d.second} == {"a", "b"})
    assert (one.difference.low, one.difference.high, one.p) == (0.0, 0.0, 1.0)


def test_a_way_that_does_not_beat_not_steering_is_a_row_of_dashes_and_no_part_of_a_difference(
    tmp_path,
):
    """At alpha 0 it is the model as it is: what it "does" is nothing it does."""
    rng = np.random.default_rng(0)
    good, bad = 0.5 + 0.1 * rng.random(64), np.zeros(64)
    ones = np.ones(64)
    found = scored(
        {"good": good, "idle": bad, "random_1": bad, "random_2": bad},
        {"good": ones, "idle": ones, "random_1": ones, "random_2": ones},
        controls=["random_1", "random_2"],
    )
    assert [way.name for way in found.ways if way.steers] == ["good"]
    assert [{d.first, d.second} for d in found.differences] == [{"good", UNSTEERED}]
    _, text = written(tmp_path, found, controls=["random_1", "random_2"])
    row = next(line for line in text.splitlines() if line.startswith("| idle |"))
    assert row.count("–") == 8
    assert "no strength beats not steering" in row
    assert "Of idle, no strength beats not steering" in text
    assert "Of any of 2 random directions, no strength beats not steering." in text
    drawn = (tmp_path / "plots" / "pareto.png").read_text(encoding="utf-8")
    assert drawn.count("chosen=None") == 3
    assert drawn.count("chosen=1") == 1


def test_of_equal_strengths_the_weakest_is_chosen_and_none_before_all():
    """Where behaviour never shows, every product is 0: the first of the grid is no winner."""
    doses = [Dose("a", -2.0), PLAIN, Dose("a", 1.0), Dose("a", 2.0)]
    zero = dict.fromkeys(doses, np.zeros(8))
    ones = dict.fromkeys(doses, np.ones(8))
    alphas = [-2.0, 0.0, 1.0, 2.0]
    keys = {"coverage": 0.95, "boots": 100, "permutations": 100, "seed": 0}
    assert compare(zero, ones, ["a"], alphas, None, **keys).ways[0].best.alpha == 0
    equal = {**zero, doses[0]: np.ones(8), doses[2]: np.ones(8), doses[3]: np.ones(8)}
    assert compare(equal, ones, ["a"], alphas, None, **keys).ways[0].best.alpha == 1


def test_the_best_of_several_random_directions_is_told_as_the_maximum_it_is(tmp_path):
    rng = np.random.default_rng(0)
    names = ["caa", *(f"random_{n}" for n in range(1, 7))]
    shown = {name: 0.3 + 0.05 * n + 0.01 * rng.random(64) for n, name in enumerate(names)}
    found = scored(shown, dict.fromkeys(names, np.ones(64)), controls=names[1:])
    _, text = written(tmp_path, found, controls=names[1:])
    top = found.way("random_6").best.score.estimate
    assert (
        rf"The random direction random\_6 scores {top:.3f}, the maximum over 6 random directions"
        in text
    )
    assert "a stronger control than one random direction: caa does not pass it." in text


def test_a_vector_whose_fit_predicts_its_target_badly_says_so_in_its_row_and_in_the_lead(tmp_path):
    found = scored({"ts": np.full(64, 0.6), "caa": np.full(64, 0.5)},
                   {"ts": np.ones(64), "caa": np.ones(64)})  # fmt: skip
    bad = HeldOut(0.11, -0.03, 0.25, 0.01, 0.003, 300, 0.4)
    facts = {"ts": WayFacts(1.0, bad), "caa": WayFacts(1.0)}
    _, text = written(tmp_path, found, facts=facts)
    row = next(line for line in text.splitlines() if line.startswith("| ts |"))
    assert "| 0.11 | -0.03 | 0.25 |" in row
    assert "the fit predicts its target badly" in row
    assert "ts (0.11 [-0.03, 0.25] over 300 held-out vectors)" in text
    good = WayFacts(1.0, HeldOut(0.9, 0.85, 0.93, 0.8, 0.5, 300, 0.9))
    assert "guesswork" not in written(tmp_path, found, facts={"ts": good, "caa": facts["caa"]})[1]


def test_both_halves_are_told_so_that_one_sees_whether_they_are_alike(tmp_path):
    first = halves(64, None, seed=0)
    shown = {PLAIN: np.where(first, 0.1, 0.3), Dose("a", 1.0): np.where(first, 0.5, 0.7)}
    ones = dict.fromkeys(shown, np.ones(64))
    found = compare(shown, ones, ["a"], [0.0, 1.0], None, coverage=0.95, boots=100,
                    permutations=100, seed=0)  # fmt: skip
    _, text = written(tmp_path, found)
    assert "is 0.100 where strengths were chosen and 0.300 [" in text
    row = next(line for line in text.splitlines() if line.startswith("| a |"))
    cells = [cell.strip() for cell in row.split("|")]
    assert (cells[4], cells[7]) == ("0.700", "0.500")


def test_coherence_of_the_unsteered_replies_has_no_interval_where_it_is_1_by_definition(tmp_path):
    shown = {PLAIN: np.linspace(0, 0.4, 64), Dose("a", 1.0): np.full(64, 0.5)}
    fluent = {PLAIN: np.ones(64), Dose("a", 1.0): np.full(64, 0.9)}
    keys = {"coverage": 0.95, "boots": 100, "permutations": 100, "seed": 0}
    found = compare(shown, fluent, ["a"], [0.0, 1.0], None, relative=True, **keys)
    plain = found.unsteered.coherence
    assert (plain.estimate, plain.method) == (1.0, "1 by definition")
    assert np.isnan([plain.low, plain.high]).all()
    assert found.unsteered.score.low < found.unsteered.score.high, "behaviour was measured"
    assert "1 by definition and has no interval" in written(tmp_path, found)[1]
    measured = compare(shown, fluent, ["a"], [0.0, 1.0], None, **keys)
    assert "by definition" not in written(tmp_path, measured)[1]


def test_a_clear_difference_holds_however_many_ways_there_are():
    rng = np.random.default_rng(0)
    arms = [f"way {n}" for n in range(12)]
    behaviour = {PLAIN: np.zeros(80)}
    behaviour |= {Dose(arm, 1.0): 0.3 + 0.1 * rng.random(80) for arm in arms}
    behaviour[Dose("way 3", 1.0)] = 0.8 + 0.1 * rng.random(80)
    coherence = {dose: np.ones(80) for dose in behaviour}
    found = compare(
        behaviour, coherence, arms, [0.0, 1.0], None, coverage=0.95, boots=100, permutations=100,
        seed=0,
    )  # fmt: skip
    assert found.ways[0].name == "way 3"
    own = [one for one in found.differences if one.first == "way 3"]
    assert len(own) + sum(one.second == "way 3" for one in found.differences) == 12
    assert max(one.p_holm for one in own) <= 0.05
    others = [
        one for one in found.differences if not {"way 3", UNSTEERED} & {one.first, one.second}
    ]
    assert sum(one.p_holm <= 0.05 for one in others) <= 1
