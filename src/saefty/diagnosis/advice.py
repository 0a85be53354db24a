"""What to do about causes that are read off rows or kept codes, without an experiment."""

from saefty.diagnosis.finding import AXES_SWAPPED, OVERFLOW, PRE_ACTIVATIONS, RECONSTRUCTION

DIRECT = {
    "cut_off": "Extract again in bfloat16 or float32 (model.dtype=bfloat16), or divide the "
    "activations by a constant before they are kept in float16.",
    "nonfinite": "Extract again in bfloat16 or float32 (model.dtype=bfloat16): float16 holds no "
    "number above 65,504. With extract.nonfinite=mask such rows are left out.",
}
"""What to do about findings that are causes by themselves."""

OF_CODES = {
    AXES_SWAPPED: "Transpose the matrices before they are used, and correct the script that keeps "
    "them: it should keep [tokens, latents].",
    RECONSTRUCTION: "Keep the latents (sae.encode(x)) in the place of what the SAE returns "
    "(sae(x) is its reconstruction).",
    PRE_ACTIVATIONS: "Keep the latents (sae.encode(x)): activation function and thresholds are "
    "missing from what was kept.",
    OVERFLOW: "Keep the codes in bfloat16 or float32: float16 holds no number above 65,504. Or "
    "divide them by a constant first.",
}
"""What to do about kept codes that are not the SAE's."""
OF_OTHER_CODES = (
    "Encode these rows anew as the SAE was trained to read them (saefty encode), and use those "
    "codes."
)
NOT_ITS_CODES = "the kept codes are not this SAE's"
"""The cause where kept codes agree with nothing that the SAE computes."""
OF_ANOTHER = (
    "Give the dump or feature store that was encoded with this SAE, or the SAE that it was encoded "
    "with; without --dump_dir and --features the SAE alone is examined."
)
NOT_KNOWN = "Some rows hold NaN or infinity; why is not known."
FIND_NONFINITE = (
    "Look for where the rows were made: a division by zero, a damaged file, or a model that ran in "
    "float16, which holds no number above 65,504 (model.dtype=bfloat16 does). With "
    "extract.nonfinite=mask such rows are left out."
)
