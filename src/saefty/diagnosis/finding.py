"""What is said about an SAE in words with numbers, and the causes that a finding points to."""

from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["info", "warning", "sick"]
"""`info` is a fact, `warning` may be a fault, `sick` is one whatever its cause."""

WEAK_SPARSITY = "weak sparsity penalty"
ENCODER_BIAS = "encoder bias off"
INPUT_OFFSET = "input not centred"
SCALE = "input scale off"
STANDARDISATION = "input standardisation missing"
OVERFLOW = "number format overflow"
WRONG_TENSOR = "wrong tensor"
AXES_SWAPPED = "axes swapped"
RECONSTRUCTION = "reconstruction instead of codes"
PRE_ACTIVATIONS = "pre-activations instead of codes"
SPECIAL_TOKENS = "special tokens among the rows"
DEAD_LATENTS = "dead latents"
THRESHOLDS = "thresholds off"
GATING = "decoder-norm gating off"
DECODER_BIAS = "b_dec subtracted or not"
BOS = "texts read without BOS, or with several"

HYPOTHESES: dict[str, tuple[str, ...]] = {
    "H1 weak sparsity": (WEAK_SPARSITY,),
    "H2 encoder bias or input offset": (ENCODER_BIAS, THRESHOLDS, INPUT_OFFSET, DECODER_BIAS),
    "H3 other normalisation": (SCALE, STANDARDISATION, GATING, OVERFLOW),
    "wrong tensor": (WRONG_TENSOR, AXES_SWAPPED, RECONSTRUCTION, PRE_ACTIVATIONS),
    "special tokens": (SPECIAL_TOKENS, BOS),
    "dead latents": (DEAD_LATENTS,),
}
"""The hypotheses in the order of the report, and the causes each is made of."""


@dataclass(frozen=True)
class Finding:
    """A fact about an SAE or its codes."""

    name: str
    """A short key, such as `always_on`."""
    severity: Severity
    sentence: str
    numbers: dict[str, float] = field(default_factory=dict)
    suggests: tuple[str, ...] = ()
    """Causes that would explain it."""
