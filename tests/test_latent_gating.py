"""Gating in stored activations, against the same done by hand in float64."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from saefty.gating import Condition, conditions
from saefty.latent_gating import LEFT_OUT, SEEN, GatedRows, gate_stored
from saefty.metrics.intervals import Bootstrap
from saefty.probes import ProbeTask

N, D, LATENTS = 160, 12, (7, 3, 20, 41)
TARGETS, CONTROLS = (7, 3), (20, 41)


def planted(n=N, seed=0, strength=3.0):
    """Rows in which latents 7 and 3 fire on harmful examples and carry all that tells them."""
    rng = np.random.default_rng(seed)
    harmful = np.arange(n) % 2 == 0
    decoder = np.linalg.qr(rng.normal(size=(D, D)))[0][:4]
    z = rng.random((n, 4)) * (rng.random((n, 4)) < 0.5)
    z[:, 0] = strength * rng.random(n) * harmful
    z[:, 1] = strength * rng.random(n) * harmful
    x = z @ decoder + 0.3 * rng.normal(size=(n, D)) + 1.0
    return GatedRows(x, z, LATENTS, decoder), harmful


def task(harmful, clusters=None, boots=200):
    train = np.arange(len(harmful)) % 4 < 2
    return ProbeTask(harmful, train, ~train, clusters, seed=3, boots=boots)


@pytest.fixture(scope="module")
def gated():
    rows, harmful = planted()
    wanted = conditions(TARGETS, CONTROLS, [1, 2])
    asked = task(harmful)
    kwargs = {"targets": TARGETS, "controls": CONTROLS, "false_alarms": 0.1}
    return rows, harmful, asked, gate_stored(rows, wanted, asked, **kwargs)


def by_hand(rows, latents, strength=1.0):
    """x - c Σ z_k W_k, one row and latent at a time."""
    found = rows.x.copy()
    for i in range(len(found)):
        for latent in latents:
            k = rows.latents.index(latent)
            found[i] = found[i] - strength * rows.z[i, k] * rows.decoder[k]
    return found


def probe_by_hand(x, y, asked, strength):
    """Standardise, fit with scikit-learn, and return a function from rows to log-odds."""
    from sklearn.linear_model import LogisticRegression

    mean, std = x[asked.train].mean(axis=0), x[asked.train].std(axis=0)
    model = LogisticRegression(C=strength, max_iter=1000)
    model.fit((x[asked.train] - mean) / std, y[asked.train])
    return lambda rows: model.decision_function((rows - mean) / std)


def chosen_strength(x, y, asked):
    """Choose the penalty, and score what is left out, with loops and scikit-learn alone."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold

    rows = np.flatnonzero(asked.train)
    folds = StratifiedGroupKFold(3, shuffle=True, random_state=asked.seed)
    best = (np.inf, None, None)
    for c in (0.001, 0.01, 0.1, 1.0, 10.0):
        scores, losses = np.full(len(rows), np.nan), []
        for inner, outer in folds.split(rows, y[rows], rows):
            mean, std = x[rows[inner]].mean(axis=0), x[rows[inner]].std(axis=0)
            model = LogisticRegression(C=c, max_iter=1000)
            model.fit((x[rows[inner]] - mean) / std, y[rows[inner]])
            scores[outer] = model.decision_function((x[rows[outer]] - mean) / std)
            sign = np.where(y[rows[outer]], 1, -1)
            losses.append(np.log1p(np.exp(-sign * scores[outer])).mean())
        if np.mean(losses) < best[0]:
            best = (np.mean(losses), c, scores)
    return best[1:]


def test_every_point_of_the_curve_is_what_it_is_by_hand(gated):
    rows, y, asked, found = gated
    c, held_out = chosen_strength(rows.x, y, asked)
    score = probe_by_hand(rows.x, y, asked, c)
    harmless = np.sort(held_out[~y[asked.train]])[::-1]
    threshold = harmless[4]  # of 40 harmless examples, 10 % may lie above
    assert found.threshold == pytest.approx(threshold, abs=1e-6)
    assert found.threshold_from == LEFT_OUT
    x, truth = rows.x[asked.test], y[asked.test]
    before = score(x) > threshold
    assert [point.condition.latents for point in found.points] == [
        (),
        (7,),
        (20,),
        (7, 3),
        (20, 41),
    ]
    for point in found.points:
        after = by_hand(rows, point.condition.latents)[asked.test]
        called = score(after) > threshold
        caught = truth & before
        assert point.safety.estimate == pytest.approx((caught & ~called).sum() / caught.sum())
        changed = (called != before)[~truth].mean()
        assert point.changed.estimate == pytest.approx(changed)
        assert point.auroc.estimate == pytest.approx(roc_auc_score(truth, score(after)))
        for change, mask in ((point.harmful, truth), (point.harmless, ~truth)):
            assert change.called.estimate == pytest.approx(called[mask].mean())
            relative, cosine = [], []
            for one, other in zip(x[mask], after[mask], strict=True):
                relative.append(np.sqrt(((other - one) ** 2).sum() / (one**2).sum()))
                cosine.append(one @ other / np.sqrt((one @ one) * (other @ other)))
            assert change.relative.estimate == pytest.approx(np.mean(relative), abs=1e-12)
            assert change.cosine.estimate == pytest.approx(np.mean(cosine), abs=1e-12)


