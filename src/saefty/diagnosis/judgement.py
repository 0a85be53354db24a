"""Whether an SAE is sick without a record, and what of.

Sick is an SAE whose code is dense, whose reconstruction is poor, half of whose latents are dead,
whose numbers are not finite or cut off, or for which *a better reading exists*: a change of
convention that leaves less than half of the error (another block: less than two thirds). One that
raises L0 must leave less than that share of what the SAE as it is read reaches with as many
latents, by the best of the thresholds, biases and scales that were tried; and a chosen number may
not raise L0 at all.

A *cause* is the repair with the largest gain (see `reference`) that raises no FVU and removes at
least half of the excess L0; causes that are not told apart (see `ranking`) are listed, and none is
named. Truncation lowers any L0, so that a
weak penalty is named only where the code is dense and no reading mends it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from saefty.diagnosis.advice import (
    DIRECT,
    FIND_NONFINITE,
    NOT_ITS_CODES,
    NOT_KNOWN,
    OF_ANOTHER,
    OF_CODES,
    OF_OTHER_CODES,
)
from saefty.diagnosis.examination import Examination, Repair, Silence
from saefty.diagnosis.finding import (
    DEAD_LATENTS,
    ENCODER_BIAS,
    OVERFLOW,
    THRESHOLDS,
    WEAK_SPARSITY,
    WRONG_TENSOR,
    Finding,
)
from saefty.diagnosis.ranking import ranked_causes
from saefty.diagnosis.reference import FAR, SAME_FVU, Reference, fvu_of
from saefty.diagnosis.row_quality import RowQuality

MOST_ALWAYS_ON = 0.01
"""Share of the latents that may be on at 99 % of the tokens."""
POOR = 0.5
"""FVU above which a reconstruction is poor whatever is recorded."""
MOST_DEAD = 0.5
MOST_ONCE = 0.05
"""Share of latents that may have fired in a single text for the others to be called dead: where
more lie at the edge of what these texts show, more lie beyond it than an estimate can tell."""
BETTER = 2.0
"""How many times smaller a better reading's FVU, or L0, is."""
BETTER_ELSEWHERE = 1.5
"""The same of another block: neighbours are alike, and an SAE does best where it was trained."""
LEAST_BETTER = 0.01
"""Share of the variance that a better reading explains more, at least."""
SAMPLING = 3.0
WORTH = math.log(1.5)
"""Least gain of a cause."""
MOST_SPOILT = 1e-3
"""Share of the rows that may be cut off, or NaN, without a word but a warning."""
MIN_ROWS = 50
DEAD_ROWS = 1000
"""Rows below which no latent is called dead."""


@dataclass(frozen=True)
class Diagnosis:
    """What is said of an SAE."""

    healthy: bool
    sentence: str
    reasons: tuple[Finding, ...]
    """Why it is sick; none where it is healthy."""
    cause: str | None = None
    possible: tuple[str, ...] = ()
    """Causes that are not told apart."""
    then: str = ""
    named: Repair | None = None
    """The experiment that shows the cause, where one does."""


def reasons_for(found: Examination, quality: RowQuality) -> list[Finding]:
    """Return why an SAE is sick."""
    return [
        *_dense(found),
        *_poor(found),
        *_dead(found.silence, found.as_it_is.n_rows),
        *_spoilt(quality),
        *_better(found),
    ]


