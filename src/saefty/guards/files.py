"""A guard's folder: written whole, moved anywhere, and read without trusting it.

    guard.safetensors   columns, center, scale, weights of the `Linear`; hashes of its texts
    vocabulary.txt      of a guard of words: one word a line, in the order of the columns
    sae/                of a guard of latents: the SAE, as `save_sae` writes it
    guard.md            what it detects, on what it was measured, its limits; for people
    guard.json          all else, with a checksum of itself and of the others; written last

An SAE goes into the folder whole, because which latents fire depends on all of them where k are
chosen. One that was fetched from the hub is named instead, with its commit: it can be had again,
and may fill gigabytes. Either way the checksum of its weights is in guard.json. The model is never
copied; its name, commit or digests are.
"""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saefty import fsio
from saefty.errors import ConfigError, IntegrityError, MismatchError
from saefty.guards.card import card
from saefty.guards.place import CARD, RECORD, SAE, WEIGHTS, WORDS, check_same, no_guard
from saefty.guards.record import (
    Fields,
    SaeSource,
    facts_record,
    model_record,
    read_facts,
    read_sae,
    read_spec,
    spec_record,
)
from saefty.guards.spec import GuardFacts, GuardSpec, text_hash
from saefty.installation import package_versions
from saefty.linear import Linear
from saefty.records import Example
from saefty.sae_sets import sae_checksum
from saefty.saes import native
from saefty.saes.base import SparseAutoencoder
from saefty.sources import load_sae
from saefty.tensorfile import TensorFile, pack

VERSION = 1
ARRAYS, FITTED_ON = ("columns", "center", "scale", "weights"), "fitted_on"
_AGAIN = "Copy the guard's folder again, or save it anew from its probe."
MAX_RECORD_BYTES = 16 << 20
CACHED = re.compile(
    r"/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)(?:/(?P<inner>.+))?$"
)
"""A folder in the hub's cache: what was fetched from where."""


@dataclass(frozen=True)
class GuardFiles:
    """A guard's folder, read and checked; model and SAE are not loaded yet."""

    folder: Path
    spec: GuardSpec
    linear: Linear
    facts: GuardFacts
    sae: SaeSource | None
    fitted_on: frozenset[int]
    """Hashes of the texts that it was fitted on, as `text_hash`."""
    saefty: str
    """The version that wrote it."""

    @property
    def sae_record(self) -> dict[str, Any] | None:
        """Where its SAE is, as JSON values."""
        return None if self.sae is None else asdict(self.sae)

    def load_sae(self) -> SparseAutoencoder:
        """Load the SAE.

        Raises:
            MismatchError: If it is not the one that the guard was fitted on.
            SaeftyError: As the loaders of SAEs.
        """
        assert self.sae is not None  # asked for by guards of latents alone
        if self.sae.source is None:
            sae = native.load_sae(fsio.safe_join(self.folder, SAE))
        else:
            sae = load_sae(self.sae.source, self.sae.sae_id, revision=self.sae.revision)
        found = _checksum(sae)
        if found != self.sae.checksum:
            raise MismatchError(
                f"the SAE in {self.sae.source or self.folder / SAE} is not the one that this guard "
                f"was fitted on: the checksum of its weights is {found}, the guard's record says "
                f"{self.sae.checksum}.",
                then="Copy the guard's whole folder again, or save the guard anew from its probe.",
            )
        return sae


