"""The honest sentence: what the numbers of a comparison say, and what they do not.

Nothing here is measured; every statement follows from an interval or a corrected p. Two detectors
that are not told apart are never called equal: the interval of their difference says how much they
may still differ.
"""

import math

from saefty.detection.comparison import Comparison, Pair
from saefty.detection.generalisation import SourceAverage
from saefty.detection.inputs import DENSE, LATENTS, RANDOM, WORDS
from saefty.detection.result import Detection
from saefty.probes import sparse_family

ALIKE = 0.02
"""How much more AUROC latents may have than a control that is called as good as they are."""


def honest_sentence(found: Detection) -> str:
    """Return the answer in one paragraph of Markdown: five sentences at most, the first bold."""
    parts = [
        _against_dense(found),
        _against_controls(found.all),
        _how_many_latents(found),
        _left_out(found),
        _shortcuts(found),
    ]
    return " ".join(part for part in parts if part)


def not_told_apart(comparison: Comparison) -> list[str]:
    """Return the families that are not told apart from the one with the largest AUROC."""
    winner, *others = comparison.main
    pairs = [(one.family, comparison.pair(winner.family, one.family)) for one in others]
    return [family for family, pair in pairs if pair is not None and not pair.told_apart]


def _against_dense(found: Detection) -> str:
    comparison = found.all
    latents, dense = comparison.of(LATENTS), comparison.of(DENSE)
    assert latents is not None  # always among the inputs
    where = (
        "on held-out examples; variants of a prompt may be on both sides"
        if found.data.clusters is None
        else "on held-out prompt groups"
    )
    if dense is None:
        return (
            f"**SAE latents reach AUROC {latents.auroc} and were not compared with a dense probe** "
            f"({where}): whether the SAE is needed for this is not known."
        )
    pair = comparison.pair(LATENTS, DENSE)
    assert pair is not None  # both were chosen
    verdict = (
        "SAE latents and the dense probe are not told apart"
        if not pair.told_apart
        else "SAE latents beat the dense probe"
        if pair.difference.estimate > 0
        else "The dense probe beats the SAE latents"
    )
    return (
        f"**{verdict}** (AUROC {latents.auroc} against {dense.auroc} {where}; {_difference(pair)})."
    )


def _against_controls(comparison: Comparison) -> str:
    """Say which control does as well, which takes the meaning from the comparison."""
    not_worse, clearly = [], []
    as_good = False
    for family, name in ((RANDOM, "a random SAE of the same width and L0"), (WORDS, "the words")):
        control, pair = comparison.of(family), comparison.pair(LATENTS, family)
        if control is None or pair is None:
            continue
        if pair.told_apart and pair.difference.estimate > 0:
            below = ", below chance" if control.auroc.high < 0.5 else ""
            clearly.append(f"{name} ({control.auroc}{below})")
            continue
        as_good = as_good or pair.difference.high < ALIKE
        if pair.told_apart:
            does = "does" if family == RANDOM else "do"
            not_worse.append(f"{name} {does} even better ({control.auroc})")
        else:
            are = "is" if family == RANDOM else "are"
            not_worse.append(
                f"{name} {are} not told apart from them ({control.auroc}; {_difference(pair)})"
            )
    if not not_worse:
        return f"Clearly worse: {' and '.join(clearly)}." if clearly else ""
    what = (
        "their AUROC says nothing about what the SAE has learnt"
        if as_good
        else "their AUROC does not show that the SAE has learnt it"
    )
    worse = f"; clearly worse: {' and '.join(clearly)}" if clearly else ""
    return f"But {' and '.join(not_worse)}: **so {what}**{worse}."


def _how_many_latents(found: Detection) -> str:
    """Say how few latents are not told apart from all, and what a balanced subset changes."""
    comparison, balanced = found.all, _balanced(found)
    ks = sorted({one.candidate.k for one in comparison.main if one.candidate.k is not None})
    latents = comparison.of(LATENTS)
    assert latents is not None  # always among the inputs
    for k in ks:
        pair, few = comparison.pair(LATENTS, sparse_family(k)), comparison.of(sparse_family(k))
        if pair is None or few is None or (pair.told_apart and pair.difference.estimate > 0):
            continue
        most = max(pair.difference.high, 0.0)
        return (
            f"{sparse_family(k)[0].upper()}{sparse_family(k)[1:]} of {latents.fit.linear.width} "
            f"suffice{'s' if k == 1 else ''} to be not told apart from all of them "
            f"({few.auroc}; at most {most:.3f} less){f'; {balanced}' if balanced else ''}."
        )
    if not ks:
        return f"{balanced[0].upper()}{balanced[1:]}." if balanced else ""
    most_read = sparse_family(ks[-1])
    does = "does" if ks[-1] == 1 else "do"
    rest = f"; {balanced}" if balanced else ""
    return f"{most_read[0].upper()}{most_read[1:]} {does} not suffice{rest}."


def _left_out(found: Detection) -> str:
    if found.left_out is None:
        return ""
    if len(found.sources) < 2:
        return (
            "All examples come from one source, so what a detector loses on another one is not "
            "known."
        )
    by_family = {one.family: one for one in found.left_out.averages}
    named = [by_family[family] for family in (LATENTS, DENSE) if family in by_family]
    if not named:
        return (
            "What is lost on a source that was left out of training cannot be said as an AUROC: no "
            "source has both labels, in it and in the others (see below)."
        )
    n = named[0].sources
    mean = (
        f"each ranked by itself, in the mean over {n} sources"
        if n > 1
        else "the one that has both labels, ranked by itself"
    )
    losses = "; ".join(_loss(one) for one in named)
    return (
        f"On a source that was left out of training ({mean}, and on the same test examples both "
        f"times) {losses}."
    )


def _loss(average: SourceAverage) -> str:
    """Say an AUROC with and without the source; what is below zero as "higher by"."""
    loss = average.loss
    ends = (loss.estimate, loss.low, loss.high)
    if any(math.isnan(end) for end in ends):
        return f"what {average.family} lose cannot be said: there are too few prompt groups"
    way = "lower"
    if loss.estimate < 0:
        ends, way = (-loss.estimate, -loss.high, -loss.low), "higher"
    size = f"{way} by {ends[0]:.3f} [{ends[1]:.3f}, {ends[2]:.3f}]".replace("-", "−")
    sure = "" if loss.low > 0 or loss.high < 0 else ", which may be luck"
    return (
        f"{average.family} have AUROC {average.auroc} instead of {average.within.estimate:.3f} "
        f"({size}{sure})"
    )


def _balanced(found: Detection) -> str:
    if found.balanced is None:
        return ""
    after = found.balanced.of(LATENTS)
    assert after is not None  # always among the inputs
    return (
        "trained on a balanced subset of "
        f"{int(found.balanced.train.sum())} instead of {int(found.all.train.sum())} examples, SAE "
        f"latents reach {after.auroc}"
    )


def _shortcuts(found: Detection) -> str:
    if not found.leaks:
        return ""
    names = ", ".join(leak.name.replace("_", " ") for leak in found.leaks)
    return f"**The labels can be told by shortcuts** ({names}); see the warnings below."


def _difference(pair: Pair) -> str:
    d = pair.difference
    size = f"{d.estimate:+.3f} [{d.low:+.3f}, {d.high:+.3f}]".replace("-", "−")
    return f"difference {size}, p = {p_value(pair)}"


def p_value(pair: Pair) -> str:
    """Return the corrected p as text."""
    return f"{pair.p_holm:.3f}" if pair.p_holm >= 0.001 else "< 0.001"