def _dense(found: Examination) -> Iterator[Finding]:
    figures, reference = found.as_it_is, found.reference
    l0, width = figures.l0.value, figures.d_sae
    numbers = {"l0": l0, "limit": reference.limit, "d_sae": float(width)}
    if l0 - SAMPLING * figures.l0.error > reference.limit:
        yield Finding(
            "dense",
            "sick",
            f"The code is dense: {l0:.4g} of {width:,} latents fire on a token "
            f"({l0 / width:.0%}); more than {reference.limit:.4g} is no sparse code.",
            numbers,
            (WEAK_SPARSITY,),
        )
    recorded = reference.recorded_l0
    if recorded and l0 - SAMPLING * figures.l0.error > FAR * recorded:
        yield Finding(
            "above_record",
            "sick",
            f"L0 is {l0:.4g}, {l0 / recorded:.1f} times the {reference.l0_is} {recorded:.4g}; more "
            f"than {FAR:g} times is too many.",
            {"l0": l0, "recorded": recorded},
        )
    always = figures.always_on_share
    if always.value - SAMPLING * always.error > MOST_ALWAYS_ON:
        yield Finding(
            "always_on",
            "sick",
            f"{always.value:.1%} of the latents are on at 99 % of the tokens or more; at most "
            f"{MOST_ALWAYS_ON:.0%} are in a sparse code.",
            {"always_on_share": always.value},
        )


def _poor(found: Examination) -> Iterator[Finding]:
    fvu, recorded = fvu_of(found.as_it_is), found.reference.recorded_fvu
    if found.as_it_is.fvu is None:
        return
    error = SAMPLING * found.as_it_is.fvu.error
    if not fvu - error <= POOR:
        yield Finding(
            "poor",
            "sick",
            f"The reconstruction is poor: FVU is {fvu:.4g}, so that "
            f"{'nothing' if fvu >= 1 else f'{1 - fvu:.0%}'} of the variance is explained.",
            {"fvu": fvu},
        )
    elif recorded is not None and fvu - error > FAR * recorded + found.reference.slack:
        more = f" and {SAME_FVU:g}" if found.reference.slack else ""
        yield Finding(
            "worse_than_record",
            "sick",
            f"FVU is {fvu:.4g}, {fvu / recorded:.1f} times the {found.reference.fvu_is} "
            f"{recorded:.4g}; more than {FAR:g} times it{more} is too much.",
            {"fvu": fvu, "recorded": recorded},
        )


def _dead(silence: Silence, n_rows: int) -> Iterator[Finding]:
    if n_rows < DEAD_ROWS or silence.once > MOST_ONCE * silence.d_sae:
        return
    if silence.dead_share - SAMPLING * silence.error >= MOST_DEAD:
        yield Finding(
            "dead",
            "sick",
            f"{silence.dead_share:.0%} of the latents are dead (± {silence.error:.0%}): "
            f"{silence.silent:,} of {silence.d_sae:,} fire on none of {n_rows:,} tokens, and "
            f"{silence.once} that fire in a single text say that more texts would wake about "
            f"{silence.unseen:.0f} of them.",
            {"dead_share": silence.dead_share, "silent": float(silence.silent)},
            (DEAD_LATENTS,),
        )


def _spoilt(quality: RowQuality) -> Iterator[Finding]:
    cause = (OVERFLOW,) if quality.overflowed else ()
    kinds = (
        (quality.cut_off, "cut_off", "hold 65,504 exactly, the largest float16: numbers were cut "
         "off there"),
        (quality.nonfinite, "nonfinite", "hold NaN or infinity and were left out"),
    )  # fmt: skip
    for count, name, what in kinds:
        if count > MOST_SPOILT * quality.n_rows:
            yield Finding(
                name,
                "sick",
                f"{count:,} of {quality.n_rows:,} rows ({count / quality.n_rows:.1%}) {what}.",
                {"rows": float(count)},
                (OVERFLOW,) if name == "cut_off" else cause,
            )


def _better(found: Examination) -> Iterator[Finding]:
    ranked = ranked_causes([one for one in found.repairs if is_better(found, one)])
    if not ranked:
        return
    best = ranked[0]
    first = found.as_it_is
    yield Finding(
        "better_reading",
        "sick",
        f"There is a better reading: with {best.trial.what} FVU is {best.fvu:.4g} in the place of "
        f"{fvu_of(first):.4g}, and L0 {best.figures.l0.value:.4g} in the place of "
        f"{first.l0.value:.4g}.",
        {"fvu": best.fvu, "l0": best.figures.l0.value},
        (best.trial.cause,),
    )