def save_guard(
    folder: Path | str,
    spec: GuardSpec,
    linear: Linear,
    facts: GuardFacts,
    sae: SparseAutoencoder | None = None,
    fitted_on: Sequence[Example] = (),
) -> Path:
    """Write a guard into a folder; the same guard again changes nothing.

    Args:
        folder: The guard's folder; made if it does not exist.
        spec: What it reads, and its thresholds.
        linear: What it has learnt.
        facts: On what it was fitted and measured.
        sae: Of a guard of latents: the SAE that makes them.
        fitted_on: The training examples. Hashes of their texts are kept, so that scores of the same
            texts are not taken for a test.

    Returns:
        The folder.

    Raises:
        ConfigError: If the folder holds something else, or another guard.
        ValueError: If the parts do not belong together.
        DiskError: If a file cannot be written.
    """
    folder = Path(folder)
    _check_parts(spec, linear, sae)
    arrays = {name: np.ascontiguousarray(getattr(linear, name)) for name in ARRAYS}
    arrays[FITTED_ON] = np.array(sorted({text_hash(one) for one in fitted_on}), dtype=np.int64)
    weights = pack(arrays, {"format": "np"})
    words = "".join(f"{word}\n" for word in spec.vocabulary)
    files = {WEIGHTS: fsio.digest_bytes(weights)}
    if spec.vocabulary:
        files[WORDS] = fsio.digest_bytes(words.encode("utf-8"))
    place = _place(sae)
    record = {
        "kind": "saefty guard",
        "version": VERSION,
        "saefty": package_versions()["saefty"],
        "reads": spec_record(spec),
        "model": model_record(spec.model),
        "sae": place,
        "linear": {"width": linear.width, "bias": float(linear.bias)},
        "thresholds": {"default": spec.threshold, "fpr_1pct": spec.threshold_1pct},
        "facts": facts_record(facts),
        "files": files,
    }
    check_same(folder, record)
    fsio.commit_bytes(folder / WEIGHTS, weights)
    if spec.vocabulary:
        fsio.commit_text(folder / WORDS, words)
    if sae is not None and place is not None and place["source"] is None:
        native.save_sae(sae, folder / SAE)
    fsio.commit_text(folder / CARD, card(folder.name, spec, linear, facts, place))
    fsio.commit_sealed(folder / RECORD, record)
    return folder


def read_guard(folder: Path | str) -> GuardFiles:
    """Read a guard's folder and check it.

    Args:
        folder: The folder.

    Raises:
        ConfigError: If there is no guard.
        MismatchError: If a newer saefty wrote it.
        IntegrityError: If a file is missing, damaged or holds what no guard can.
        UnsafeArtifactError: If a file leads out of the folder.
    """
    folder = Path(folder)
    path = fsio.safe_join(folder, RECORD) if folder.is_dir() else folder / RECORD
    if not path.is_file():
        fact, step = no_guard(folder)
        raise ConfigError(fact, then=step)
    if path.stat().st_size > MAX_RECORD_BYTES:
        raise IntegrityError(
            f"{path} has {path.stat().st_size} bytes, and no guard's record has more than "
            f"{MAX_RECORD_BYTES}."
        )
    _check_version(Fields(fsio.read_json(path), str(path)))
    try:
        record = Fields(fsio.read_sealed(path), str(path))
    except IntegrityError as error:
        raise IntegrityError(error.message, then=_AGAIN) from None
    files = record.section("files").each(str)
    words = record.section("reads").get("kind", str) == "words"
    for name in (WEIGHTS, *([WORDS] if words else [])):
        _check_file(folder, name, files)
    spec = read_spec(record, _read_words(folder / WORDS) if words else ())
    linear, fitted_on = _read_linear(record.section("linear"), folder / WEIGHTS)
    if words and len(spec.vocabulary) != linear.width:
        raise IntegrityError(
            f"{folder / WORDS} holds {len(spec.vocabulary)} words, but the guard reads "
            f"{linear.width} columns."
        )
    if spec.reads == "dense" and spec.model and spec.model.d_model != linear.width:
        raise IntegrityError(
            f"{path}: the model is {spec.model.d_model} wide, but the guard reads {linear.width} "
            "columns."
        )
    sae = read_sae(record.maybe_section("sae"))
    if (sae is None) == (spec.reads == "latents"):
        raise IntegrityError(
            f"{path}: a guard of {spec.reads} {'lacks its' if sae is None else 'has an'} SAE."
        )
    facts = read_facts(record.section("facts"))
    return GuardFiles(folder, spec, linear, facts, sae, fitted_on, record.get("saefty", str))


