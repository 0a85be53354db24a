"""The known reasons for an SAE's figures to be off, each as an experiment that would mend it.

A *trial* is one change of convention, or another reading of the texts, with the cause it would
prove if the figures came back and what to do then. What cannot change a figure is not tried.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from saefty.diagnosis.base import Change, Rows
from saefty.errors import SaeftyError
from saefty.saes.base import SparseAutoencoder
from saefty.saes.native import SCALER, load_scaler
from saefty.tensorfile import TensorFile

READ = "read"
"""The reading of the texts as they were asked for."""
OUTLIER = 10.0
"""Rows whose norm is above this many median norms are outliers (attention sinks)."""
NO_GATE = ("relu", "gated")
"""Architectures that fire above 0, so that no positive factor changes what fires."""
WEIGHT_FILES = ("sae_weights.safetensors", "sae.safetensors", "checkpoints/final.safetensors",
                "params.safetensors")  # fmt: skip
BY_LATENT = ("W_dec", "W_D", "w_dec")  # [d_sae, d_in]
BY_INPUT = ("decoder.weight",)  # [d_in, d_sae]


UNCHANGED = Change()


@dataclass(frozen=True)
class Trial:
    """One experiment."""

    cause: str
    """The cause's short name; several trials may be of one cause."""
    what: str
    """What is done differently, in a few words."""
    meaning: str
    """What is wrong if this restores the figures, as a sentence."""
    then: str
    """What to do then."""
    change: Change = UNCHANGED
    rows: str = READ
    evidence: bool = False
    """It is reported, but proves nothing by itself."""
    estimated: bool = False
    """A number that was measured on these rows takes part."""
    swept: bool = False
    """A number that was chosen for its figures takes part."""


AS_IT_IS = Trial("none", "as it is", "", "")


def trials(sae: SparseAutoencoder, rows: Rows) -> list[Trial]:
    """Return the experiments that need no other reading of the texts."""
    return [
        *_norm_factors(sae, rows),
        *_gates(sae),
        *_biases(sae),
        *_centring(sae, rows),
        *_scaler(sae),
        *_dtypes(),
    ]


def reading_trial(key: str, named_by_sae: bool = True) -> Trial:
    """Return the experiment of another reading: `layer_<i>/<step>`, `bos_added`, ...

    Args:
        key: The reading.
        named_by_sae: Whether the block that was read is the one the SAE's own settings name.
    """
    if not key.startswith("layer_"):
        return _READINGS[key]
    layer, step = key.removeprefix("layer_").split("/")
    off, how = ("+ 1", "too late") if step == "-1" else ("- 1", "too early")
    told = f"set encode.layers=[{layer}]"
    if named_by_sae:
        told = (
            "correct the hook that the SAE's settings name (cfg.json of SAELens: "
            f"metadata.hook_name, here of block {layer}), then {told}"
        )
    return Trial(
        f"layer {off}",
        f"block {layer} read instead",
        f"The SAE is read one block {how}: it belongs to block {layer}.",
        f"The SAE expects layer {layer}: {told}.",
        rows=key,
    )


_READINGS = {
    "bos_added": Trial(
        "BOS missing",
        "a BOS before every text that begins without one",
        "BOS is missing: the texts were read without it, the SAE's figures were taken with it.",
        "Let the tokenizer add BOS (its folder names a bos_token), and read the texts again.",
        rows="bos_added",
    ),
    "bos_once": Trial(
        "BOS doubled",
        "one BOS before every text that begins with several",
        "BOS is doubled: the texts were read with more than one.",
        "Let either the tokenizer or the template add BOS, not both, and read the texts again.",
        rows="bos_once",
    ),
    "bos_removed": Trial(
        "BOS added",
        "no BOS before any text",
        "The SAE's figures were taken without BOS, and the texts were read with it.",
        "Read the texts without BOS, or take the SAE's figures anew with it.",
        rows="bos_removed",
    ),
    "bos_twice": Trial(
        "BOS was doubled in the record",
        "two BOS before every text",
        "The SAE's figures were taken with two BOS, and the texts were read with one.",
        "Take the SAE's figures anew with one BOS; the SAE was trained on texts that had two.",
        rows="bos_twice",
    ),
    "without_outliers": Trial(
        "outlier rows",
        f"rows of norm above {OUTLIER:g} medians left out",
        "A few rows of very large norm (attention sinks) make the difference: the SAE's figures "
        "were taken without them.",
        "Leave such rows out where you use the SAE: they are not what it was made for.",
        rows="without_outliers",
    ),
}


