"""A vector that steers: what it is, and the two files it is kept in.

    vector.safetensors   one array, `vector`, float32 [d_model]; any tool reads it
    vector.json          place in the model, method, norms, provenance, and the checksum of the
                         other file; written last

A vector is kept at the length it was made with; `unit` is its direction. How far to go along it is
for whoever steers to say, in units of the activations or of one of the `norms` kept with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saefty import fsio
from saefty.errors import ConfigError, IntegrityError, MismatchError, NumericError
from saefty.models.base import ModelAdapter
from saefty.records import Site
from saefty.tensorfile import TensorFile, pack

TENSOR, RECORD, ARRAY = "vector.safetensors", "vector.json", "vector"
FORMAT = 1
KEYS = ("format", "method", "site", "d_model", "norm", "norms", "provenance", "xxh3_128")
HOW = "Name the place too: sf.load_vector(path, sf.Site(20))."
EXPORTS = (".safetensors", ".npy")
TORCH_FILES = (".pt", ".pth", ".bin")
"""What torch.save writes; reading one may run what is in it, so it is left to whoever made it."""


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction in the activations of one place of a model.

    Attributes:
        values: The vector, float32, in units of the activations.
        site: Where it was made, and where it is to be added.
        method: How it was made: decoder, caa, sae_ts, …
        norms: Lengths in which a scale can be given: `residual`, the mean norm of the activations
            at the site; `latent`, the largest value its latent takes times the decoder row's norm.
            Only those that were measured are there.
        provenance: The model, the SAE and the settings it was made with, and a checksum of the
            texts it was made from.

    Raises:
        NumericError: If it holds NaN or infinity, or is all zero.
    """

    values: Float[Tensor, "d_model"]
    site: Site
    method: str
    norms: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = self.values.detach().to("cpu", torch.float32).reshape(-1).contiguous().clone()
        object.__setattr__(self, "values", values)
        wrong = int((~torch.isfinite(values)).sum())
        if wrong:
            raise NumericError(
                f"{wrong} of the {len(values)} values of the {self.method} vector are NaN or "
                "infinite.",
                then="Make it again; if the model overflows in float16, set "
                "model.dtype=bfloat16 or float32.",
            )
        if not bool(values.any()):
            raise NumericError(
                f"the {self.method} vector is zero in all {len(values)} values, so it has no "
                "direction.",
                then="Choose latents that have a decoder row, or prompts that differ.",
            )

    @property
    def d_model(self) -> int:
        """Its width."""
        return len(self.values)

    @property
    def norm(self) -> float:
        """Its length, in units of the activations."""
        return float(self.values.double().norm())

    @property
    def unit(self) -> Float[Tensor, "d_model"]:
        """Its direction: the vector with length 1."""
        return (self.values.double() / self.norm).float()

    def with_norms(self, **norms: float) -> "SteeringVector":
        """Return the vector with further lengths in which a scale can be given."""
        return replace(self, norms={**self.norms, **norms})

    def check_model(self, model: ModelAdapter) -> None:
        """Check that a model has this vector's place, at its width.

        Raises:
            ConfigError: If the model has no such layer.
            MismatchError: If the model is of another width.
        """
        model.info.check_sites([self.site])
        if model.d_model != self.d_model:
            raise MismatchError(
                f"the {self.method} vector is {self.d_model} wide, but the activations of "
                f"{model.name} are {model.d_model} wide.",
                then=f"Use a vector made on this model; this one was made on "
                f"{self.provenance.get('model', 'another one')}.",
            )

    def save(self, path: Path | str) -> Path:
        """Write the vector and its record; return the path that `load_vector` reads.

        Args:
            path: A folder, or a file NAME.safetensors, beside which NAME.json will lie.

        Raises:
            ConfigError: If the path has the suffix of another kind of file, or holds anything but
                this very vector.
            DiskError: If the files cannot be written.
        """
        tensor, record = _files(Path(path))
        packed = self._packed()
        _refuse_other(Path(path), tensor, record, packed)
        checksum = fsio.commit_bytes(tensor, packed)
        facts = {
            "format": FORMAT,
            "method": self.method,
            "site": self.site.name,
            "d_model": self.d_model,
            "norm": self.norm,
            "norms": dict(self.norms),
            "provenance": dict(self.provenance),
            "xxh3_128": checksum,
        }
        fsio.commit_sealed(record, facts)
        return Path(path)

    def export(self, path: Path | str) -> Path:
        """Write the bare vector as one file that other tools read.

        Args:
            path: NAME.safetensors, with one tensor `vector`, or NAME.npy.

        Raises:
            ConfigError: If the suffix is neither.
            DiskError: If the file cannot be written.
        """
        final = Path(path)
        _check_export(final)
        if final.suffix == ".npy":
            with fsio.staged(final) as temporary, open(temporary, "wb") as file:
                np.save(file, self.values.numpy())
        else:
            fsio.commit_bytes(final, self._packed())
        return final

    def _packed(self) -> bytes:
        return pack({ARRAY: self.values.numpy()}, {"site": self.site.name, "method": self.method})


