"""The doctor's experiments against float64 NumPy that shares no code with them."""

import numpy as np
import pytest
import torch

from diagnosis.test_measure import M, agree, chosen, figures, held, random_rows, random_sae
from saefty.diagnosis.base import Change, Rows, measure
from saefty.diagnosis.examination import examine, silence
from saefty.diagnosis.experiments import part_of, plain_trials, search, sweeps
from saefty.diagnosis.finding import ENCODER_BIAS, SCALE, STANDARDISATION
from saefty.diagnosis.record import Record
from saefty.diagnosis.reference import SAME_FVU, Reference
from saefty.diagnosis.truncation import truncations
from saefty.metrics.rarity import unseen
from saefty.saes.base import SaeConfig

NOTHING = Record()


def sparse_world(n=1500, width=32, k=3, noise=0.0):
    """Return rows that are sums of a few directions, and a ReLU SAE that finds these."""
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.standard_normal((width, width)))[0]
    z = np.zeros((n, width))
    for row in z:
        row[rng.choice(width, k, replace=False)] = rng.uniform(1, 2, k)
    x = z @ directions + noise * rng.standard_normal((n, width))
    sae = SaeConfig("relu", width, width, k).build().eval()
    with torch.no_grad():
        sae.W_enc.copy_(torch.from_numpy(directions.T))
        sae.W_dec.copy_(torch.from_numpy(directions))
        sae.b_enc.fill_(-0.01)
    rows = Rows(torch.from_numpy(x).float(), np.arange(n) // 15, np.arange(n) % 15)
    return sae, rows


@pytest.mark.parametrize("arch", ["relu", "jumprelu", "topk", "topk_abs"])
def test_another_encoder_bias_is_what_it_says(arch):
    sae, rows = random_sae(arch), random_rows()
    w, x = held(sae), rows.x.double().numpy()
    b_enc = np.random.default_rng(8).standard_normal(M) * 3
    (found,) = measure(sae, rows, [Change(b_enc=torch.from_numpy(b_enc))])
    z = chosen(arch, {**w, "b_enc": b_enc}, x @ w["W_enc"])
    agree(found, figures(x, z, z @ w["W_dec"] + w["b_dec"]))


def test_magnitudes_of_a_gated_sae_move_with_another_bias():
    sae, rows = random_sae("gated"), random_rows()
    w, x = held(sae), rows.x.double().numpy()
    (found,) = measure(sae, rows, [Change(b_enc=sae.b_enc.detach() - 2.0)])
    z = chosen("gated", w, x @ w["W_enc"] - 2.0)
    agree(found, figures(x, z, z @ w["W_dec"] + w["b_dec"]))


def test_a_row_norm_in_the_place_of_none_is_that_of_the_definition():
    sae, rows = random_sae("relu"), random_rows()
    w, x = held(sae), rows.x.double().numpy()
    mean, deviation = x.mean(axis=1, keepdims=True), x.std(axis=1, ddof=1, keepdims=True)
    z = chosen("relu", w, (x - mean) / (deviation + 1e-5) @ w["W_enc"])
    (found,) = measure(sae, rows, [Change(row_norm="layer_norm")])
    agree(found, figures(x, z, (z @ w["W_dec"] + w["b_dec"]) * deviation + mean))


@pytest.mark.parametrize("arch", ["relu", "topk_abs"])
def test_truncation_keeps_the_latents_that_add_most_to_the_reconstruction(arch):
    sae, rows = random_sae(arch), random_rows()
    w, x = held(sae), rows.x.double().numpy()
    z = chosen(arch, w, x @ w["W_enc"])
    adds = np.abs(z) * np.linalg.norm(w["W_dec"], axis=1)
    least = float(np.median(adds[adds > 0]))
    by_k = np.zeros_like(z)
    for row, strength, out in zip(z, adds, by_k, strict=True):
        kept = np.argsort(-strength)[:4]
        out[kept] = row[kept]
    by_threshold = np.where(adds >= least, z, 0)
    found = measure(sae, rows, [Change(keep=4), Change(least=least), Change(keep=M + 5)])
    for one, wanted in zip(found, (by_k, by_threshold, z), strict=True):
        agree(one, figures(x, wanted, wanted @ w["W_dec"] + w["b_dec"]))


def test_the_truncated_l0_is_the_smallest_of_all_ks_and_many_thresholds_with_the_same_fvu():
    sae, rows = sparse_world(noise=0.2)
    w, x = held(sae), rows.x.double().numpy()
    z = chosen("relu", w, x @ w["W_enc"])
    width = z.shape[1]
    (first,) = measure(sae, rows, [Change()])
    found = truncations(sae, rows, first)
    adds = np.abs(z) * np.linalg.norm(w["W_dec"], axis=1)
    ranks = (-adds).argsort(axis=1).argsort(axis=1)
    kept = [z * (ranks < k) for k in range(1, width + 1)]
    kept += [z * (adds >= t) for t in np.quantile(adds[adds > 0], np.linspace(0, 1, 400))]
    spread = ((x - x.mean(axis=0)) ** 2).sum()
    fvu = [((x - one @ w["W_dec"]) ** 2).sum() / spread for one in kept]
    limit = first.fvu.value + SAME_FVU
    l0 = [(one != 0).sum(axis=1).mean() for one in kept]
    best = min(n for n, f in zip(l0, fvu, strict=True) if f <= limit)
    (reached,) = measure(sae, rows, [found.trial.change])
    assert reached.fvu.value <= limit + 1e-6
    assert reached.l0.value == pytest.approx(best, rel=0.02)
    assert reached.l0.value < 0.9 * first.l0.value
    for one in found.by_k:
        assert one.fvu == pytest.approx(fvu[min(round(one.value), width) - 1], rel=1e-4)


def test_standardised_readings_use_the_rows_own_mean_and_deviation():
    sae, rows = random_sae("relu"), random_rows()
    w, x = held(sae), rows.x.double().numpy()
    per_dimension, common = [
        one for one in plain_trials(sae, rows)
        if one.cause == STANDARDISATION and one.what.startswith("the mean")
    ]  # fmt: skip
    mean, each = x.mean(axis=0), x.std(axis=0)
    for trial, deviation in ((per_dimension, each), (common, np.sqrt((each**2).mean()))):
        z = chosen("relu", w, (x - mean) / deviation @ w["W_enc"])
        (found,) = measure(sae, rows, [trial.change])
        agree(found, figures(x, z, (z @ w["W_dec"] + w["b_dec"]) * deviation + mean))


@pytest.mark.parametrize(
    ("cause", "name", "planted"),
    [(ENCODER_BIAS, "encoder bias", 0.37), (SCALE, "scale", 7.0)],
)
def test_a_sweep_finds_the_number_that_was_planted(cause, name, planted):
    sae, rows = sparse_world()
    with torch.no_grad():
        if name == "scale":
            sae.b_enc.fill_(-0.3)
        (sound,) = measure(sae, rows, [Change()])
        if name == "scale":
            sae.W_enc.mul_(planted)
            sae.W_dec.div_(planted)
        else:
            sae.b_enc.add_(planted)
    reference = Reference.of(sae, NOTHING)
    (first,) = measure(sae, rows, [Change()])
    sweep = next(one for one in sweeps(sae, rows) if one.name == name)
    value, points = search(sweep, sae, rows, first, reference)
    best = next(one for one in points if one.value == value)
    assert sweep.trial(value).cause == cause
    assert best.fvu < 0.2 * first.fvu.value
    assert best.l0 < 1.3 * sound.l0.value
    assert [one.value for one in points] == sorted(one.value for one in points)


def test_every_value_of_a_sweep_is_measured_as_numpy_does():
    sae, rows = random_sae("relu"), random_rows()
    w, x = held(sae), rows.x.double().numpy()
    (first,) = measure(sae, rows, [Change()])
    sweep = next(one for one in sweeps(sae, rows) if one.name == "scale about the mean")
    _, points = search(sweep, sae, rows, first, Reference.of(sae, NOTHING))
    mean = x.mean(axis=0)
    for one in points[::5]:
        z = chosen("relu", w, one.value * (x - mean) @ w["W_enc"])
        wanted = figures(x, z, (z @ w["W_dec"] + w["b_dec"]) / one.value + mean)
        assert one.l0 == pytest.approx(wanted["l0"], rel=1e-4)
        assert one.fvu == pytest.approx(wanted["fvu"], rel=1e-4)


def test_silence_counts_the_texts_in_which_each_latent_fires():
    sae, rows = random_sae("topk"), random_rows()
    w, x = held(sae), rows.x.double().numpy()
    z = chosen("topk", w, x @ w["W_enc"])
    in_texts = [len(set(rows.text[z[:, latent] != 0])) for latent in range(M)]
    found = silence(sae, rows)
    assert (found.silent, found.once, found.twice) == tuple(in_texts.count(n) for n in range(3))
    assert found.texts == rows.text[-1] + 1


def test_silence_does_not_depend_on_where_a_pass_cuts_the_texts(monkeypatch):
    sae, rows = random_sae("topk"), random_rows()
    whole = silence(sae, rows)
    monkeypatch.setattr("saefty.diagnosis.examination.ENCODED", 7)
    assert silence(sae, rows) == whole


def test_latents_that_fire_once_say_how_many_were_missed():
    rng = np.random.default_rng(3)
    rates = 10 ** rng.uniform(-3.5, -1, 4000)
    fired = rng.binomial(300, rates)
    more = fired + rng.binomial(100_000, rates)
    count, error = unseen(int((fired == 1).sum()), int((fired == 2).sum()), 300)
    woken = int(((fired == 0) & (more > 0)).sum())
    assert 0.3 * woken < count < woken + 3 * error  # a lower bound
    assert unseen(0, 0, 300) == (0.0, 0.0)
    assert unseen(5, 0, 0) == (0.0, 0.0)


def test_a_part_of_the_rows_is_made_of_whole_texts_spread_over_all_of_them():
    rows = random_rows(900)
    part = part_of(rows, 300)
    assert len(part.x) == 300
    assert set(np.bincount(part.text)) == {15}
    assert part_of(rows, 5000) is rows
    one_text = Rows(rows.x, np.zeros(900, np.int64), np.arange(900))
    assert 280 <= len(part_of(one_text, 300).x) <= 320


def test_an_examination_measures_every_reading_on_all_rows_and_ranks_by_gain():
    sae, rows = sparse_world()
    with torch.no_grad():
        sae.b_enc.add_(0.8)
    found = examine(sae, {"read": rows}, Reference.of(sae, NOTHING))
    gains = [one.gain for one in found.repairs]
    assert gains == sorted(gains, reverse=True)
    assert found.repairs[0].trial.cause == ENCODER_BIAS
    for one in found.repairs:
        assert one.figures.n_rows == len(rows.x)
        (alone,) = measure(sae, rows, [one.trial.change])
        assert alone.l0.value == pytest.approx(one.figures.l0.value, rel=1e-6)
    assert found.own_best(1e9) <= found.own_best(found.as_it_is.l0.value)


def test_of_a_chosen_k_truncation_says_that_k_is_too_large_and_what_fvu_may_rise_by():
    sae, rows = sparse_world(noise=0.2)
    topk = SaeConfig("topk", 32, 32, 12).build().eval()
    with torch.no_grad():
        topk.W_enc.copy_(sae.W_enc)
        topk.W_dec.copy_(sae.W_dec)
    for patient, said in ((topk, "k is too large (12)"), (sae, "The sparsity penalty is too weak")):
        (first,) = measure(patient, rows, [Change()])
        trial = truncations(patient, rows, first).trial
        assert trial.meaning.startswith(said)
        assert trial.meaning.endswith("raise FVU by at most 0.02.")
        assert "same reconstruction" not in trial.meaning
        assert "sae.k=" in trial.then
        assert ("penalty" in trial.then) is (patient is sae)
