"""When an SAE is sick, what it is named as, and what is left open, on figures made by hand."""

import math

import numpy as np
import pytest

from saefty.diagnosis.advice import NOT_ITS_CODES
from saefty.diagnosis.base import Estimate, Figures
from saefty.diagnosis.causes import Trial
from saefty.diagnosis.examination import Examination, Repair, Silence
from saefty.diagnosis.experiments import Point
from saefty.diagnosis.finding import (
    AXES_SWAPPED,
    DEAD_LATENTS,
    ENCODER_BIAS,
    INPUT_OFFSET,
    OVERFLOW,
    SCALE,
    WEAK_SPARSITY,
    WRONG_TENSOR,
    Finding,
)
from saefty.diagnosis.judgement import judge_examination
from saefty.diagnosis.record import SAME_KIND, Record, Recorded, find_record
from saefty.diagnosis.reference import Reference
from saefty.diagnosis.row_quality import RowQuality
from saefty.diagnosis.truncation import Truncation
from saefty.saes.base import SaeConfig

WIDTH, LIMIT = 1000, 100.0
GENERIC = Reference(LIMIT, "a tenth", LIMIT, True)
GOOD = RowQuality(8000, 0, 0, 0, np.zeros(8000, dtype=bool), None)
AWAKE = Silence(100, 5, 10, 400, WIDTH)


def figures(l0, fvu, always=0.0, rows=8000):
    error = Estimate(fvu, 0.005 * fvu)
    return Figures(
        rows, WIDTH, Estimate(l0, 0.005 * l0), error, Estimate(0.1, 0.0), Estimate(always, 0.0)
    )


def examination(l0, fvu, *repairs, truncated=None, reference=GENERIC, silence=AWAKE, **keys):
    first = figures(l0, fvu, **keys)

    def made(cause, l0, fvu, swept=False, evidence=False):
        trial = Trial(
            cause, f"with {cause}", f"It is {cause}.", f"Mend {cause}.", swept=swept,
            evidence=evidence,
        )  # fmt: skip
        after = figures(l0, fvu)
        return Repair(
            trial, after, reference.gain(first, after), reference.removed(first, after), False
        )

    cut = made(WEAK_SPARSITY, *truncated) if truncated else None
    found = tuple(sorted((made(*one) for one in repairs), key=lambda one: -one.gain))
    swept = {"encoder bias": (Point(0.1, 80.0, 0.09, 0.0),)}
    return Examination(first, reference, found, cut, Truncation((), (), None), swept, silence, 1000)


def judged(*args, quality=GOOD, codes=(), **keys):
    return judge_examination(examination(*args, **keys), quality, codes)


def test_a_sparse_code_that_nothing_betters_gets_a_clean_bill_with_its_numbers():
    found = judged(40, 0.1, (SCALE, 60, 0.08, True), (WRONG_TENSOR, 45, 0.3))
    assert found.healthy
    assert found.cause is None
    assert "40 of 1,000 latents" in found.sentence
    assert "FVU is 0.1 (± 0.0005)" in found.sentence
    assert "nothing is recorded, so the limit is 100" in found.sentence


def test_the_repair_that_removes_the_excess_and_brings_fvu_back_is_named():
    found = judged(600, 0.7, (ENCODER_BIAS, 50, 0.05, True), (SCALE, 400, 0.5))
    assert found.cause == ENCODER_BIAS
    assert found.then == f"Mend {ENCODER_BIAS}."
    assert "L0 600 → 50, 100% of the excess L0 removed, FVU 0.7 → 0.05" in found.sentence


def test_truncation_is_named_only_where_no_reading_mends():
    reading = (INPUT_OFFSET, 50, 0.05)
    assert judged(600, 0.7, reading, truncated=(5, 0.7)).cause == INPUT_OFFSET
    found = judged(600, 0.01, (SCALE, 550, 0.02), truncated=(90, 0.03))
    assert found.cause == WEAK_SPARSITY
    assert "less sure" not in found.sentence
    unsure = judged(600, 0.01, (SCALE, 550, 0.02), truncated=(500, 0.03))
    assert unsure.cause == WEAK_SPARSITY
    assert "less sure" in unsure.sentence
    assert "removes 20% of the excess" in unsure.sentence


def test_a_reading_that_lowers_l0_by_raising_fvu_is_not_the_cause():
    found = judged(600, 0.01, (ENCODER_BIAS, 60, 0.4, True), truncated=(90, 0.03))
    assert found.cause == WEAK_SPARSITY