def _check_parts(spec: GuardSpec, linear: Linear, sae: SparseAutoencoder | None) -> None:
    """Refuse parts that do not belong together.

    Raises:
        ValueError: If widths differ, or an SAE is missing or too many.
    """
    if (sae is not None) != (spec.reads == "latents"):
        raise ValueError(f"a guard of {spec.reads} takes {'an' if sae is None else 'no'} SAE")
    widths = {
        "words": len(spec.vocabulary),
        "dense": spec.model.d_model if spec.model else 0,
        "latents": sae.d_sae if sae is not None else 0,
    }
    if linear.width != widths[spec.reads]:
        raise ValueError(
            f"the detector reads {linear.width} columns, but there are {widths[spec.reads]} of "
            f"{spec.reads}"
        )
    if sae is not None and spec.model is not None and sae.d_in != spec.model.d_model:
        raise ValueError(f"the SAE is {sae.d_in} wide and the model {spec.model.d_model}")


def _place(sae: SparseAutoencoder | None) -> dict[str, Any] | None:
    """Return where a guard's SAE will be found, as JSON values."""
    if sae is None:
        return None
    place: dict[str, Any] = dict.fromkeys(("source", "sae_id", "revision"))
    cached = CACHED.search(sae.folder.absolute().as_posix()) if sae.folder else None
    if cached:
        told = sae.metadata
        by_release = told.get("repo_id") and told.get("release") and told.get("sae_id")
        repo, inner = f"{cached['owner']}/{cached['name']}", cached["inner"] or None
        place["source"] = told["release"] if by_release else repo
        place["sae_id"] = told["sae_id"] if by_release else inner
        place["revision"] = cached["revision"]
    return {**place, "checksum": _checksum(sae)}


def _checksum(sae: SparseAutoencoder) -> str:
    """Return the checksum of an SAE's weights as they are saved, in float32."""
    exact = all(value.dtype == torch.float32 for value in sae.state_dict().values())
    return sae_checksum(sae if exact else deepcopy(sae).float())


def _check_version(record: Fields) -> None:
    kind = record.get("kind", str)
    if kind != "saefty guard":
        raise IntegrityError(f"{record.where} is no guard's record: its kind is {kind!r:.80}.")
    version = record.get("version", int)
    if version > VERSION:
        raise MismatchError(
            f"{record.where} has the version {version}, written by saefty "
            f"{record.values.get('saefty')!r:.40}; this one, {package_versions()['saefty']}, reads "
            f"up to version {VERSION}.",
            then="Update saefty: pip install --upgrade saefty.",
        )


def _check_file(folder: Path, name: str, files: Mapping[str, str]) -> None:
    path = fsio.safe_join(folder, name)
    if name not in files:
        raise IntegrityError(f"{folder / RECORD} names no checksum of {name}.")
    if not path.is_file():
        raise IntegrityError(
            f"{path} is missing.", then="Copy the guard's whole folder, all files of it."
        )
    found = fsio.digest(path)
    if found != files[name]:
        raise IntegrityError(
            f"{path} does not have the bytes that were written: its checksum is {found}, "
            f"{RECORD} says {files[name]}.",
            then=_AGAIN,
        )


def _read_words(path: Path) -> tuple[str, ...]:
    try:
        return tuple(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}") from None


def _read_linear(record: Fields, path: Path) -> tuple[Linear, frozenset[int]]:
    file = TensorFile(path)
    if FITTED_ON not in file.names:
        raise IntegrityError(
            f"{path} holds no hashes of the texts that the guard was fitted on: another version of "
            "saefty wrote it.",
            then="Save it anew from its probe: saefty probe --save FOLDER.",
        )
    arrays = {name: np.array(file.array(name)) for name in (*ARRAYS, FITTED_ON)}
    whole = ("columns", FITTED_ON)
    for name in arrays:
        kind = "int64" if name in whole else "float64"
        if arrays[name].dtype != np.dtype(kind) or arrays[name].ndim != 1:
            raise IntegrityError(
                f"{path}: {name} is {arrays[name].dtype} of the shape {arrays[name].shape}, and a "
                f"row of {kind} is wanted."
            )
        if name != FITTED_ON and len(arrays[name]) != len(arrays["columns"]):
            raise IntegrityError(
                f"{path}: there are {len(arrays['columns'])} columns, but {len(arrays[name])} of "
                f"{name}."
            )
    fitted_on = frozenset(arrays.pop(FITTED_ON).tolist())
    try:
        linear = Linear(**arrays, bias=record.get("bias", float), width=record.get("width", int))
    except ValueError as error:
        raise IntegrityError(f"{path} holds no detector: {error}.") from None
    return linear, fitted_on