def check_targets(path: Path | str, export: Path | str | None = None) -> None:
    """Refuse paths that `save` and `export` would refuse, before there is a vector to lose.

    Raises:
        ConfigError: If a path has the suffix of another kind of file.
    """
    _files(Path(path))
    if export is not None:
        _check_export(Path(export))


def load_vector(
    path: Path | str, site: Site | int | None = None, *, how: str = HOW
) -> SteeringVector:
    """Read a vector back.

    Args:
        path: What `save` was given; or a bare file (.safetensors with one tensor, .npy) of any
            tool, together with its site.
        site: Where a bare file's vector belongs, a block's number standing for its output; for a
            saved one, it is in the record.
        how: What to do about a bare file without a site, for the message.

    Raises:
        ConfigError: If there is no vector at the path, or a bare file comes without a site.
        IntegrityError: If a file is damaged, or its record lacks a key.
        MismatchError: If record and file disagree about the width.
        NumericError: If it holds NaN or infinity, or is all zero.
    """
    where = Path(path)
    if isinstance(site, int):
        site = Site(site)
    if where.suffix not in (*EXPORTS, "") and not where.is_dir():
        raise ConfigError(
            f"{where} is not read as a vector: one is a folder of saefty steer vector, or a file "
            f"{' or '.join(EXPORTS)}.",
            then=f"Write it as one: np.save({where.with_suffix('.npy').name!r}, "
            f"torch.load({where.name!r}).float().numpy()) in Python."
            if where.suffix in TORCH_FILES
            else "Name one of these.",
        )
    if where.is_dir() and not any((where / name).exists() for name in (TENSOR, RECORD)):
        raise ConfigError(
            f"{where} holds no vector: neither {TENSOR} nor {RECORD} is in it.",
            then="Name a folder that `saefty steer vector` wrote.",
        )
    if not where.exists() and not where.suffix:
        raise ConfigError(
            f"there is no vector at {where}.",
            then="Make one: saefty steer vector --method decoder --sae FOLDER --latent 7 --out "
            f"{where}.",
        )
    if where.suffix == ".npy":
        return _bare(where, site, how)
    tensor, record = _files(where)
    if not record.exists() and tensor.exists() and where.suffix == ".safetensors":
        return _bare(where, site, how)
    return _recorded(tensor, record)