def is_better(found: Examination, one: Repair) -> bool:
    """Return whether a repair is so much better that the SAE as it is must be misread."""
    first, figures = found.as_it_is, one.figures
    if one.trial.evidence or one.idle or first.fvu is None or figures.fvu is None:
        return False
    old, new = fvu_of(first), one.fvu
    if new == math.inf:
        return False
    if old == math.inf:
        return new < 1
    times = BETTER_ELSEWHERE if one.trial.cause == WRONG_TENSOR else BETTER
    l0, most = figures.l0.value, first.l0.value
    sparser = most - times * l0 > SAMPLING * (first.l0.error + times * figures.l0.error)
    if sparser and new <= old < 1:
        return True
    if l0 > most and (one.trial.swept or l0 > found.reference.limit):
        return False
    old = found.own_best(l0) if l0 > most else old
    sampling = SAMPLING * math.hypot(first.fvu.error, times * figures.fvu.error)
    return old - times * new > sampling and old - new >= LEAST_BETTER


def restores(found: Examination, one: Repair) -> bool:
    """Return whether a repair raises no FVU, removes half of the excess L0, and is worth it.

    One number for all biases or thresholds may cost as much FVU as truncation may, with which it
    competes: otherwise a bias that makes up for shrunk latents would pass for a weak penalty.
    """
    first = found.as_it_is
    if one.trial.evidence or one.idle or one.gain < WORTH:
        return False
    error = SAME_FVU if one.trial.cause in (ENCODER_BIAS, THRESHOLDS) else 0.0
    if first.fvu is not None and one.figures.fvu is not None and not one.trial.swept:
        error = SAMPLING * math.hypot(first.fvu.error, one.figures.fvu.error)
    return one.fvu <= fvu_of(first) + error and (one.removed is None or one.removed >= 0.5)


def judge_examination(
    found: Examination, quality: RowQuality, from_codes: Sequence[Finding] = ()
) -> Diagnosis:
    """Return whether an SAE is sick, and what of.

    Args:
        found: The experiments.
        quality: What is wrong with the rows.
        from_codes: What kept codes say, as findings whose first suggestion is the cause.
    """
    wrong = [one for one in from_codes if one.severity == "sick"]
    reasons = (*wrong, *reasons_for(found, quality))
    if not reasons:
        return Diagnosis(True, _clean(found), ())
    said = " ".join(one.sentence for one in reasons)
    by = None
    named, possible, why, then = _cause_of_rows(reasons, wrong) or (None, (), "", "")
    if not why:
        ranked = _mending(found, reasons)
        by = ranked[0] if len(ranked) == 1 else None
        named, possible, why, then = _cause(found, reasons, ranked)
    sentence = f"Sick: {named or 'no single cause is named'}. {why} What is wrong: {said}"
    return Diagnosis(False, sentence, reasons, named, possible, then, by)


Cause = tuple[str | None, tuple[str, ...], str, str]
"""The cause, those that are not told apart, why, and what to do."""


def _cause_of_rows(reasons: Sequence[Finding], from_codes: Sequence[Finding]) -> Cause | None:
    """Return a cause that is seen without an experiment; None where there is none."""
    for one in from_codes:
        if one.name == "unknown_codes" or not one.suggests:
            return NOT_ITS_CODES, (), "They agree with nothing that it computes.", OF_ANOTHER
        cause = one.suggests[0]
        why = f"That is what the kept codes are: {cause}."
        return cause, (), why, OF_CODES.get(cause, OF_OTHER_CODES)
    for one in reasons:
        if one.suggests and one.name in DIRECT:
            cause = one.suggests[0]
            return cause, (), f"The cause is read off directly: {cause}.", DIRECT[one.name]
    if {one.name for one in reasons} == {"nonfinite"}:
        return None, (), NOT_KNOWN, FIND_NONFINITE
    return None


def _mending(found: Examination, reasons: Sequence[Finding]) -> list[Repair]:
    """Return the repair that is the cause, and those that are not told apart from it."""
    if not {one.name for one in reasons} - {"dead"}:
        return []
    return ranked_causes(
        [one for one in found.repairs if restores(found, one) or is_better(found, one)]
    )


