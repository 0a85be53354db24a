"""How sparse an SAE should be, and the one score by which repairs are ranked.

A code is *dense* above a tenth of the latents, or above a quarter where k was chosen so or where
that is no more than 16. The *reference* L0 is the record's where that is not dense itself, else
this limit. What L0 exceeds of it is the *excess*. A repair's *gain* says how many times better it
makes the SAE, as a logarithm:

    gain = ln(max(L0, r) / max(L0', r)) + ln((FVU + τ) / (FVU' + τ))

with r the reference, primes after the repair, and τ = 0.02: FVU's of a few hundredths are not told
apart, and of a rise the first τ is not counted (FVU' - τ, but at least FVU, stands for FVU'). So a
repair gains by removing excess L0 or by bringing FVU down; an L0 below the reference is worth
nothing more, and the gain falls with L0' and with FVU' everywhere else.
"""

import math
from dataclasses import dataclass

from saefty.diagnosis.base import Figures
from saefty.diagnosis.record import AIMED_L0, FIXED_L0, Record
from saefty.saes.base import SparseAutoencoder

MOST_DENSE = 0.1
"""Share of the latents that fire on a token, above which a code is called dense."""
MOST_CHOSEN = 0.25
"""The same where k was chosen so, and of small SAEs. A record is no choice: a training with too
weak a penalty records its own dense codes."""
FEW = 16.0
"""Latents a token that are no dense code of a small SAE either."""
SAME_FVU = 0.02
"""FVU's that differ by less, as a share of the variance, count as the same."""
GIVEN = "given by you"
"""The source of a figure that the user expects (`record.find_record`)."""
FAR = 2.0
"""How many times a recorded figure is far off."""


@dataclass(frozen=True)
class Reference:
    """The L0 and FVU that an SAE is held against."""

    l0: float
    source: str
    """Where the L0 is from, in words."""
    limit: float
    """L0 above which the code is dense whatever is recorded."""
    generic: bool
    """Whether nothing is known of this SAE, so that the limit is all there is."""
    recorded_l0: float | None = None
    recorded_fvu: float | None = None
    l0_given: bool = False
    """Whether the recorded L0 is one that the user expects."""
    fvu_given: bool = False

    @property
    def l0_is(self) -> str:
        """What the L0 is called."""
        return "expected" if self.l0_given else "recorded"

    @property
    def fvu_is(self) -> str:
        """What the FVU is called."""
        return "expected" if self.fvu_given else "recorded"

    @property
    def slack(self) -> float:
        """What FVU may exceed the recorded one by, beside a factor; an expected one is meant."""
        return 0.0 if self.fvu_given else SAME_FVU

    @property
    def fvu_rule(self) -> str:
        """What FVU should be and how much more passes, in words; empty where nothing is known."""
        if self.recorded_fvu is None:
            return ""
        more = f" and {self.slack:g}" if self.slack else ""
        return f"; {self.fvu_is} {self.recorded_fvu:.4g}, of which {FAR:g} times{more} passes"

    @classmethod
    def of(cls, sae: SparseAutoencoder, record: Record) -> "Reference":
        """Return the reference of an SAE with a record, which may be empty."""
        l0, fvu = record.figures.get("l0"), record.figures.get("fvu")
        has_k = sae.config.arch in FIXED_L0 + AIMED_L0
        chosen = max(FEW, float(sae.config.k)) if has_k else FEW
        limit = max(MOST_DENSE * sae.d_sae, min(chosen, MOST_CHOSEN * sae.d_sae))
        known = (
            l0.value if l0 else None,
            fvu.value if fvu else None,
            l0 is not None and l0.source == GIVEN,
            fvu is not None and fvu.source == GIVEN,
        )
        if l0 is not None and l0.value <= limit:
            return cls(l0.value, l0.source, limit, False, *known)
        words = f"a generic limit for {sae.d_sae:,} latents"
        if limit == MOST_DENSE * sae.d_sae:
            words = f"a tenth of the {sae.d_sae:,} latents, a generic limit"
        return cls(limit, words, limit, l0 is None, *known)

    def excess(self, l0: float) -> float:
        """Return what an L0 is above the reference."""
        return max(0.0, l0 - self.l0)

    def removed(self, before: Figures, after: Figures) -> float | None:
        """Return the share of the excess L0 that a repair removes; None where there is none."""
        excess = self.excess(before.l0.value)
        if excess <= SAMPLING_OF_L0 * before.l0.error:
            return None
        return 1 - self.excess(after.l0.value) / excess

    def gain(self, before: Figures, after: Figures) -> float:
        """Return how many times better a repair makes the SAE, as a logarithm; see above."""
        old, new = fvu_of(before), fvu_of(after)
        if not new < math.inf:
            return -math.inf
        if not old < math.inf:
            old = max(new, 1.0)
        if new > old:
            new = max(old, new - SAME_FVU)
        sparser = math.log(max(before.l0.value, self.l0) / max(after.l0.value, self.l0))
        return sparser + math.log((old + SAME_FVU) / (new + SAME_FVU))


SAMPLING_OF_L0 = 3.0
"""Sampling errors by which L0 must exceed the reference for an excess."""


def fvu_of(figures: Figures) -> float:
    """Return FVU, infinite where it is not a number."""
    value = figures.fvu.value if figures.fvu else math.nan
    return value if value == value else math.inf
