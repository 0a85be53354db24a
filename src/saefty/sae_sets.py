"""The SAEs of one encoding: found, given keys, and held in memory as far as it reaches.

Any number of SAEs read one forward pass: one a layer, several of one layer, or SAEs of other hook
points. The first of a layer goes by the layer's number, each further one by `<layer>__<name>`. What
does not fit into memory together is loaded when it is its turn and let go after it, so that one SAE
at a time is enough; what comes out does not depend on that.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from saefty import fsio
from saefty.errors import ConfigError, MismatchError
from saefty.formats.base import FORMATS, format_of
from saefty.kernels.base import choose_kernels
from saefty.pairing import model_relation
from saefty.records import PARTS, Site
from saefty.saes.base import SparseAutoencoder
from saefty.sources import load_sae
from saefty.stores.features import Key, layer_of

log = logging.getLogger(__name__)

AVAILABLE_SHARE = 0.5  # of the free memory that SAEs may fill; pieces and products need the rest
EXPECTED_L0 = 100  # of an SAE that does not say; published ones have 20 to 200
PUBLISHED = ("release", "sae_id", "neuronpedia_id")
"""What a store keeps of an SAE's metadata, where it is known."""


@dataclass(frozen=True)
class SaePlace:
    """Where one SAE is loaded from."""

    source: str
    sae_id: str | None = None
    site: Site | None = None
    """Where it reads, if it does not say so itself."""

    def load(self) -> SparseAutoencoder:
        """Load it.

        Raises:
            MismatchError: If it reads what cannot be captured, or nothing says which block it
                reads.
            SaeftyError: As `load_sae`.
        """
        sae = load_sae(self.source, self.sae_id)
        hook = sae.metadata.get("published_hook")
        if sae.site is None and hook:
            raise MismatchError(
                f"the SAE in {self} reads {hook}, which is not captured; what is captured are "
                f"{', '.join(PARTS)} of a block."
            )
        sae.site = sae.site or self.site
        if sae.site is None:
            raise MismatchError(
                f"the SAE in {self} does not say which block it reads.",
                then="Name the block: encode.layers=[12]; of several SAEs one for each.",
            )
        return sae

    def __str__(self) -> str:
        return self.source if self.sae_id is None else f"{self.source} ({self.sae_id})"


@dataclass(frozen=True)
class SaeRecord:
    """What is known of an SAE without its weights in memory."""

    site: Site
    d_in: int
    d_sae: int
    expected_l0: float | None
    """Latents that fire on a row; None where nothing says it."""
    folder: str | None
    trained_on: str | None
    checksum: str
    """Of its weights."""
    n_bytes: int
    published: Mapping[str, str]
    """Release, SAE id and Neuronpedia's name, as far as they are known."""
    contrast: Mapping[str, str] | None = None
    """Method and scope of the contrast that it was trained on; None for plain activations."""

    @classmethod
    def of(cls, sae: SparseAutoencoder, site: Site) -> "SaeRecord":
        """Return what an SAE says of itself."""
        held = sae.state_dict().values()
        known = {name: sae.metadata.get(name) for name in PUBLISHED}
        return cls(
            site=sae.site or site,
            d_in=sae.d_in,
            d_sae=sae.d_sae,
            expected_l0=sae.config.k or sae.metadata.get("expected_l0"),
            folder=None if sae.folder is None else str(sae.folder),
            trained_on=sae.metadata.get("model_name"),
            checksum=sae_checksum(sae),
            n_bytes=sum(value.numel() * value.element_size() for value in held),
            published={name: str(value) for name, value in known.items() if value},
            contrast=sae.metadata.get("contrast"),
        )