def test_a_reading_without_a_chosen_number_goes_before_a_swept_one_that_does_nearly_as_well():
    plain, swept = (INPUT_OFFSET, 50, 0.051), (SCALE, 50, 0.05, True)
    found = judged(600, 0.7, plain, swept)
    assert found.cause == INPUT_OFFSET
    assert found.possible == ()
    far_better = judged(600, 0.7, (INPUT_OFFSET, 50, 0.3), (SCALE, 50, 0.03, True))
    assert far_better.cause == SCALE


def test_causes_that_mend_alike_are_listed_and_none_is_named():
    found = judged(600, 0.7, (INPUT_OFFSET, 50, 0.051), (WRONG_TENSOR, 50, 0.05))
    assert found.cause is None
    assert set(found.possible) == {INPUT_OFFSET, WRONG_TENSOR}
    assert found.sentence.startswith("Sick: no single cause is named. Not told apart: ")
    assert f"If {WRONG_TENSOR}: Mend {WRONG_TENSOR}." in found.then
    clear = judged(600, 0.7, (INPUT_OFFSET, 50, 0.2), (WRONG_TENSOR, 50, 0.05))
    assert clear.cause == WRONG_TENSOR


@pytest.mark.parametrize(
    ("repair", "sick"),
    [
        ((INPUT_OFFSET, 30, 0.04), True),  # less than half of the error, and sparser
        ((INPUT_OFFSET, 30, 0.06), False),
        ((WRONG_TENSOR, 30, 0.06), True),  # another tensor: less than two thirds
        ((WRONG_TENSOR, 30, 0.068), False),
        ((INPUT_OFFSET, 80, 0.04), True),  # as dense as the SAE's own 0.09, and half of that
        ((INPUT_OFFSET, 80, 0.046), False),
        ((WRONG_TENSOR, 130, 0.01), False),  # dense itself
        ((SCALE, 80, 0.01, True), False),  # a chosen number may not raise L0
        ((SCALE, 40, 0.01, True), True),
        ((INPUT_OFFSET, 15, 0.1), True),  # half of the latents for the same
        ((INPUT_OFFSET, 15, 0.11), False),
        (("number format", 30, 0.01, False, True), False),  # evidence
    ],
)
def test_a_better_reading_makes_sick_what_looks_healthy(repair, sick):
    found = judged(40, 0.1, repair)
    assert found.healthy is not sick, found.sentence
    if sick:
        assert found.cause == repair[0]
        assert "There is a better reading" in found.sentence


def test_a_better_reading_must_lie_beyond_the_sampling_error():
    assert judged(40, 0.1, (INPUT_OFFSET, 40, 0.0495)).healthy
    assert not judged(40, 0.1, (INPUT_OFFSET, 40, 0.047)).healthy


def test_hardly_any_error_is_not_halved_by_a_better_reading():
    assert judged(40, 0.012, (WRONG_TENSOR, 40, 0.004)).healthy


@pytest.mark.parametrize(
    ("silence", "rows", "sick"),
    [
        (Silence(600, 3, 5, 400, WIDTH), 8000, True),
        (Silence(400, 3, 5, 400, WIDTH), 8000, False),
        (Silence(700, 120, 60, 400, WIDTH), 8000, False),  # too many at the edge of these texts
        (Silence(600, 3, 5, 40, WIDTH), 600, False),  # too few rows
        (Silence(520, 45, 20, 400, WIDTH), 8000, False),  # more texts would wake some fifty
        (Silence(700, 50, 2, 400, WIDTH), 8000, False),  # how many is not known
    ],
)
def test_half_of_the_latents_must_be_dead_beyond_what_more_texts_would_wake(silence, rows, sick):
    found = judged(40, 0.1, silence=silence, rows=rows)
    assert found.healthy is not sick, found.sentence
    assert (found.cause == DEAD_LATENTS) is sick


def test_a_reading_that_mends_goes_before_dead_latents():
    dead = Silence(600, 3, 5, 400, WIDTH)
    assert judged(40, 0.9, (SCALE, 40, 0.05), silence=dead).cause == SCALE


def test_rows_that_were_cut_off_are_named_before_any_experiment():
    cut = RowQuality(8000, 0, 100, 0, np.zeros(8000, dtype=bool), None)
    found = judged(600, 0.7, (SCALE, 50, 0.05), quality=cut)
    assert found.cause == OVERFLOW
    assert "100 of 8,000 rows (1.2%) hold 65,504 exactly" in found.sentence
    few = RowQuality(8000, 3, 2, 0, np.zeros(8000, dtype=bool), None)
    assert judged(40, 0.1, quality=few).healthy


