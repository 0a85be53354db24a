"""What is said of codes in words, on matrices small enough to check by hand."""

import numpy as np
import pytest

from saefty.code_pca import FORMS, CodePca, Projection, project_codes
from saefty.diagnosis.finding import (
    AXES_SWAPPED,
    DEAD_LATENTS,
    ENCODER_BIAS,
    INPUT_OFFSET,
    OVERFLOW,
    RECONSTRUCTION,
    WEAK_SPARSITY,
    WRONG_TENSOR,
)
from saefty.diagnosis.findings import find_in_codes, two_groups
from saefty.diagnosis.judgement import DEAD_ROWS, MOST_DEAD
from saefty.metrics.firing import firing_stats
from saefty.token_sample import TokenSample, report_sample

SPARSE = np.zeros((4, 40))
SPARSE[range(4), [3, 9, 9, 30]] = [2.0, 1.0, 3.0, 1.5]


def look(z, pca=None, **keys):
    z = np.asarray(z, dtype=np.float64)
    sample = TokenSample((z,), z.shape[1])
    pca = pca or project_codes(sample)
    found = find_in_codes(firing_stats([z]), report_sample(sample), pca, **keys)
    names = [one.name for one in found]
    assert len(set(names)) == len(names)
    return {one.name: one for one in found}


def lines(**along):
    """Return projections whose first components are given."""
    forms = {}
    for form in FORMS:
        line = np.asarray(along.get(form, np.linspace(0, 1, 40)), dtype=float)
        scores = np.stack([line, np.zeros(len(line))], axis=1)
        forms[form] = Projection(scores, (0.5, 0.1), np.zeros((2, 3)), (True, True))
    return CodePca(forms, np.zeros(40, dtype=int), 0.5)


def test_sparse_codes_alarm_nobody():
    found = look(SPARSE, d_sae=40, d_in=10)
    assert {one.severity for one in found.values() if one.name != "dead"} == {"info"}
    assert found["sparse"].numbers["l0"] == 1.0
    assert "On average 1 of 40 latents (2.5%) fire" in found["sparse"].sentence


def test_codes_of_which_half_fire_are_not_sparse_whatever_the_threshold():
    z = np.zeros((4, 6))
    z[:, :3] = [[1, 2, 3], [2, 3, 1], [3, 1, 2], [1, 1, 1]]
    found = look(z, d_sae=6)
    dense = found["dense"]
    assert (dense.severity, dense.numbers["l0"], dense.numbers["share"]) == ("sick", 3.0, 0.5)
    assert "not a matter of outliers" in dense.sentence
    assert "The codes are not sparse" in dense.sentence
    assert WEAK_SPARSITY in dense.suggests
    assert AXES_SWAPPED in dense.suggests
    moot = found["threshold_moot"]
    assert (moot.numbers["l0"], moot.numbers["l0_above"]) == (3.0, 3.0)
    assert "from 0 to 0.1 takes L0 from 3 to 3" in moot.sentence


def test_codes_just_above_zero_are_a_matter_of_the_threshold():
    z = np.full((4, 6), 0.05)
    z[:, 0] = 1.0
    found = look(z)
    assert found["dense"].numbers["l0"] == 6.0
    assert "threshold_moot" not in found


def test_a_tenth_of_the_latents_is_a_warning_and_a_quarter_an_illness():
    z = np.zeros((4, 20))
    z[:, :2] = 1.0
    assert look(z)["dense"].severity == "warning"
    z[:, :5] = 1.0
    assert look(z)["dense"].severity == "sick"


def test_latents_that_always_fire_are_counted_with_their_share_of_l0():
    z = SPARSE.copy()
    z[:, 0] = 1.0
    found = look(z)
    always = found["always_on"]
    # One of 40 latents; 4 of the 8 firings are its.
    assert always.numbers == {"latents": 1, "share": 1 / 40, "l0_share": 0.5, "seldom": 36 / 40}
    assert always.severity == "warning"
    assert always.sentence.startswith("1 latent (2.5%) fire")
    assert ENCODER_BIAS in always.suggests


def test_one_in_many_that_always_fires_is_only_said():
    z = np.zeros((4, 200))
    z[:, 0], z[0, 1] = 1.0, 1.0
    assert look(z)["always_on"].severity == "info"


