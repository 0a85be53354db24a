"""Effect data: training vectors, and by how much each moved the latents of what was written.

    plan.safetensors     the vectors, norm 1, fixed before the first rollout
    plan.json            their scale, how it was found, how many share a batch
    baseline.safetensors mean latents without steering
    pieces/NNNNN.safetensors  mean latents under some vectors in some rollouts, as compressed rows

Latents that never fire take no room, so the memory is that of what moved. A piece is named by the
plan and committed whole: a run that was cut short measures the pieces that are missing. Which
vectors and which rollouts a piece is about follows from its number (`pieces_of`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saefty import fsio
from saefty.errors import ConfigError, IntegrityError
from saefty.records import Site
from saefty.sae_ts.rollouts import MeanLatents
from saefty.saes.base import SparseAutoencoder
from saefty.tensorfile import TensorFile, pack

PLAN, PLANNED, BASELINE, PIECES = "plan.json", "plan.safetensors", "baseline.safetensors", "pieces"
Kind = Literal["random", "decoder", "mixed"]

MOVED = 1e-6
"""A latent that changed by no more than this share of one did not move."""


@dataclass(frozen=True, eq=False)
class Effects:
    """What training vectors did.

    Attributes:
        vectors: The training vectors, norm 1; those that wrote nothing are left out.
        steered: Mean latents under each, at length `scale`; a row a vector.
        baseline: Mean latents without steering.
        scale: Length at which the vectors were added.
        site: Where.
        facts: What else is known: the model, the SAE, the rollouts.
        silent: How many vectors were left out because nothing was written under them.
    """

    vectors: Float[np.ndarray, "vectors d_model"]
    steered: sp.csr_matrix
    baseline: Float[np.ndarray, "d_sae"]
    scale: float
    site: Site
    facts: Mapping[str, Any]
    silent: int = 0

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.baseline)

    def toward(self, weights: Float[np.ndarray, "d_sae"]) -> Float[np.ndarray, "vectors"]:
        """Return each vector's effect on a weighted sum of latents: (steered - baseline) w."""
        return np.asarray(self.steered @ weights - self.baseline @ weights)

    def moved(self, latents: Sequence[int]) -> Bool[np.ndarray, "vectors latents"]:
        """Return which vectors moved which latents, by more than rounding."""
        chosen = list(latents)
        change = np.abs(self.steered[:, chosen].toarray() - self.baseline[chosen])
        return change > MOVED * (1 + change)

    def subset(self, rows: Int[np.ndarray, "chosen"]) -> "Effects":
        """Return the effects of some of the vectors."""
        return Effects(
            self.vectors[rows],
            self.steered[rows],
            self.baseline,
            self.scale,
            self.site,
            self.facts,
            self.silent,
        )


def training_vectors(
    kind: Kind, count: int, sae: SparseAutoencoder, *, seed: int
) -> Float[Tensor, "count d_model"]:
    """Return vectors of norm 1 whose effects are to be learned from.

    Args:
        kind: `random` directions; the `decoder` rows of latents drawn without repetition; `mixed`,
            half of each.
        count: How many.
        sae: Whose decoder rows; rows of zeros are passed over.
        seed: The same seed makes the same vectors.

    Raises:
        ConfigError: If more decoder rows are asked for than there are.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = sae.W_dec.detach().float().cpu()
    live = torch.nonzero(rows.norm(dim=1) > 0)[:, 0]
    wanted = {"random": 0, "decoder": count, "mixed": min(count // 2, len(live))}[kind]
    if wanted > len(live):
        raise ConfigError(
            f"{wanted} decoder rows were asked for, but the SAE has {len(live)} that are not zero.",
            then=f"Set effects.vectors={len(live)}, or effects.kind=mixed.",
        )
    drawn = rows[live[torch.randperm(len(live), generator=generator)[:wanted]]]
    free = torch.randn(count - wanted, rows.shape[1], generator=generator)
    both = torch.cat([drawn, free]).double()
    both = both[torch.randperm(count, generator=generator)]  # so that any part holds both kinds
    return (both / both.norm(dim=1, keepdim=True)).float()


def write_plan(
    folder: Path, units: Float[Tensor, "vectors d_model"], facts: dict[str, Any]
) -> None:
    """Fix a run's vectors and how they will be tried."""
    data = pack({"vectors": units.numpy()}, {})
    checksum = fsio.commit_bytes(folder / PLANNED, data)
    fsio.commit_sealed(folder / PLAN, {**facts, "vectors_xxh3_128": checksum})