def _norm_factors(sae: SparseAutoencoder, rows: Rows) -> Iterator[Trial]:
    if sae.config.row_norm != "none":  # each row has a scale of its own: a common one is lost
        return
    root, squares = math.sqrt(sae.d_in), float(rows.norms.square().mean())
    factors = {
        "√d / mean norm": root / max(float(rows.norms.mean()), 1e-30),
        "√d / root mean square norm": root / max(math.sqrt(squares), 1e-30),
        "1 / root mean square norm": 1 / max(math.sqrt(squares), 1e-30),
    }
    for name, s in factors.items():
        shown = f"{name} = {s:.4g}"
        yield Trial(
            "norm factor missing",
            f"activations times {shown}",
            f"The norm factor is missing: the SAE expects activations times {shown}.",
            f"Fold the factor into the weights (W_enc times {s:.4g}, W_dec and b_dec divided by "
            "it), or load the SAE from its authors' files, which state the factor.",
            Change(scale=s, out_scale=s),
            estimated=True,
        )
        yield Trial(
            "norm factor applied twice",
            f"activations divided by {shown}",
            f"The norm factor is applied twice: the SAE expects activations divided by {shown}.",
            "Give the SAE raw activations once: take the factor out of either the weights or the "
            "loader's settings.",
            Change(scale=1 / s, out_scale=1 / s),
            estimated=True,
        )
        for part, missing, twice in (
            ("encoder", Change(scale=s), Change(scale=1 / s)),
            ("decoder", Change(out_scale=s), Change(out_scale=1 / s)),
        ):
            where = "what is encoded" if part == "encoder" else "what the reconstruction is of"
            yield Trial(
                f"norm factor missing in the {part}",
                f"{where} times {shown}",
                f"The norm factor is missing in the {part} alone ({shown}).",
                f"Fold the factor into the {part}'s weights too.",
                missing,
                estimated=True,
            )
            yield Trial(
                f"norm factor twice in the {part}",
                f"{where} divided by {shown}",
                f"The norm factor is applied twice in the {part} alone ({shown}).",
                f"Take the factor out of the {part}'s weights once.",
                twice,
                estimated=True,
            )


def _gates(sae: SparseAutoencoder) -> Iterator[Trial]:
    if sae.config.arch in NO_GATE:
        return
    now = sae.W_dec.detach().double().norm(dim=1).cpu()
    stored = stored_decoder_norms(sae.folder, sae.d_sae, sae.d_in)
    omitted = (
        "decoder-norm gating omitted",
        "a latent fires by pre-activation times its decoder row's norm",
        "Decoder-norm gating is omitted: the SAE chooses what fires by pre-activation times the "
        "norm of the decoder row.",
        "Set what its format has for that (SAELens: rescale_acts_by_decoder_norm true; "
        "Llamascopium: sparsity_include_decoder_norm true), or load the authors' own files.",
    )
    added = (
        "decoder-norm gating added",
        "a latent fires by pre-activation alone, not times its decoder row's norm",
        "Decoder-norm gating is added: the SAE chooses what fires by the pre-activation alone.",
        "Unset what its format has for that (SAELens: rescale_acts_by_decoder_norm false; "
        "Llamascopium: sparsity_include_decoder_norm false), or load the authors' own files.",
    )
    if _uneven(now):
        yield Trial(*omitted, Change(gate=_positive(now)))
        yield Trial(*added, Change(gate=1 / _positive(now)))
    if stored is not None:
        moved = torch.where(now > 0, stored / _positive(now), torch.zeros_like(now))
        if _uneven(moved):  # loading moved the norms into the latents
            yield Trial(*added, Change(gate=1 / _positive(moved)))


def _uneven(norms: Float[Tensor, "d_sae"]) -> bool:
    """Return whether norms differ from each other; rows of 0 contribute nothing and do not count.

    A factor common to all says nothing about gates: it moves every threshold alike.
    """
    held = norms[norms > 0]
    return bool(len(held)) and bool((held / held.mean() - 1).abs().max() > 1e-3)