def _recorded(tensor: Path, record: Path) -> SteeringVector:
    facts = fsio.read_sealed(record)
    missing = [key for key in KEYS if key not in facts]
    if missing:
        raise IntegrityError(
            f"{record} lacks {', '.join(missing)}; a vector's record has {', '.join(KEYS)}.",
            then="Make the vector again with saefty steer vector.",
        )
    if facts["format"] != FORMAT:
        raise MismatchError(
            f"{record} is of format {facts['format']}, and this version reads {FORMAT}.",
            then="Make the vector again with saefty steer vector, or update saefty.",
        )
    if not tensor.exists():
        raise IntegrityError(
            f"{tensor} is missing, which {record.name} describes.",
            then="Restore it from a copy, or make the vector again.",
        )
    found = fsio.digest(tensor)
    if found != facts["xxh3_128"]:
        raise IntegrityError(
            f"{tensor} is damaged: its checksum is {found}, but {facts['xxh3_128']} was written.",
            then="Restore it from a copy, or make the vector again.",
        )
    values = _array(tensor)
    if len(values) != facts["d_model"]:
        raise MismatchError(
            f"{tensor} is {len(values)} wide, but {record.name} says {facts['d_model']}.",
            then="Make the vector again with saefty steer vector.",
        )
    return SteeringVector(
        torch.from_numpy(values),
        Site.parse(facts["site"]),
        facts["method"],
        facts["norms"],
        facts["provenance"],
    )


def _bare(path: Path, site: Site | None, how: str) -> SteeringVector:
    """Return the vector in a file that nothing describes."""
    if not path.is_file():
        raise ConfigError(f"there is no file {path}.", then="Name the file of a vector.")
    if site is None:
        raise ConfigError(
            f"{path} is a bare vector: nothing says at which place of a model to add it.",
            then=how,
        )
    values = _array(path)
    provenance = {"file": str(path), "xxh3_128": fsio.digest(path)}
    return SteeringVector(torch.from_numpy(values), site, "file", provenance=provenance)


def _array(path: Path) -> Float[np.ndarray, "d_model"]:
    """Return the one array of a file as float32, in memory of its own."""
    if path.suffix == ".npy":
        try:
            found = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise IntegrityError(f"{path} is not a readable .npy file: {error}") from None
    else:
        file = TensorFile(path)
        if len(file.names) != 1:
            raise IntegrityError(
                f"{path} holds {len(file.names)} arrays ({', '.join(file.names[:5])}); a vector's "
                "file holds one.",
                then="Write the vector alone into a file.",
            )
        name = file.names[0]
        found = file.array(name)
        if file.is_bf16(name):
            found = (found.astype(np.uint32) << 16).view(np.float32)
    squeezed = found.squeeze() if found.size > 1 else found.reshape(-1)
    if squeezed.ndim != 1 or not np.issubdtype(squeezed.dtype, np.floating):
        raise MismatchError(
            f"{path} holds {found.dtype} values of shape {list(found.shape)}; a vector is one row "
            "of floating-point numbers.",
            then="Write the vector alone into a file.",
        )
    return np.array(squeezed, dtype=np.float32)


def _refuse_other(path: Path, tensor: Path, record: Path, packed: bytes) -> None:
    """Refuse a place at which something else lies."""
    files = (tensor, record)
    held = set(path.iterdir()) if path.is_dir() else {one for one in files if one.exists()}
    if not held or (held <= {tensor, record} and tensor in held and tensor.read_bytes() == packed):
        return
    what = "another vector" if held <= {tensor, record} else "something else"
    raise ConfigError(
        f"{path} holds {what}: {', '.join(sorted(one.name for one in held)[:5])}.",
        then="Nothing was changed. Give another --out, or move what is there away.",
    )


def _check_export(final: Path) -> None:
    if final.suffix not in EXPORTS:
        raise ConfigError(
            f"a vector is exported as {' or '.join(EXPORTS)}, not as {final.name}.",
            then=f"Name the file {final.stem or 'vector'}.safetensors or .npy.",
        )


def _files(path: Path) -> tuple[Path, Path]:
    """Return where the tensor and its record lie."""
    if path.suffix == ".safetensors" and not path.is_dir():
        return path, path.with_suffix(".json")
    if path.suffix in (".json", ".npy", ".pt", ".bin"):
        raise ConfigError(
            f"a vector is kept in a folder or as NAME.safetensors, not as {path.name}.",
            then=f"Name {path.with_suffix('.safetensors').name} or a folder.",
        )
    return path / TENSOR, path / RECORD