def _cause(found: Examination, reasons: Sequence[Finding], ranked: Sequence[Repair]) -> Cause:
    names = {one.name for one in reasons}
    if ranked:
        best, *rest = ranked
        if not rest:
            return (
                best.trial.cause,
                (),
                f"{best.trial.meaning} {worth(found, best)}",
                (best.trial.then),
            )
        causes = tuple(one.trial.cause for one in ranked)
        then = "\n".join(f"If {one.trial.cause}: {one.trial.then}" for one in ranked)
        return None, causes, f"Not told apart: {'; '.join(causes)}.", then
    if names & {"dense", "above_record", "always_on"}:
        return _weak(found)
    if "dead" in names:
        return (
            DEAD_LATENTS, (), "No other reading wakes the latents.",
            "Train again with a revival of dead latents (sae.aux_k, the default here), a smaller "
            "optimizer.lr, or fewer latents (sae.expansion_factor).",
        )  # fmt: skip
    return None, (), NOTHING, NOTHING_THEN


NOTHING = "No experiment mends it."
NOTHING_THEN = (
    "Check that SAE, model and texts belong together: damaged weights, another model or two causes "
    "at once are not tried."
)


def _weak(found: Examination) -> Cause:
    one = found.truncated
    if one is not None and one.removed is not None and one.removed >= 0.5:
        why = f"No other reading mends it. {one.trial.meaning} {worth(found, one)}"
        return WEAK_SPARSITY, (), why, one.trial.then
    reached = ""
    if one is not None and one.removed is not None:
        reached = (
            f" (keeping the strongest latents removes {max(one.removed, 0.0):.0%} of the excess "
            f"with FVU at most {SAME_FVU:g} higher)"
        )
    why = (
        "No experiment mends it, so the sparsity penalty is taken to be too weak, or k too large; "
        f"that is less sure, because truncation alone does not show it{reached}."
    )
    then = one.trial.then if one is not None else "Train again with a stronger sparsity penalty."
    return WEAK_SPARSITY, (), why, then


def worth(found: Examination, one: Repair) -> str:
    """Say what a repair does to L0 and FVU."""
    first = found.as_it_is
    share = "" if one.removed is None else f", {one.removed:.0%} of the excess L0 removed"
    return (
        f"With {one.trial.what}: L0 {first.l0.value:.4g} → {one.figures.l0.value:.4g}{share}, FVU "
        f"{fvu_of(first):.4g} → {one.fvu:.4g}.{_not_yet(found, one)}"
    )


def _not_yet(found: Examination, one: Repair) -> str:
    """Say so where a repair leaves a surely larger FVU than the SAE should have."""
    wanted, fvu = found.reference.recorded_fvu, one.figures.fvu
    if wanted is None or fvu is None or fvu.value - SAMPLING * fvu.error <= wanted:
        return ""
    return (
        f" It is a better reading, but not yet the {found.reference.fvu_is} FVU of {wanted:.4g}: "
        "something else may be off too."
    )


def _clean(found: Examination) -> str:
    figures, reference = found.as_it_is, found.reference
    fvu = figures.fvu
    explained = (
        "the rows do not vary, so that FVU says nothing"
        if fvu is None
        else f"FVU is {fvu.value:.4g} (± {fvu.error:.2g}{reference.fvu_rule})"
    )
    against = _against(reference)
    return (
        f"Healthy: {figures.l0.value:.4g} of {figures.d_sae:,} latents fire on a token "
        f"(± {figures.l0.error:.2g}; {against}), {explained}, "
        f"{figures.always_on_share.value:.1%} of the latents are always on, "
        f"{found.silence.silent / found.silence.d_sae:.1%} fire on none of {figures.n_rows:,} "
        "rows, and no other reading is better."
    )


def _against(reference: Reference) -> str:
    if reference.generic:
        return f"nothing is recorded, so the limit is {reference.l0:.4g}: {reference.source}"
    return f"reference {reference.l0:.4g}, from {reference.source}"