def _positive(norms: Float[Tensor, "d_sae"]) -> Float[Tensor, "d_sae"]:
    return torch.where(norms > 0, norms, torch.ones_like(norms))


def stored_decoder_norms(
    folder: Path | None, d_sae: int, d_in: int
) -> Float[Tensor, "d_sae"] | None:
    """Return the norms of the decoder rows as the file has them, before conventions are applied.

    None where the folder holds no file whose decoder is known by name and shape.
    """
    for path in (folder / name for name in WEIGHT_FILES if folder and (folder / name).is_file()):
        try:
            file = TensorFile(path)
            held = {name: tuple(file.shape(name)) for name in file.names}
        except SaeftyError:
            return None
        for name in BY_LATENT + BY_INPUT:
            wanted = (d_sae, d_in) if name in BY_LATENT else (d_in, d_sae)
            if held.get(name) == wanted:
                value = torch.from_numpy(file.array(name).copy())
                value = value.view(torch.bfloat16) if file.is_bf16(name) else value
                return value.double().norm(dim=1 if name in BY_LATENT else 0)
    return None


def _biases(sae: SparseAutoencoder) -> Iterator[Trial]:
    b_dec = sae.b_dec.detach().double().cpu()
    if not bool(b_dec.any()):
        return
    yield Trial(
        "b_dec not subtracted",
        "x - b_dec encoded",
        "b_dec is not subtracted from the input, and should be.",
        "Set what its format has for that (SAELens: apply_b_dec_to_input true).",
        Change(shift=-b_dec),
    )
    yield Trial(
        "b_dec subtracted wrongly",
        "x + b_dec encoded",
        "b_dec is subtracted from the input, and should not be.",
        "Set what its format has for that (SAELens: apply_b_dec_to_input false).",
        Change(shift=b_dec),
    )


def _centring(sae: SparseAutoencoder, rows: Rows) -> Iterator[Trial]:
    mean = rows.mean
    yield Trial(
        "input uncentred",
        f"the activations' mean (norm {float(mean.norm()):.4g}) subtracted",
        "The input is not centred: the SAE expects activations from which the mean is subtracted.",
        "Fold the mean into the weights (b_enc minus mean · W_enc, b_dec plus the mean), or "
        "subtract it before encoding.",
        Change(shift=-mean, out_shift=-mean),
        estimated=True,
    )
    scaler = _own_scaler(sae)
    if scaler and bool(scaler[0].any()):
        yield Trial(
            "input centred",
            "scaler.json's mean added",
            "The activations are centred, and the SAE expects them raw.",
            "Give the SAE raw activations: add the mean that was subtracted.",
            Change(shift=scaler[0], out_shift=scaler[0]),
        )


def _scaler(sae: SparseAutoencoder) -> Iterator[Trial]:
    scaler = _own_scaler(sae)
    if scaler is None:
        return
    mean, scale = scaler
    even = bool((scale - scale[0]).abs().max() <= 1e-9 * scale[0].abs())
    by: float | Tensor = float(scale[0]) if even else scale
    yield Trial(
        "scaler not folded",
        "scaler.json's mean subtracted, and divided by its scale",
        "The scaling of scaler.json is not in the weights: the SAE expects scaled activations.",
        "Fold it in (SparseAutoencoder.folded), or train the SAE again with this package.",
        Change(scale=1 / by, shift=-mean / scale, out_scale=1 / by, out_shift=-mean / scale),
    )
    yield Trial(
        "scaler folded twice",
        "times scaler.json's scale, and its mean added",
        "The scaling of scaler.json is in the weights twice.",
        "Restore the SAE's weights from before it was folded again.",
        Change(scale=by, shift=mean, out_scale=by, out_shift=mean),
    )


def _own_scaler(sae: SparseAutoencoder) -> tuple[Tensor, Tensor] | None:
    if sae.folder is None or not (sae.folder / SCALER).is_file():
        return None
    try:
        scaler = load_scaler(sae.folder)
    except SaeftyError:
        return None
    return (scaler.mean, scaler.scale) if len(scaler.mean) == sae.d_in else None


def _dtypes() -> Iterator[Trial]:
    for kind in (torch.bfloat16, torch.float16):
        name = str(kind).removeprefix("torch.")
        yield Trial(
            f"dtype {name}",
            f"activations and weights rounded to {name}",
            "",
            "",
            Change(rounded_to=kind),
            evidence=True,
        )