def test_a_histogram_with_two_ends_has_the_shape_of_a_u():
    z = np.zeros((4, 100))
    z[:, :50], z[:2, 50] = 1.0, 1.0
    found = look(z)
    # 50 always on, 49 never, one on half of the tokens.
    assert "49.0% fire on less than 1 % of them: the histogram has the shape of a U" in (
        found["always_on"].sentence
    )
    assert found["mass_at_one"].numbers == {
        "share": 50 / 51, "decades": pytest.approx(np.log10(2)),
    }  # fmt: skip


def test_the_thirty_most_frequent_are_always_on_only_if_all_of_them_are():
    z = np.zeros((4, 120))
    z[:, :30], z[0, 30:70] = 1.0, 1.0
    top = look(z)["top_always_on"]
    assert "fire on 1.000000 to 1.000000 of the tokens and differ by 0" in top.sentence
    z[0, 29] = 0
    assert "top_always_on" not in look(z)


def test_large_values_of_latents_that_always_fire_hint_at_scale_or_offset():
    z = SPARSE.copy()
    z[:, 0], z[3, 30] = [100.0, 150.0, 120.0, 110.0], 0
    large = look(z)["large_and_always_on"]
    # Means where the three fire: 120, 2 and 2; the median is 2.
    assert large.numbers == {"latents": 1, "largest": 150.0, "typical": 2.0}
    assert "75 times" in large.sentence
    assert INPUT_OFFSET in large.suggests
    z[:, 0] = 0
    z[0, 3] = 150.0
    assert "large_and_always_on" not in look(z)


def test_values_below_zero_are_no_codes_unless_latents_are_signed():
    z = SPARSE.copy()
    z[0, 3] = -2.0
    found = look(z)["negative"]
    assert found.numbers == {"share": 1 / 160, "least": -2.0}
    assert (found.severity, RECONSTRUCTION in found.suggests) == ("sick", True)
    assert "negative" not in look(z, signed=True)


def test_tokens_with_infinity_and_values_at_the_end_of_float16_are_overflow():
    z = SPARSE.copy()
    z[0, 3] = 65504.0
    found = look(z, left_out=1)
    assert found["not_finite"].numbers == {"tokens": 1, "share": 0.2}
    assert "1 of 5 tokens (20.00%)" in found["not_finite"].sentence
    assert found["cut_off"].numbers["latents"] == 1
    assert found["cut_off"].suggests == found["not_finite"].suggests == (OVERFLOW,)
    assert "cut_off" not in look(SPARSE)


def test_a_matrix_as_wide_as_the_input_is_a_reconstruction_and_another_width_other_axes():
    assert look(SPARSE, d_sae=160, d_in=40)["width_of_input"].suggests[0] == RECONSTRUCTION
    other = look(SPARSE, d_sae=4, d_in=10)["other_width"]
    assert "40 wide, but codes of this SAE are 4 wide" in other.sentence
    assert "another SAE's" in other.sentence
    assert other.suggests == (WRONG_TENSOR, AXES_SWAPPED)
    assert not {"width_of_input", "other_width"} & set(look(SPARSE, d_sae=40, d_in=10))


def silent(tokens, *counts, width=20):
    """Return codes whose first latents fire on so many tokens each, and the others never."""
    z = np.zeros((tokens, width))
    for latent, count in enumerate(counts):
        z[:count, latent] = 1.0
    return z


def test_latents_that_never_fire_are_dead_less_those_that_are_only_rare():
    found = look(silent(2000, 2000), lines())["dead"]
    assert found.numbers == {"latents": 19, "share": 0.95, "rare": 0.0, "dead_share": 0.95}
    assert (found.severity, found.suggests) == ("warning", (DEAD_LATENTS,))
    assert "or these texts are narrow" in found.sentence
    # Five fire once, one twice: 1,999 / 2,000 · 5 · 4 / (2 · 2).
    z = silent(2000, 2000, 1, 1, 1, 1, 1, 2, width=100)
    found = look(z, lines())["dead"]
    assert found.numbers["rare"] == pytest.approx(4.9975)
    assert "5 or more of them are only rare" in found.sentence
    # A fifth of the latents fires once: more lie beyond than an estimate can tell.
    z = silent(2000, 2000, 1, 1, 1, 1, 2)
    assert look(z, lines())["dead"].severity == "info"