class SaeSet(Mapping[Key, SparseAutoencoder]):
    """SAEs by key, in the order of layers; an SAE that is not held is loaded when it is asked for.

    Do not keep what you were given longer than you need it: two that are streamed must not be in
    memory together. Make one by `SaeSet.of` or `open_saes`.

    Args:
        records: What is known of each SAE.
        places: Where those that are not held come from.
        held: Those that are in memory.
        memory: Bytes that SAEs in memory may fill; None decides when they are placed.
    """

    def __init__(
        self,
        records: Mapping[Key, SaeRecord],
        places: Mapping[Key, SaePlace],
        held: Mapping[Key, SparseAutoencoder],
        memory: int | None = None,
    ) -> None:
        self.records = dict(sorted(records.items(), key=lambda item: layer_of(item[0])))
        self._places, self._held, self._memory = dict(places), dict(held), memory
        self._kept: set[Key] = set(records)
        self.device = torch.device("cpu")

    @classmethod
    def of(
        cls,
        saes: Mapping[Key, SparseAutoencoder] | Mapping[int, SparseAutoencoder],
        hook_point: str = "resid_post",
    ) -> "SaeSet":
        """Return a set of SAEs that are in memory already; it holds all of them.

        Args:
            saes: The SAEs by key.
            hook_point: Where those read that do not say it.
        """
        held: dict[Key, SparseAutoencoder] = dict(saes.items())
        records = {
            key: SaeRecord.of(sae, Site(layer_of(key), hook_point)) for key, sae in held.items()
        }
        return cls(records, {}, held)

    def __getitem__(self, key: Key) -> SparseAutoencoder:
        if key in self._held:
            return self._held[key]
        sae = self._places[key].load()
        if sae_checksum(sae) != self.records[key].checksum:
            raise MismatchError(
                f"the SAE {key} in {self._places[key].source} has changed since this run began.",
                safe="The pieces before this one are committed.",
                then="Put it back as it was and run the same command again, or set run.dir to a "
                "new folder.",
            )
        sae = sae.to(self.device)
        if key in self._kept:
            self._held[key] = sae
        return sae

    def __iter__(self) -> Iterator[Key]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a worker process needs to load the same SAEs by itself."""
        return {**vars(self), "_held": {}}

    @property
    def fired(self) -> list[float]:
        """How many latents of each fire on a row, about; not every SAE says so beforehand."""
        return [one.expected_l0 or min(one.d_sae, EXPECTED_L0) for one in self.records.values()]

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where they read, each place once, in order."""
        return tuple(sorted({record.site for record in self.records.values()}))

    @property
    def layers(self) -> list[int]:
        """The layers they read, each once, in order."""
        return sorted({layer_of(key) for key in self.records})

    @property
    def kernels(self) -> str:
        """What selects the latents: their last bits depend on it."""
        return type(choose_kernels(self.device)).__name__

    def placed(self, device: torch.device | str, workers: int = 1) -> "SaeSet":
        """Return the set for a device, with as many SAEs held as fit there.

        Args:
            device: Where the activations are.
            workers: Processes that hold the same, beside each other.
        """
        if not self._places:
            self.device = torch.device(device)
            self._held = {key: sae.to(device) for key, sae in self._held.items()}
            return self
        self.device = torch.device(device)
        in_memory = sum(self.records[key].n_bytes for key in self._held)
        memory = self._memory
        if memory is None:
            memory = int(AVAILABLE_SHARE * (free_memory(self.device) + in_memory)) // workers
        self._kept = _fitting({key: one.n_bytes for key, one in self.records.items()}, memory)
        self._held = {key: sae.to(device) for key, sae in self._held.items() if key in self._kept}
        streamed = len(self.records) - len(self._kept)
        if streamed:
            log.info(
                "%d of %d SAEs are loaded anew for each piece: together they have %.1f GB, and "
                "%.1f GB may be held", streamed, len(self),
                sum(one.n_bytes for one in self.records.values()) / 1e9, memory / 1e9,
            )  # fmt: skip
        return self


def open_saes(
    sources: Sequence[str],
    sae_ids: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    memory_gb: float | None = None,
    hook_point: str = "resid_post",
) -> SaeSet:
    """Find SAEs and give them keys; each is read once, for its site and its checksum.

    Args:
        sources: Training runs, folders of one SAE in any format, repositories of the hub or
            releases.
        sae_ids: Which SAEs of them: as many as sources, or several of one source.
        layers: Only SAEs of these layers; also says where SAEs read that do not say it: the one
            layer, or one for each SAE that is named.
        memory_gb: Memory that SAEs may fill, in 10⁹ bytes; None: half of what is free.
        hook_point: What SAEs read of their layer that do not say where they read.

    Raises:
        ConfigError: If a folder holds no SAE, or sources and ids do not go together.
        MismatchError: If a layer that was asked for has no SAE, or one cannot be placed.
        SaeftyError: As `load_sae`.
    """
    memory = None if memory_gb is None else round(memory_gb * 1e9)
    room = int(AVAILABLE_SHARE * free_memory(torch.device("cpu"))) if memory is None else memory
    records: dict[Key, SaeRecord] = {}
    places: dict[Key, SaePlace] = {}
    held: dict[Key, SparseAutoencoder] = {}
    there: set[int] = set()
    filled = largest = 0
    for place in _places(sources, sae_ids, layers, hook_point):
        sae = place.load()
        site = sae.site
        assert site is not None  # a place without one was refused
        there.add(site.layer)
        if layers is None or site.layer in layers:
            key = _key(site.layer, place, sae, records)
            record = SaeRecord.of(sae, site)
            records[key], places[key] = record, replace(place, site=site)
            largest = max(largest, record.n_bytes)
            if filled + record.n_bytes + largest <= room:  # room for the next one
                held[key], filled = sae, filled + record.n_bytes
            elif filled + largest > room:
                held, filled = {}, 0
        del sae  # before the next one comes
    missing = sorted(set(layers or ()) - {layer_of(key) for key in records})
    if missing:
        raise MismatchError(
            f"layers {missing} were asked for, but {', '.join(sources)} holds SAEs of layers "
            f"{sorted(there)}.",
            then="Train an SAE for these layers, or choose others.",
        )
    return SaeSet(records, places, held, memory)


