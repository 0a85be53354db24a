"""Activation stores as `.npz` files, for tools that read nothing else, and back.

    layer_<i>_shard_<n:05d>.npz   x [rows, d_in], example_id, token_pos, token_id, role, label, site

`x` is float32 where the store is bfloat16, which NumPy does not have; `label` is 1 for harmful, 0
for harmless and -1 where it is not known; `site` names the place in the model. Of a contrast
h_on - h_off the array is called `delta`, and `contrast` names its method and scope; files with a
`delta` alone are read as a contrast whose method is unknown. Files are written and read without
pickle.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saefty import fsio
from saefty.errors import InputError
from saefty.npzfile import read_npz
from saefty.records import ROLES, Site
from saefty.stores.activations import (
    ROW_COLUMNS,
    UNKNOWN,
    ActivationStore,
    RowTable,
    commit_activations,
)
from saefty.stores.base import EXAMPLES, StoreWriter

log = logging.getLogger(__name__)

NAME = re.compile(r"layer_(\d+)_shard_(\d{5})\.npz")
VALUES = ("x", "delta")
CONTRAST = ("method", "scope")
SAME_ROWS = ("example_id", "token_pos")


def export_npz(store: ActivationStore, out: Path) -> list[Path]:
    """Write every shard of a store as one `.npz` file a layer; return their paths."""
    examples = store.examples()
    ids = np.array([str(example["example_id"]) for example in examples])
    contrast = store.contrast
    values_name = "x" if contrast is None else "delta"
    labels = np.array([-1 if e["label"] is None else int(e["label"]) for e in examples], np.int8)
    written = []
    for index in range(len(store.pieces)):
        rows = store.file(f"rows/shard_{index:05d}.safetensors")
        example = np.array(rows.array("example"))
        columns = {
            "example_id": ids[example],
            "token_pos": rows.array("token_pos"),
            "token_id": rows.array("token_id"),
            "role": np.array(ROLES)[rows.array("role")],
            "label": labels[example],
        }
        if contrast is not None:
            columns["contrast"] = np.array([contrast[key] for key in CONTRAST])
        for layer in store.layers:
            x = store.shard(layer, index)
            values = x.float().numpy() if x.dtype == torch.bfloat16 else x.numpy()
            path = out / f"layer_{layer}_shard_{index:05d}.npz"
            named = {values_name: values, "site": np.array(store.site(layer).name)}
            with fsio.staged(path) as temporary:
                np.savez(temporary, allow_pickle=False, **named, **columns)
            written.append(path)
    return written


def import_npz(source: Path, folder: Path, hook_point: str | None = None) -> None:
    """Make an activation store of `.npz` files; only `x` (or `delta`) must be in them.

    Args:
        source: A folder with `layer_<i>_shard_<n>.npz` files.
        folder: The store's folder, empty or new; the caller has locked it.
        hook_point: Where the activations were read; None is what the files say, and `resid_post`
            where they do not.

    Raises:
        InputError: If there are no such files, layers have different shards or rows, an array is
            missing or not finite, activations and contrasts are mixed, or a file was read elsewhere
            than another of its layer, its name or `hook_point` says.
        ConfigError: If `hook_point`, or the place that a file names, is none in a model.
        UnsafeArtifactError: If a file would need pickle, or claims to be larger than 8 GiB.
    """
    shards: dict[int, dict[int, Path]] = {}
    for path in sorted(source.glob("*.npz")):
        match = NAME.fullmatch(path.name)
        if match:
            shards.setdefault(int(match.group(2)), {})[int(match.group(1))] = path
    if not shards:
        raise InputError(f"{source} holds no files called layer_<i>_shard_<n:05d>.npz.")
    layers = sorted({layer for files in shards.values() for layer in files})
    known: dict[str, dict[str, Any]] = {}
    prints = {p.name: fsio.digest(p) for files in shards.values() for p in files.values()}
    writer = StoreWriter(folder, "activations", fsio.digest_bytes(fsio.dump_json(prints).encode()))
    records, width, dtype = [], 0, "float32"
    sites: dict[int, set[Site]] = {layer: set() for layer in layers}
    contrasts: dict[tuple[str, ...] | None, str] = {}
    for piece, number in enumerate(sorted(shards)):
        missing = sorted(set(layers) - set(shards[number]))
        if missing:
            raise InputError(f"shard {number} of {source} has no file for layers {missing}.")
        arrays = {layer: _read(shards[number][layer]) for layer in layers}
        rows = _rows(arrays[layers[0]], known, number)
        for layer, held in arrays.items():
            if len(held["x"]) != len(rows["example"]):
                raise InputError(
                    f"shard {number}: layer {layer} has {len(held['x'])} rows, but layer "
                    f"{layers[0]} has {len(rows['example'])}."
                )
            _refuse_other_rows(arrays[layers[0]], held, number, (layers[0], layer))
            contrasts.setdefault(_contrast_of(held), shards[number][layer].name)
            sites[layer].add(_site_of(held, layer, hook_point, shards[number][layer].name))
        x = {layer: torch.from_numpy(held["x"]) for layer, held in arrays.items()}
        width, dtype = x[layers[0]].shape[1], str(x[layers[0]].dtype).removeprefix("torch.")
        records.append(commit_activations(writer, piece, x, rows, {"masked": {}}))
        for layer, found in sites.items():
            if len(found) > 1:
                raise InputError(
                    f"the shards of layer {layer} were read at different places: "
                    f"{', '.join(sorted(site.name for site in found))}.",
                    then="Import them into stores of their own.",
                )
    contrast = _only(contrasts)
    lines = "".join(fsio.dump_json_line(record) for record in known.values())
    fsio.commit_text(folder / EXAMPLES, lines)
    facts = {
        "layers": layers,
        "sites": {str(layer): site.name for layer, (site,) in sites.items()},
        "d_in": width,
        "dtype": dtype,
        "pooling": "imported",
        "model_name": "",
        "n_rows": sum(record["rows"] for record in records),
        "masked": {},
        **({} if contrast is None else {"contrast": dict(zip(CONTRAST, contrast, strict=True))}),
    }
    writer.finish(records, facts, [EXAMPLES])


def _site_of(held: dict[str, np.ndarray], layer: int, hook_point: str | None, name: str) -> Site:
    """Return where the rows of a file were read.

    Raises:
        ConfigError: If the hook point, or what the file says, is no place in a model.
        InputError: If the file says that it was at another layer or hook point.
    """
    given = Site.parse(f"{layer}.{hook_point or 'resid_post'}")
    said = held.get("site")
    if said is None:
        return given
    if said.shape != () or said.dtype.kind != "U":
        raise InputError(
            f"{name} needs one name for site, such as {given.name}; it holds {said.dtype} "
            f"{list(said.shape)}.",
            then="Leave the array out, and set --hook-point.",
        )
    site = Site.parse(str(said))
    if site.layer != layer:
        raise InputError(
            f"{name} is of layer {layer} by its name, but was read at {site.name} by its site.",
            then=f"Call it layer_{site.layer}_shard_<n>.npz, or set its site right.",
        )
    if hook_point is not None and site != given:
        raise InputError(
            f"{name} was read at {site.part}, but --hook-point is {given.part}.",
            then="Leave --hook-point out: the files say where they were read.",
        )
    return site


def _contrast_of(held: dict[str, np.ndarray]) -> tuple[str, ...] | None:
    """Return method and scope of what a file holds; None for plain activations."""
    if "delta" not in held:
        return None
    said = held.get("contrast")
    if said is None or said.shape != (len(CONTRAST),) or said.dtype.kind != "U":
        return (UNKNOWN,) * len(CONTRAST)
    return tuple(said.tolist())


def _only(contrasts: dict[tuple[str, ...] | None, str]) -> tuple[str, ...] | None:
    """Return what all files hold; say so where that is a contrast of which nothing is known.

    Raises:
        InputError: If some hold activations and some contrasts, or different ones.
    """
    if len(contrasts) > 1:
        held = "; ".join(
            f"{name} {'activations (x)' if one is None else ', '.join(one) + ' (delta)'}"
            for one, name in contrasts.items()
        )
        raise InputError(
            f"the files do not hold the same kind of rows: {held}.",
            then="Import them into stores of their own.",
        )
    (contrast,) = contrasts
    if contrast is not None and UNKNOWN in contrast:
        log.warning(
            "the files hold contrasts (delta), but do not say of which method and scope; the store "
            "says %s", UNKNOWN,
        )  # fmt: skip
    return contrast


def _refuse_other_rows(
    first: dict[str, np.ndarray], held: dict[str, np.ndarray], shard: int, layers: tuple[int, int]
) -> None:
    for name in SAME_ROWS:
        one, other = first.get(name), held.get(name)
        if one is None or other is None or np.array_equal(one, other):
            continue
        place = int(np.flatnonzero(one != other)[0])
        raise InputError(
            f"shard {shard}: row {place} is {name} {one[place]} in layer {layers[0]}, but "
            f"{other[place]} in layer {layers[1]}: layers with different rows are no one store.",
            then="Import each layer into a store of its own, or write the rows in one order.",
        )


def _read(path: Path) -> dict[str, np.ndarray]:
    held = read_npz(path)
    name = next((name for name in VALUES if name in held), None)
    if name is None or held[name].ndim != 2 or held[name].dtype.kind != "f":
        raise InputError(
            f"{path} needs an array x (or delta) [rows, d_in] of floats; it holds "
            f"{', '.join(f'{key} {list(array.shape)}' for key, array in held.items())}."
        )
    if not np.isfinite(held[name]).all():
        raise InputError(f"{path}: {name} holds NaN or infinity.")
    held["x"] = held[name]
    return held


def _rows(held: dict[str, np.ndarray], known: dict[str, dict[str, Any]], shard: int) -> RowTable:
    """Return the row table of a shard; examples are numbered as they first appear."""
    n = len(held["x"])
    ids = held.get("example_id", np.array([f"{shard}-{i}" for i in range(n)]))
    labels = held.get("label", np.full(n, -1))
    numbers = list(_numbered(ids, labels, known))
    role = {name: number for number, name in enumerate(ROLES)}
    roles = [role.get(str(name), role["user"]) for name in held.get("role", np.full(n, "user"))]
    columns = {
        "example": np.array(numbers),
        "token_pos": held.get("token_pos", np.full(n, -1)),
        "token_id": held.get("token_id", np.full(n, -1)),
        "char_start": np.zeros(n),
        "char_end": np.zeros(n),
        "role": np.array(roles),
        "modality": np.zeros(n),
    }
    return {name: columns[name].astype(kind) for name, kind in ROW_COLUMNS.items()}


def _numbered(
    ids: np.ndarray, labels: np.ndarray, known: dict[str, dict[str, Any]]
) -> Iterator[int]:
    for name, label in zip(ids.tolist(), labels.tolist(), strict=True):
        record = known.setdefault(
            str(name),
            {
                "index": len(known),
                "example_id": str(name),
                "prompt": "",
                "response": None,
                "messages": None,
                "image": None,
                "label": None if label is None or label < 0 else bool(label),
                "group": None,
                "source": "npz",
                "raw": True,
                "text": "",
                "status": "ok",
            },
        )
        yield int(record["index"])
