"""What a person would read off the seven plots, in words with the numbers.

Every finding is a fact about the codes alone: which cause it comes from takes the SAE and its rows.
Findings point to the causes that would explain them, so that the experiments can be read with them.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from saefty.code_pca import CodePca
from saefty.diagnosis.finding import (
    AXES_SWAPPED,
    DEAD_LATENTS,
    ENCODER_BIAS,
    INPUT_OFFSET,
    OVERFLOW,
    PRE_ACTIVATIONS,
    RECONSTRUCTION,
    SCALE,
    SPECIAL_TOKENS,
    STANDARDISATION,
    WEAK_SPARSITY,
    WRONG_TENSOR,
    Finding,
    Severity,
)  # fmt: skip
from saefty.diagnosis.judgement import DEAD_ROWS, MOST_DEAD, MOST_ONCE, MOST_SPOILT, SAMPLING
from saefty.metrics.firing import ALWAYS_ON, FiringStats
from saefty.metrics.rarity import unseen
from saefty.token_sample import SampleReport

TOP = 30  # latents of the bar charts
SELDOM = 0.01
MANY_ALWAYS_ON = 0.1
DENSE, VERY_DENSE = 0.1, 0.25  # shares of the latents that fire on a token
SAME = 0.9
LARGE = 30.0  # times the typical value of a latent
LARGEST_HALF = 65504.0
APART = 0.8  # of the variance that lies between two groups; two halves of a normal line: 0.64
SMALLEST_GROUP = 0.005

TOO_MANY_FIRE = (WEAK_SPARSITY, ENCODER_BIAS, INPUT_OFFSET, SCALE, STANDARDISATION)
NOT_CODES = (RECONSTRUCTION, PRE_ACTIVATIONS)


def find_in_codes(
    stats: FiringStats,
    report: SampleReport,
    pca: CodePca,
    *,
    d_sae: int | None = None,
    d_in: int | None = None,
    signed: bool = False,
    left_out: int = 0,
    half: bool = False,
) -> list[Finding]:
    """Return what the figures of codes say, most telling first.

    Args:
        stats: Over all tokens.
        report: Over the sample.
        pca: Over the sample.
        d_sae: Number of latents that the codes should have; None where no SAE is known.
        d_in: Width of the activations that the SAE reads.
        signed: Whether latents may be below zero.
        left_out: Tokens left out because they hold NaN or infinity.
        half: Whether the codes were kept in float16.
    """
    found = [
        *_width(report.shape[1], d_sae, d_in),
        *_numbers(stats, left_out, half),
        *_negative(report, signed),
        *_density(stats, report),
        *_threshold(stats, report),
        *_always_on(stats),
        *_rates(stats),
        *_large(stats),
        *_uneven_tokens(stats),
        *_dead(stats),
        *_components(pca, stats.mean_l0 >= DENSE * len(stats.firing_rate)),
    ]
    order: dict[Severity, int] = {"sick": 0, "warning": 1, "info": 2}
    return sorted(found, key=lambda one: order[one.severity])


def _width(width: int, d_sae: int | None, d_in: int | None) -> Iterator[Finding]:
    if d_sae is None or width == d_sae:
        return
    numbers: dict[str, float] = {"width": width, "d_sae": d_sae}
    if width == d_in:
        yield Finding(
            "width_of_input", "sick",
            f"The matrix is {width} wide, as the SAE's input is; codes are {d_sae} wide. These are "
            "reconstructions, or the activations themselves.",
            numbers, (RECONSTRUCTION, WRONG_TENSOR),
        )  # fmt: skip
    else:
        yield Finding(
            "other_width", "sick",
            f"The matrix is {width} wide, but codes of this SAE are {d_sae} wide: they are another "
            "SAE's, or tokens lie where latents should.",
            numbers, (WRONG_TENSOR, AXES_SWAPPED),
        )  # fmt: skip


def _numbers(stats: FiringStats, left_out: int, half: bool) -> Iterator[Finding]:
    cut = int((stats.max_all == LARGEST_HALF).sum())
    if left_out:
        total = stats.token_count + left_out
        share, over = left_out / total, half or cut > 0
        why = "a division by zero, or damaged weights or activations, can be the reason."
        if over:
            why = f"float16 ran over (it holds nothing above {LARGEST_HALF:,.0f})."
        yield Finding(
            "not_finite", "sick" if share > MOST_SPOILT else "warning",
            f"{left_out:,} of {total:,} tokens ({share:.2%}) hold NaN or infinity: {why}",
            {"tokens": left_out, "share": share}, (OVERFLOW,) if over else (),
        )  # fmt: skip
    if cut:
        yield Finding(
            "cut_off", "sick",
            f"The largest value of {_some(cut)} is exactly {LARGEST_HALF:,.0f}, the largest "
            "number of float16: larger ones were cut off.",
            {"latents": cut, "value": LARGEST_HALF}, (OVERFLOW,),
        )  # fmt: skip


def _negative(report: SampleReport, signed: bool) -> Iterator[Finding]:
    share = report.negative_share
    if share and not signed:
        yield Finding(
            "negative", "sick",
            f"{share:.1%} of the values are below zero (the least is {report.least:.4g}); latents "
            "of this kind never are. These are not codes.",
            {"share": share, "least": report.least}, NOT_CODES,
        )  # fmt: skip


def _density(stats: FiringStats, report: SampleReport) -> Iterator[Finding]:
    width = len(stats.firing_rate)
    share = stats.mean_l0 / width
    median, high = stats.l0_quantile(0.5), stats.l0_quantile(0.99)
    typical = abs(median - stats.mean_l0) < 0.2 * stats.mean_l0 and high < 2 * stats.mean_l0
    rest = (
        "median and 99th percentile are of the same size, so that this is what tokens are like, "
        "and not a matter of outliers"
        if typical
        else "tokens differ a lot"
    )
    numbers = {"l0": stats.mean_l0, "share": share, "median": median, "p99": high}
    how = f"On average {stats.mean_l0:,.4g} of {width:,} latents ({share:.1%}) fire on a token"
    if share < DENSE:
        yield Finding("sparse", "info", f"{how} (median {median:,.4g}).", numbers)
        return
    sick = share >= VERY_DENSE
    verdict = " The codes are not sparse." if sick else ""
    yield Finding(
        "dense", "sick" if sick else "warning",
        f"{how} (median {median:,.4g}, 99th percentile {high:,.4g}): {rest}.{verdict}",
        {**numbers, "sample_l0": report.l0_mean}, (*TOO_MANY_FIRE, AXES_SWAPPED, *NOT_CODES),
    )  # fmt: skip


def _threshold(stats: FiringStats, report: SampleReport) -> Iterator[Finding]:
    first, last = min(report.active_per_token), max(report.active_per_token)
    low, high = report.active_per_token[first], report.active_per_token[last]
    if low < DENSE * report.shape[1] or high < SAME * low:
        return
    typical = _typical(stats)
    far = f" It is far below what a latent shows where it fires ({typical:.3g})."
    yield Finding(
        "threshold_moot", "warning",
        f"Raising the threshold from {first:g} to {last:g} takes L0 from {low:,.5g} to "
        f"{high:,.5g}: active latents are not just above zero, and it is no matter of the "
        f"threshold.{far if typical > 100 * last else ''}",
        {"l0": low, "l0_above": high, "eps": last, "typical": typical}, TOO_MANY_FIRE,
    )  # fmt: skip


def _typical(stats: FiringStats) -> float:
    """Return the median over firing latents of their mean where they fire."""
    fires = stats.active_count > 0
    return float(np.median(stats.mean_when_active[fires])) if fires.any() else 0.0


def _always_on(stats: FiringStats) -> Iterator[Finding]:
    always = stats.firing_rate >= ALWAYS_ON
    count, width = int(always.sum()), len(always)
    if count == 0:
        return
    of_l0 = float(stats.firing_rate[always].sum() / stats.mean_l0)
    seldom = float((stats.firing_rate < SELDOM).mean())
    share = count / width
    numbers = {"latents": count, "share": share, "l0_share": of_l0, "seldom": seldom}
    shape = ""
    if min(share, seldom) > max(1 - share - seldom, MANY_ALWAYS_ON):
        shape = f" {seldom:.1%} fire on less than 1 % of them: the histogram has the shape of a U."
    severity: Severity = "info"
    if share >= SELDOM:
        severity = "sick" if share >= MANY_ALWAYS_ON else "warning"
    yield Finding(
        "always_on", severity,
        f"{_some(count)} ({share:.1%}) fire on at least 99 % of the tokens and make up "
        f"{of_l0:.0%} of L0.{shape}",
        numbers, (*TOO_MANY_FIRE, *NOT_CODES) if severity != "info" else (),
    )  # fmt: skip


def _rates(stats: FiringStats) -> Iterator[Finding]:
    fires = np.sort(stats.firing_rate[stats.active_count > 0])
    if len(fires) == 0:
        return
    near_1 = float((fires >= 0.9).mean())
    decades = max(0.0, float(-np.log10(fires[0])))
    tail = "even the rarest fires on most tokens"
    if fires[0] < 0.5:
        tail = (
            f"the rarest fires once in {10**decades:,.0f} tokens, so that the tail is "
            f"{decades:.1f} decades long"
        )
    if near_1 >= MANY_ALWAYS_ON:
        yield Finding(
            "mass_at_one", "warning",
            f"Of the latents that fire, {near_1:.1%} have a log10 firing rate near 0 (0.9 of the "
            f"tokens or more); {tail}.",
            {"share": near_1, "decades": decades}, TOO_MANY_FIRE,
        )  # fmt: skip
    top = fires[-TOP:]
    if len(fires) >= 2 * TOP and top[0] >= 0.999:
        yield Finding(
            "top_always_on", "warning",
            f"The {len(top)} most frequent latents fire on {top[0]:.6f} to {top[-1]:.6f} of the "
            f"tokens and differ by {top[-1] - top[0]:.1g}: all of them are always on.",
            {"least": float(top[0]), "most": float(top[-1])}, TOO_MANY_FIRE,
        )  # fmt: skip


def _large(stats: FiringStats) -> Iterator[Finding]:
    always, typical = stats.firing_rate >= ALWAYS_ON, _typical(stats)
    count = min(TOP, int((stats.active_count > 0).sum()))
    top = np.argsort(-stats.max_all, kind="stable")[:count]
    also = int(always[top].sum())
    largest = float(stats.max_all.max(initial=0.0))
    if not also or also < count / 3 or largest < LARGE * typical:
        return
    yield Finding(
        "large_and_always_on", "warning",
        f"{also} of the {count} latents with the largest values are always on; the largest value "
        f"is {largest:.4g}, {largest / typical:,.0f} times what a latent shows where it fires. "
        "That hints at another scale, at an offset, or at something that is not codes.",
        {"latents": also, "largest": largest, "typical": typical},
        (SCALE, ENCODER_BIAS, INPUT_OFFSET, STANDARDISATION, RECONSTRUCTION),
    )  # fmt: skip


def _uneven_tokens(stats: FiringStats) -> Iterator[Finding]:
    silent = float(stats.l0_counts[0] / max(stats.token_count, 1))
    if silent >= 0.05:
        yield Finding(
            "silent_tokens", "warning",
            f"On {silent:.1%} of the tokens no latent fires: the input may be too small.",
            {"share": silent}, (SCALE, STANDARDISATION, DEAD_LATENTS),
        )  # fmt: skip


def _dead(stats: FiringStats) -> Iterator[Finding]:
    """Yield how many latents are silent: never more than a warning.

    Codes do not say how many texts they are of, nor which; whether the SAE is sick of dead latents
    is judged over texts.
    """
    tokens, width = stats.token_count, len(stats.active_count)
    silent, once, twice = (int((stats.active_count == n).sum()) for n in (0, 1, 2))
    if silent == 0:
        return
    numbers = {"latents": float(silent), "share": silent / width}
    how = f"{_some(silent)} ({silent / width:.1%}) fire on none of {tokens:,} tokens"
    if tokens < DEAD_ROWS:
        few = f"too few tokens to call a latent dead (at least {DEAD_ROWS:,} are needed)."
        yield Finding("dead", "info", f"{how}, {few}", numbers)
        return
    estimate, error = unseen(once, twice, tokens)
    rare = min(estimate, float(silent))
    surely = (silent - rare) / width
    numbers |= {"rare": rare, "dead_share": surely}
    many = once <= MOST_ONCE * width and surely - SAMPLING * error / width >= MOST_DEAD
    awake = "None seems to be merely rare, by how many fire once or twice."
    if round(rare):
        left = f"{surely:.1%} of all latents are left" if round(rare) < silent else "none is left"
        awake = (
            f"By how many fire once or twice, {rare:,.0f} or more of them are only rare and would "
            f"fire on more tokens; {left}."
        )
    narrow = " They are dead, or these texts are narrow: give texts of all kinds." if many else ""
    yield Finding(
        "dead", "warning" if many else "info", f"{how}. {awake}{narrow}", numbers,
        (DEAD_LATENTS,) if many else (),
    )  # fmt: skip


def _components(pca: CodePca, dense: bool) -> Iterator[Finding]:
    two = {form: two_groups(one.scores[:, 0]) for form, one in pca.forms.items()}
    apart = {
        form: share >= APART and smaller >= SMALLEST_GROUP for form, (share, smaller) in two.items()
    }
    numbers = {f"{form}_apart": share for form, (share, _) in two.items()}
    numbers |= {"smaller_group": two["raw"][1], "mean_cosine": pca.mean_cosine}
    if not apart["raw"]:
        yield Finding(
            "one_cloud", "info",
            "Along the first component of raw codes the tokens lie in one cloud.", numbers,
        )  # fmt: skip
        return
    if not apart["centred"]:
        vanishes = "Centred, they are one cloud: the offset of the codes shows, and no structure."
        causes: tuple[str, ...] = (INPUT_OFFSET, ENCODER_BIAS)
    elif not apart["standardised"]:
        vanishes = (
            "They stay when the codes are centred and are one cloud when they are standardised: "
            "the scale of a few latents shows."
        )
        causes = (SCALE, STANDARDISATION)
    else:
        vanishes = (
            "They stay when the codes are centred and when they are standardised: the tokens are "
            "of two kinds (a subject, special tokens, chunks that were made differently)."
        )
        causes = (SPECIAL_TOKENS,)
    yield Finding(
        "stripe_and_cloud", "warning" if dense else "info",
        "Along the first component of raw codes the tokens lie in two groups; the smaller holds "
        f"{two['raw'][1]:.1%} of them. {vanishes}",
        numbers, causes if dense else (),
    )  # fmt: skip


def _some(count: int) -> str:
    return f"{count:,} latent{'' if count == 1 else 's'}"


def two_groups(line: Float[np.ndarray, "tokens"]) -> tuple[float, float]:
    """Return how far the best cut of a line into two parts explains it, and the smaller part.

    The share of the variance that lies between the parts: 1 for two points, 0.75 for an even
    spread, 0.64 for a normal one.

    Source: Otsu 1979, "A threshold selection method from gray-level histograms".
    """
    line = np.sort(line)
    n = len(line)
    total = float(((line - line.mean()) ** 2).sum()) if n else 0.0
    if n < 2 or total <= 1e-24 * max(float(np.abs(line).max()), 1e-300) ** 2:
        return 0.0, 0.0
    left = np.arange(1, n)
    sums = np.cumsum(line - line.mean())[:-1]
    between = sums**2 * n / (left * (n - left))
    cut = int(between.argmax())
    return float(between[cut] / total), min(cut + 1, n - cut - 1) / n