def find_saes(source: Path) -> list[Path]:
    """Return the SAE folders of a training run, or the folder of one SAE in any known format.

    Raises:
        ConfigError: If the folder holds no SAE.
    """
    if format_of(source) is not None:
        return [source]
    found = sorted(path.parent for path in source.glob("layer_*/cfg.json"))
    if not found:
        raise ConfigError(
            f"{source} holds no SAE: neither in it nor in layer_* folders is one of a known "
            f"format ({', '.join(FORMATS)}).",
            then="Name the folder of a training run, or of one SAE.",
        )
    return found


def sae_checksum(sae: SparseAutoencoder) -> str:
    """Return a checksum of an SAE's weights."""
    blocks = (
        value.detach().cpu().numpy().tobytes() for _, value in sorted(sae.state_dict().items())
    )
    return fsio.digest_blocks(blocks)


def free_memory(device: torch.device) -> int:
    """Return how many bytes can still be had on a device; of the CPU, within the cgroup's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, ValueError, StopIteration):  # where there is no Linux
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free.append(1024 * int(next(one for one in lines if "MemAvailable" in one).split()[1]))
    with suppress(OSError, ValueError):  # "max", or no such file: no limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii"))
                       for name in ("max", "current"))  # fmt: skip
        free.append(max(limit - used, 0))
    return min(free)


def _places(
    sources: Sequence[str], sae_ids: Sequence[str], layers: Sequence[int] | None, hook_point: str
) -> Iterator[SaePlace]:
    if sae_ids and len(sources) != len(sae_ids) and len(sources) != 1:
        raise ConfigError(
            f"encode.sae names {len(sources)} sources and encode.sae_id {len(sae_ids)} SAEs.",
            then="Name one id for each source, or one source and its ids.",
        )
    pairs: list[tuple[str, str | None]] = [(source, None) for source in sources]
    if sae_ids:
        every = sources if len(sources) == len(sae_ids) else [sources[0]] * len(sae_ids)
        pairs = list(zip(every, sae_ids, strict=True))
    asked: list[Site | None] = [None] * len(pairs)
    if layers is not None and len(layers) in {1, len(pairs)}:
        of_each = layers if len(layers) == len(pairs) else [*layers] * len(pairs)
        asked = [Site(layer, hook_point) for layer in of_each]
    for (source, sae_id), site in zip(pairs, asked, strict=True):
        if sae_id is None and Path(source).is_dir():
            for folder in find_saes(Path(source)):
                yield SaePlace(str(folder), None, site)
        else:
            yield SaePlace(source, sae_id, site)


def _key(
    layer: int, place: SaePlace, sae: SparseAutoencoder, taken: Mapping[Key, SaeRecord]
) -> Key:
    """Return the layer's number for its first SAE, `<layer>__<name>` for the others."""
    if layer not in taken:
        return layer
    name = place.sae_id or sae.metadata.get("sae_id")
    if not name:
        folder = Path(place.source)
        name = re.sub(r"^layer_\d+_?", "", folder.name) or folder.parent.name
    name = re.sub(r"[^\w.-]+", "-", str(name)).strip("-.") or "sae"
    key, number = f"{layer}__{name}", 2
    while key in taken:
        key, number = f"{layer}__{name}-{number}", number + 1
    return key


def _fitting(sizes: Mapping[Key, int], memory: int) -> set[Key]:
    """Return which SAEs are held: all, or the first that leave room for one of the others."""
    if sum(sizes.values()) <= memory:
        return set(sizes)
    kept, total, largest = set(), 0, max(sizes.values())
    for key, size in sizes.items():
        if total + size + largest <= memory:
            kept.add(key)
            total += size
    return kept


def warn_of_other_model(records: Mapping[Key, SaeRecord], name: str) -> None:
    """Say where an SAE was trained on another model than the one it is used on."""
    for key, record in records.items():
        relation = model_relation(record.trained_on, name) if record.trained_on else "same"
        if relation != "same":
            kin = "its base or tuned sister" if relation == "base_and_tuned" else "another model"
            log.warning(
                "the SAE of layer %s was trained on %s and is used on %s, %s",
                key, record.trained_on, name, kin,
            )  # fmt: skip
