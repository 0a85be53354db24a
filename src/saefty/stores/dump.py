"""A dump: dense latents in `.pt` chunks, for tools that read nothing else.

    meta.json                                 the width under `SAE_D_FEAT`
    sae_feats_layer<L>_chunk<n:05d>.pt        {"sae_feats": [N, M] float32,
                                               "total_tokens_so_far": int, this chunk included}

One folder an SAE. Dense: M numbers a token, most of them zero, so a hundred times the store's size.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_array

from saefty import fsio
from saefty.errors import DiskError
from saefty.stores.features import FeatureStore, Key, layer_of

CHUNK_BYTES = 256 << 20
"""Most bytes of a chunk, which is held in memory."""


def write_dumps(
    store: FeatureStore, places: Mapping[Key, Path], *, chunk_bytes: int = CHUNK_BYTES
) -> list[Path]:
    """Write several SAEs' features densely; return the paths.

    Args:
        store: The store.
        places: Which SAEs, and the folder of each one's dump, all on one disk.
        chunk_bytes: Most bytes of a chunk.

    Raises:
        MismatchError: If the store has no such SAE.
        DiskError: If the disk is too small for all of them, or a file cannot be written.
    """
    for place in list(places.values())[:1]:
        _require_room(store, places, place)
    return [
        path for key, place in places.items() for path in _write(store, key, place, chunk_bytes)
    ]


def write_dump(
    store: FeatureStore, key: Key, folder: Path, *, chunk_bytes: int = CHUNK_BYTES
) -> list[Path]:
    """Write an SAE's features densely, in chunks; return the paths.

    Args:
        store: The store.
        key: Which SAE.
        folder: The dump's folder.
        chunk_bytes: Most bytes of a chunk.

    Raises:
        MismatchError: If the store has no such SAE.
        DiskError: If the disk is too small, or a file cannot be written.
    """
    return write_dumps(store, {key: folder}, chunk_bytes=chunk_bytes)


def _require_room(store: FeatureStore, keys: Collection[Key], folder: Path) -> None:
    width = sum(store.d_sae(key) for key in keys)
    needed, free = store.n_tokens * width * 4, fsio.free_bytes(folder)
    if needed > free:
        names = ", ".join(map(str, keys))
        raise DiskError(
            f"the dump of layer {names} is dense: {store.n_tokens:,} tokens of {width:,} latents "
            f"take {needed:,} bytes, but {free:,} are free in {folder}.",
            safe="Nothing was written.",
            then="Choose another disk, or --format parquet, which stays sparse.",
        )


def _write(store: FeatureStore, key: Key, folder: Path, chunk_bytes: int) -> list[Path]:
    fsio.make_folder(folder)
    layer, width, total = layer_of(key), store.d_sae(key), 0
    written = []
    for number, part in enumerate(_chunks(store, key, max(chunk_bytes // (4 * width), 1))):
        total += len(part)
        path = folder / f"sae_feats_layer{layer}_chunk{number:05d}.pt"
        with fsio.staged(path) as temporary:
            held = {"sae_feats": torch.from_numpy(part), "total_tokens_so_far": total}
            torch.save(held, temporary)
        written.append(path)
    meta = {
        "SAE_D_FEAT": width,
        "layer": layer,
        "site": store.site(key).name,
        "model_name": store.manifest["model_name"],
        "dtype": "float32",
        "total_tokens": total,
        "chunks": len(written),
    }
    fsio.commit_json(folder / "meta.json", meta)
    return [*written, folder / "meta.json"]


def _chunks(
    store: FeatureStore, key: Key, most: int
) -> Iterator[Float[np.ndarray, "tokens d_sae"]]:
    for shard in store.chunks(key):
        for start in range(0, shard.shape[0], most):
            part: csr_array = shard[start : start + most]
            yield part.toarray()