def test_the_limit_on_dead_latents_is_that_of_the_verdict():
    half = round(20 * MOST_DEAD)
    assert look(silent(2000, *[2000] * half), lines())["dead"].severity == "warning"
    assert look(silent(2000, *[2000] * (half + 1)), lines())["dead"].severity == "info"


def test_few_tokens_call_no_latent_dead():
    found = look(silent(DEAD_ROWS - 1, 2), lines())["dead"]
    assert (found.severity, found.suggests) == ("info", ())
    assert "too few tokens to call a latent dead" in found.sentence


def test_no_number_that_says_nothing_is_said():
    said = " ".join(one.sentence for one in look(silent(2000, 2000), lines()).values())
    assert "-0" not in said
    assert " 0 or more" not in said
    assert "none seems to be merely rare" in said.lower()
    always = look(np.ones((4, 6)))["mass_at_one"].sentence
    assert always.endswith("even the rarest fires on most tokens.")


def test_one_nan_in_many_float32_tokens_is_a_warning_and_blames_no_float16():
    z = silent(2999, 2999)
    found = look(z, lines(), left_out=1)["not_finite"]
    assert (found.severity, found.suggests) == ("warning", ())
    assert "float16" not in found.sentence
    found = look(z, lines(), left_out=30, half=True)["not_finite"]
    assert (found.severity, found.suggests) == ("sick", (OVERFLOW,))
    assert "float16 ran over" in found.sentence


def test_latents_called_rare_are_those_that_more_tokens_show():
    # Each fires on 1 token in 1,000, and 1,000 tokens are seen: none of the silent ones is dead.
    z = (np.random.default_rng(0).random((1000, 500)) < 1e-3).astype(float)
    found = look(z, lines())["dead"]
    assert found.numbers["latents"] > 150
    assert found.numbers["rare"] == pytest.approx(found.numbers["latents"], rel=0.2)
    assert found.severity == "info"


def test_tokens_on_which_nothing_fires_are_said():
    z = SPARSE.copy()
    z[1] = 0
    assert look(z)["silent_tokens"].numbers == {"share": 0.25}


DENSE = np.random.default_rng(0).random((40, 3))


@pytest.mark.parametrize(
    ("along", "words", "cause"),
    [
        ({"raw": [0] * 30 + [9] * 10}, "the offset of the codes shows", INPUT_OFFSET),
        (
            {"raw": [0] * 30 + [9] * 10, "centred": [1] * 30 + [9] * 10},
            "the scale of a few latents shows", "input scale off",
        ),
        (
            {form: [0] * 30 + [9] * 10 for form in FORMS},
            "the tokens are of two kinds", "special tokens among the rows",
        ),
    ],
)  # fmt: skip
def test_a_stripe_beside_a_cloud_is_told_by_what_makes_it_vanish(along, words, cause):
    found = look(DENSE, lines(**along))["stripe_and_cloud"]
    assert "the smaller holds 25.0% of them" in found.sentence
    assert words in found.sentence
    assert found.severity == "warning"
    assert cause in found.suggests
    assert look(SPARSE, lines(**along))["stripe_and_cloud"].severity == "info"


def test_one_cloud_is_no_stripe():
    found = look(DENSE, lines())
    assert "one_cloud" in found
    assert found["one_cloud"].numbers["raw_apart"] == pytest.approx(0.75, abs=1e-3)


def test_two_groups_are_the_cut_that_leaves_the_least_variance():
    rng = np.random.default_rng(1)
    for line in (rng.normal(size=51), rng.exponential(size=40), np.repeat([1.0, 5.0], [3, 9])):
        ordered = np.sort(line)
        total = ((line - line.mean()) ** 2).sum()
        within = [
            sum(((part - part.mean()) ** 2).sum() for part in (ordered[:i], ordered[i:]))
            for i in range(1, len(line))
        ]
        share, smaller = two_groups(line)
        assert share == pytest.approx(1 - min(within) / total)
        cut = int(np.argmin(within)) + 1
        assert smaller == min(cut, len(line) - cut) / len(line)
    assert two_groups(rng.normal(size=100_000))[0] == pytest.approx(2 / np.pi, abs=0.01)
    assert two_groups(np.full(5, 3.0)) == (0.0, 0.0)
    assert two_groups(np.zeros(0)) == (0.0, 0.0)