def read_plan(folder: Path) -> tuple[Float[np.ndarray, "vectors d_model"], dict[str, Any]]:
    """Return a run's vectors and facts.

    Raises:
        ConfigError: If the folder holds no effect data.
        IntegrityError: If the plan is damaged.
    """
    if not (folder / PLAN).exists():
        raise ConfigError(
            f"{folder} holds no effect data: {PLAN} is missing.",
            then="Name a run of saefty steer effects.",
        )
    facts = fsio.read_sealed(folder / PLAN)
    found = fsio.digest(folder / PLANNED) if (folder / PLANNED).exists() else "missing"
    if found != facts["vectors_xxh3_128"]:
        raise IntegrityError(
            f"{folder / PLANNED} is damaged: its checksum is {found}, but "
            f"{facts['vectors_xxh3_128']} was written.",
            safe="The pieces are whole, but nothing says which vectors they belong to.",
            then="Restore it from a copy, or measure again with run.dir on a new folder.",
        )
    return np.array(TensorFile(folder / PLANNED).array("vectors")), facts


@dataclass(frozen=True)
class Piece:
    """Vectors and rollouts that are measured together: first ones, and those behind the last."""

    index: int
    vectors: tuple[int, int]
    rollouts: tuple[int, int]


def pieces_of(facts: Mapping[str, Any], vectors: int) -> list[Piece]:
    """Return the pieces of a plan: for each group of vectors its rollouts, a few at a time."""
    size, total = int(facts["batch_vectors"]), int(facts.get("rollouts", 1))
    each = int(facts.get("piece_rollouts", total))  # plans of old: all rollouts in one piece
    spans = [
        ((first, min(first + size, vectors)), (begin, min(begin + each, total)))
        for first in range(0, vectors, size)
        for begin in range(0, total, each)
    ]
    return [Piece(index, *span) for index, span in enumerate(spans)]


def piece_path(folder: Path, index: int) -> Path:
    """Return where a piece lies."""
    return folder / PIECES / f"{index:05d}.safetensors"


def write_means(path: Path, measured: MeanLatents) -> None:
    """Write the mean latents of some vectors; latents that did not fire take no room."""
    rows = sp.csr_matrix(np.nan_to_num(measured.means).astype(np.float32))
    arrays: dict[str, np.ndarray] = {
        "indptr": rows.indptr.astype(np.int64),
        "ids": rows.indices.astype(np.uint32),
        "values": rows.data.astype(np.float32),
        "tokens": measured.tokens.astype(np.int64),
    }
    content = fsio.digest_blocks([array.tobytes() for array in arrays.values()])
    fsio.commit_bytes(path, pack(arrays, {"d_sae": measured.means.shape[1], "xxh3_128": content}))


def read_means(path: Path, d_sae: int) -> tuple[sp.csr_matrix, Int[np.ndarray, "vectors"]]:
    """Return the mean latents in a file, and how many tokens each row is the mean of.

    Raises:
        IntegrityError: If the file is missing or damaged, or of another number of latents.
    """
    if not path.exists():
        raise IntegrityError(f"{path} is missing.", then="Run saefty steer effects again.")
    file = TensorFile(path)
    arrays = {name: np.array(file.array(name)) for name in ("indptr", "ids", "values", "tokens")}
    found = fsio.digest_blocks([array.tobytes() for array in arrays.values()])
    if found != file.header.get("xxh3_128") or str(d_sae) != file.header.get("d_sae"):
        raise IntegrityError(
            f"{path} is damaged: the checksum of its content is {found}, but "
            f"{file.header.get('xxh3_128')} was written.",
            safe="The other pieces are whole.",
            then="Remove the file and run the same command again: it measures this piece anew.",
        )
    shape = (len(arrays["indptr"]) - 1, d_sae)
    rows = sp.csr_matrix(
        (arrays["values"], arrays["ids"].astype(np.int64), arrays["indptr"]), shape=shape
    )
    return rows, arrays["tokens"]


def read_effects(folder: Path) -> Effects:
    """Return the effects that a complete run measured.

    Raises:
        ConfigError: If the folder holds no effect data.
        IntegrityError: If a file is missing or damaged.
    """
    vectors, facts = read_plan(folder)
    d_sae = int(facts["d_sae"])
    tokens = np.zeros(len(vectors), dtype=np.int64)
    parts: dict[int, list[sp.csr_matrix]] = {}
    for piece in pieces_of(facts, len(vectors)):
        means, counts = read_means(piece_path(folder, piece.index), d_sae)
        parts.setdefault(piece.vectors[0], []).append(sp.diags(counts.astype(np.float64)) @ means)
        tokens[slice(*piece.vectors)] += counts
    sums = sp.vstack([sum(group[1:], start=group[0]) for group in parts.values()], format="csr")
    steered = sp.csr_matrix(sp.diags(1 / np.maximum(tokens, 1)) @ sums)
    baseline, _ = read_means(folder / BASELINE, d_sae)
    spoke = np.flatnonzero(tokens > 0)
    return Effects(
        vectors[spoke],
        steered[spoke],
        baseline.toarray()[0].astype(np.float64),
        float(facts["scale"]),
        Site.parse(facts["site"]),
        facts,
        len(vectors) - len(spoke),
    )