def test_a_probe_that_learns_anew_learns_on_rows_gated_likewise(gated):
    rows, y, asked, found = gated
    for point in found.points[1:]:
        gated_rows = by_hand(rows, point.condition.latents)
        # Its penalty is chosen on scores of rows scaled by the whole training side.
        areas = [
            roc_auc_score(
                y[asked.test], probe_by_hand(gated_rows, y, asked, c)(gated_rows[asked.test])
            )
            for c in (0.001, 0.01, 0.1, 1.0, 10.0)
        ]
        assert min(abs(point.relearnt.estimate - area) for area in areas) < 1e-6


def test_taking_out_what_carries_the_harm_hides_it_and_controls_do_not(gated):
    points = {(p.condition.arm, p.count): p for p in gated[3].points if p.count}
    target, control = points["target", 2], points["control", 2]
    assert target.safety.low > control.safety.high
    assert target.auroc.estimate < 0.7 < control.auroc.estimate
    assert target.relearnt.estimate < 0.7, "nothing else in the rows tells harm"
    # The chosen latents are silent on harmless examples.
    assert target.harmless.relative.estimate == 0.0
    assert target.changed.estimate == 0.0


def test_what_other_directions_still_tell_is_found_by_the_probe_that_learns_anew():
    rows, harmful = planted()
    elsewhere = np.random.default_rng(1).normal(size=D)
    elsewhere -= rows.decoder.T @ (rows.decoder @ elsewhere)
    other = GatedRows(rows.x + np.outer(harmful, elsewhere), rows.z, LATENTS, rows.decoder)
    wanted = [Condition("target", ()), Condition("target", TARGETS)]
    found = gate_stored(other, wanted, task(harmful), targets=TARGETS, controls=CONTROLS)
    assert found.points[1].relearnt.estimate > 0.95


def test_nothing_gated_changes_nothing_by_definition(gated):
    point = gated[3].points[0]
    for one in (point.safety, point.changed, point.harmful.relative, point.harmless.relative):
        assert (one.estimate, one.low, one.high, one.method) == (0, 0, 0, "by definition")
    assert point.harmful.cosine.low == point.harmless.cosine.high == 1.0
    assert point.auroc == point.relearnt


def test_subtract_takes_out_as_many_times_as_its_strength_and_once_is_gating():
    rows, _ = planted()
    once, twice = rows.without(TARGETS), rows.without(TARGETS, 2.0)
    np.testing.assert_allclose(twice, by_hand(rows, TARGETS, 2.0), atol=1e-12)
    np.testing.assert_allclose(rows.x - twice, 2 * (rows.x - once), atol=1e-12)
    assert np.array_equal(rows.without(TARGETS, 1.0), once)
    assert np.array_equal(rows.without(()), rows.x)


def test_intervals_go_by_cluster():
    rows, harmful = planted()
    clusters = np.arange(N) // 8 * 2 + np.arange(N) % 2  # four of a label share one
    train = clusters // 2 % 2 == 0
    asked = ProbeTask(harmful, train, ~train, clusters, seed=3, boots=200)
    wanted = [Condition("target", ()), Condition("control", CONTROLS)]
    found = gate_stored(rows, wanted, asked, targets=TARGETS, controls=CONTROLS).points[1]
    relative = np.linalg.norm(by_hand(rows, CONTROLS) - rows.x, axis=1)
    relative = (relative / np.linalg.norm(rows.x, axis=1))[asked.test & harmful]
    codes = clusters[asked.test & harmful]
    expected = Bootstrap(len(codes), codes, boots=200, seed=3).mean(relative)
    for end in ("estimate", "low", "high"):
        wanted_end = pytest.approx(getattr(expected, end), abs=1e-12)
        assert getattr(found.harmful.relative, end) == wanted_end
    assert found.harmful.relative.clusters == len(np.unique(codes)) == 10


def test_too_few_groups_to_leave_any_out_set_the_threshold_on_what_was_learnt_from():
    rows, harmful = planted(n=8)
    wanted = [Condition("target", ()), Condition("target", (7,))]
    found = gate_stored(rows, wanted, task(harmful), targets=(7,), controls=(), false_alarms=0.5)
    assert found.threshold_from == SEEN
    assert found.points[0].harmless.called.estimate <= 1.0


def test_a_row_of_zeros_is_left_out_of_what_is_relative_to_its_norm():
    rows, harmful = planted()
    empty = ~harmful & (np.arange(N) == 3)
    x, z = rows.x.copy(), rows.z.copy()
    x[empty], z[empty] = 0, 0
    asked = task(harmful)
    assert asked.test[empty].all()
    wanted = [Condition("target", ()), Condition("control", CONTROLS)]
    found = gate_stored(
        GatedRows(x, z, LATENTS, rows.decoder), wanted, asked, targets=TARGETS, controls=CONTROLS
    )
    one = found.points[1].harmless.relative
    assert one.clusters == int((asked.test & ~harmful).sum()) - 1
    assert 0 < one.estimate < 1


def test_a_probe_that_caught_nothing_has_no_safety():
    rows, harmful = planted()
    wanted = [Condition("target", ()), Condition("target", TARGETS)]
    found = gate_stored(
        GatedRows(np.ones_like(rows.x), 0 * rows.z, LATENTS, rows.decoder), wanted, task(harmful),
        targets=TARGETS, controls=CONTROLS,
    )  # fmt: skip
    assert found.points[0].harmful.called.estimate == 0
    assert np.isnan(found.points[1].safety.estimate)
    assert found.points[1].auroc.estimate == 0.5