def test_what_kept_codes_are_goes_before_everything():
    codes = [
        Finding("these", "info", "They are codes.", {}, (SCALE,)),
        Finding("swapped", "sick", "They lie the other way.", {}, (AXES_SWAPPED,)),
    ]
    found = judged(600, 0.7, (SCALE, 50, 0.05), codes=codes)
    assert found.cause == AXES_SWAPPED
    assert "Transpose" in found.then


def test_a_poor_reconstruction_that_nothing_mends_is_sick_without_a_cause():
    found = judged(40, 1.3, (SCALE, 40, 1.2))
    assert not found.healthy
    assert found.cause is None
    assert "nothing of the variance" in found.sentence
    assert "another model" in found.then


def test_many_latents_that_are_always_on_are_sick():
    assert not judged(90, 0.1, always=0.02).healthy
    assert judged(90, 0.1, always=0.01).healthy


def test_far_above_the_record_is_sick_though_the_generic_limit_holds():
    sae = SaeConfig("relu", 8, WIDTH, 1).build()
    record = Record({"l0": Recorded(10.0, "x", SAME_KIND), "fvu": Recorded(0.1, "x", SAME_KIND)})
    reference = Reference.of(sae, record)
    assert reference.l0 == 10.0
    found = judged(40, 0.1, (SCALE, 11, 0.1), reference=reference)
    assert found.cause == SCALE
    assert "4.0 times the recorded 10" in found.sentence
    assert judged(15, 0.1, reference=reference).healthy
    worse = judged(10, 0.3, (SCALE, 10, 0.1), reference=reference)
    assert "3.0 times the recorded 0.1" in worse.sentence


def test_a_record_that_is_dense_itself_is_no_reference():
    record = Record({"l0": Recorded(600.0, "x", SAME_KIND)})
    assert Reference.of(SaeConfig("relu", 8, WIDTH, 1).build(), record).l0 == 100
    assert not judged(600, 0.01, truncated=(90, 0.02)).healthy


def test_a_chosen_k_is_no_excess_up_to_a_quarter_of_the_latents():
    assert Reference.of(SaeConfig("topk", 8, 400, 80).build(), Record()).limit == 80
    assert Reference.of(SaeConfig("topk", 8, 400, 200).build(), Record()).limit == 100
    assert Reference.of(SaeConfig("relu", 8, 400, 80).build(), Record()).limit == 40


def test_a_few_latents_of_a_small_sae_are_no_dense_code():
    assert Reference.of(SaeConfig("relu", 8, 96, 8).build(), Record()).limit == 16
    assert Reference.of(SaeConfig("relu", 8, 40, 8).build(), Record()).limit == 10


def test_a_recorded_l0_is_the_reference_but_makes_no_dense_code_sparse():
    recorded = Record({"l0": Recorded(39.0, "x", SAME_KIND)})
    assert Reference.of(SaeConfig("relu", 8, 400, 8).build(), recorded).l0 == 39
    dense = Record({"l0": Recorded(80.0, "x", SAME_KIND)})
    found = Reference.of(SaeConfig("relu", 8, 400, 8).build(), dense)
    assert (found.l0, found.limit) == (40, 40)


def test_the_gain_is_that_of_its_formula_and_falls_with_l0_and_fvu():
    first = figures(600, 0.5)
    gain = GENERIC.gain(first, figures(50, 0.1))
    assert gain == pytest.approx(math.log(600 / 100) + math.log(0.52 / 0.12))
    assert GENERIC.gain(first, figures(600, 0.52)) == 0.0  # the first 0.02 are not counted
    assert GENERIC.gain(first, figures(600, 0.6)) == pytest.approx(math.log(0.52 / 0.6))
    assert GENERIC.gain(first, figures(50, math.nan)) == -math.inf
    for l0 in (20, 100, 300, 900):
        for fvu in (0.01, 0.3, 0.5, 0.7):
            here = GENERIC.gain(first, figures(l0, fvu))
            assert GENERIC.gain(first, figures(1.5 * l0, fvu)) <= here
            assert GENERIC.gain(first, figures(l0, 1.5 * fvu)) <= here
    assert GENERIC.removed(first, figures(350, 0.5)) == pytest.approx(0.5)
    assert GENERIC.removed(figures(80, 0.5), figures(50, 0.5)) is None


def judged_by(expected_fvu, fvu, **keys):
    """Judge an SAE with an FVU that is recorded, or that the user gives."""
    sae = SaeConfig("relu", 8, WIDTH, 1).build()
    return judged(40, fvu, reference=Reference.of(sae, find_record(sae, fvu=expected_fvu)), **keys)


def test_an_expected_fvu_is_meant_and_a_recorded_one_has_a_slack_that_is_stated():
    wrong = judged_by(0.001, 0.028)
    assert not wrong.healthy
    assert "28.0 times the expected 0.001; more than 2 times it is too much" in wrong.sentence
    right = judged_by(0.02, 0.028)
    assert right.healthy
    assert "expected 0.02, of which 2 times passes" in right.sentence
    sae = SaeConfig("relu", 8, WIDTH, 1).build()
    recorded = Reference.of(sae, Record({"fvu": Recorded(0.01, "x", SAME_KIND)}))
    slack = judged(40, 0.028, reference=recorded)
    assert slack.healthy
    assert "recorded 0.01, of which 2 times and 0.02 passes" in slack.sentence
    worse = judged(40, 0.05, reference=recorded)
    assert "5.0 times the recorded 0.01; more than 2 times it and 0.02 is too much" in (
        worse.sentence
    )


def test_an_expected_l0_is_not_called_recorded():
    sae = SaeConfig("relu", 8, WIDTH, 1).build()
    reference = Reference.of(sae, find_record(sae, l0=10))
    assert (
        "4.0 times the expected 10; more than 2 times"
        in judged(40, 0.1, reference=reference).sentence
    )


@pytest.mark.parametrize(
    ("plain", "swept", "cause", "possible"),
    [
        (0.038, 0.0295, SCALE, ()),  # surely lower, and by a quarter
        (0.034, 0.0295, None, (SCALE, INPUT_OFFSET)),  # surely, and by a seventh
        (0.0305, 0.0295, INPUT_OFFSET, ()),  # by hardly anything
        (0.0295, 0.0305, INPUT_OFFSET, ()),
    ],
)
def test_a_surely_lower_fvu_wins_over_a_reading_without_a_chosen_number_or_stands_beside_it(
    plain, swept, cause, possible
):
    found = judged(40, 0.09, (INPUT_OFFSET, 40, plain), (SCALE, 40, swept, True))
    assert found.cause == cause
    assert set(found.possible) == set(possible)
    if cause:
        assert found.named.trial.cause == cause
        assert f"There is a better reading: with with {cause} FVU" in found.sentence


def test_of_two_swept_readings_the_one_of_surely_lower_fvu_is_the_cause():
    found = judged(40, 2.3, (SCALE, 40, 0.0295, True), (INPUT_OFFSET, 40, 0.0385, True))
    assert found.cause == SCALE


def test_a_better_reading_above_the_record_is_said_to_be_no_more_than_that():
    sae = SaeConfig("relu", 8, WIDTH, 1).build()
    reference = Reference.of(sae, Record({"fvu": Recorded(0.03, "x", SAME_KIND)}))
    far = judged(40, 0.25, (INPUT_OFFSET, 40, 0.04), reference=reference)
    assert far.cause == INPUT_OFFSET
    assert "a better reading, but not yet the recorded FVU of 0.03" in far.sentence
    near = judged(40, 0.25, (INPUT_OFFSET, 40, 0.03), reference=reference)
    assert "not yet" not in near.sentence


def test_nan_is_an_overflow_only_where_the_rows_show_float16():
    special = np.zeros(8000, dtype=bool)
    unknown = judged(40, 0.1, quality=RowQuality(8000, 100, 0, 0, special, None))
    assert not unknown.healthy
    assert unknown.cause is None
    assert "why is not known" in unknown.sentence
    assert "read off" not in unknown.sentence
    for shown in (
        RowQuality(8000, 100, 0, 0, special, None, half=True),
        RowQuality(8000, 100, 3, 0, special, None),
    ):
        assert judged(40, 0.1, quality=shown).cause == OVERFLOW


def test_kept_codes_that_are_of_another_sae_are_named_and_not_the_sae():
    codes = [Finding("unknown_codes", "sick", "The kept matrix is 64 wide.")]
    found = judged(40, 0.1, codes=codes)
    assert not found.healthy
    assert found.cause == NOT_ITS_CODES
    assert "damaged weights" not in found.sentence + found.then


def test_more_texts_never_wake_fewer_than_no_latents():
    assert str(Silence(400, 0, 0, 400, WIDTH).unseen) == "0.0"
