"""store: look at the stores of a folder, verify them, mend them, and export or import them."""

import logging
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

from saefty import fsio
from saefty.config import build_config
from saefty.errors import (
    ConfigError,
    InputError,
    IntegrityError,
    MismatchError,
    UnknownNameError,
)
from saefty.registry import nearest
from saefty.runs import FINISHED, JOURNAL, METADATA, Run, check_files, read_metadata
from saefty.stages import encode, extract
from saefty.stages.base import Outcome
from saefty.stores.activations import ActivationStore
from saefty.stores.base import MANIFEST, RECORDS, StoreReader, read_manifest
from saefty.stores.dump import write_dumps
from saefty.stores.features import FeatureStore, Key, layer_of
from saefty.stores.jsonl import write_sentence_jsonl
from saefty.stores.neuronpedia import CONTEXT, TEXTS, write_neuronpedia
from saefty.stores.npz import export_npz, import_npz
from saefty.stores.parquet import write_parquet
from saefty.token_text import token_bytes

log = logging.getLogger(__name__)

EXPORTS = {
    "npz": "activations",
    "parquet": "features",
    "jsonl": "features",
    "dump": "features",
    "neuronpedia": "features",
}
"""Formats of `store export`, and the kind of store that each holds."""


def open_store(folder: Path) -> StoreReader:
    """Open a store of either kind.

    Raises:
        UnknownNameError: If there is no such folder.
        IntegrityError: If the folder holds no complete store.
    """
    if not folder.is_dir():
        raise UnknownNameError(
            f"there is no folder {folder}.", then="saefty store list FOLDER shows the stores below."
        )
    path = folder / MANIFEST
    kind = read_manifest(folder).get("kind") if path.exists() else "activations"
    return FeatureStore(folder) if kind == "features" else ActivationStore(folder)


def list_stores(root: Path, *, verify: bool = False) -> list[dict[str, Any]]:
    """Describe every complete store below a folder.

    Args:
        root: A folder of runs, or one run.
        verify: Also read every file and say whether it is whole.

    Raises:
        UnknownNameError: If there is no such folder.
    """
    if not root.is_dir():
        raise UnknownNameError(f"there is no folder {root}.", then="Name a folder of runs.")
    return [_describe(path.parent, verify) for path in sorted(root.glob(f"**/{MANIFEST}"))]


def verify_store(folder: Path) -> list[str]:
    """Return what is damaged in a store, a line a file; empty if it is whole.

    The run's own records are verified too. A complete run without a store, such as a training, is
    verified by the checksums that it wrote last.

    Raises:
        UnknownNameError: If there is no such folder.
        IntegrityError: If the folder holds no complete store, or a file that no repair can make
            again is damaged.
    """
    if (folder / METADATA).exists():
        read_metadata(folder)
    if not (folder / MANIFEST).exists() and (folder / FINISHED).exists() and check_files(folder):
        return []
    sealed = [*(folder / RECORDS).glob("piece_*.json"), *folder.glob(FINISHED)]
    return [*open_store(folder).verify(), *(line for path in sealed if (line := _unsealed(path)))]


def _unsealed(path: Path) -> str | None:
    try:
        fsio.read_sealed(path)
    except IntegrityError as error:
        return error.message
    return None


def repair_store(folder: Path) -> Outcome:
    """Make the damaged pieces of a store again, by the run's own configuration, and no others.

    Relative paths of the configuration mean what they meant when the run was started.

    Raises:
        ConfigError: If the folder holds no run that can be repeated.
        UnknownNameError: If there is no such folder.
    """
    if not (folder / METADATA).exists():
        if not folder.is_dir():
            raise UnknownNameError(f"there is no folder {folder}.")
        raise ConfigError(
            f"{folder} cannot be repaired: it has no {METADATA} that says how it was made.",
            then="Make the store again, or restore it from a copy.",
        )
    place = folder.absolute()
    with chdir(_started_in(folder)):
        return replace(_made_again(place, folder), folder=folder)


def _made_again(place: Path, folder: Path) -> Outcome:
    facts = read_metadata(place)
    tree = facts["config"]
    tree["run"] = {**tree["run"], "dir": str(place)}
    if facts["stage"] == "extract":
        return extract.run(build_config(extract.ExtractConfig, tree))
    if facts["stage"] == "encode":
        return encode.run(build_config(encode.EncodeConfig, tree))
    if facts["stage"] == "import":
        return import_store(Path(tree["import"]["source"]), place, tree["import"]["hook_point"])
    if facts["stage"] == "annotate":
        raise ConfigError(
            f"{folder} is a run of annotate, which is repaired by its own command.",
            then="Run the same saefty annotate command again; it makes only the damaged pieces "
            "again.",
        )
    raise ConfigError(
        f"{folder} is a run of {facts['stage']}, which has no store to repair.",
        then="Name the folder of a run of extract, encode or store import.",
    )


def _started_in(folder: Path) -> Path:
    """Return the folder in which a run was started; the present one if that is not known."""
    try:
        started = Path(str(fsio.read_lines(folder / JOURNAL)[0]["folder"]))
    except (IntegrityError, OSError, LookupError, TypeError):
        return Path()
    return started if started.is_dir() else Path()


def export_store(
    folder: Path,
    out: Path,
    form: str | None = None,
    layers: Sequence[str] = (),
    *,
    texts: int = TEXTS,
    context: int = CONTEXT,
) -> list[Path]:
    """Write a store in a form that other tools read; return the paths of the files.

    Args:
        folder: The store.
        out: The new folder.
        form: One of `EXPORTS`; None takes npz for activations and parquet for features.
        layers: Which layers, or keys of further SAEs; empty takes all. Activations go as a whole.
        texts: For `neuronpedia` alone, most texts a latent.
        context: For `neuronpedia` alone, tokens on either side of the strongest one.

    Raises:
        ConfigError: If there is no such format, it has no texts or context to limit, or the new
            folder is not empty.
        MismatchError: If the format does not fit the store, or layers of activations are named.
        IntegrityError: If the folder holds no complete store.
        DiskError: If the disk is too small, or a file cannot be written.
    """
    if form is not None and form not in EXPORTS:
        raise ConfigError(
            f"--format is {', '.join(EXPORTS)}, not {form!r}.{nearest(form, list(EXPORTS))}"
        )
    store = open_store(folder)
    kind = str(store.manifest["kind"])
    form = form or next(name for name, fits in EXPORTS.items() if fits == kind)
    if EXPORTS[form] != kind:
        fitting = [name for name, fits in EXPORTS.items() if fits == kind]
        raise MismatchError(
            f"{folder} is a store of {kind}; {form} holds {EXPORTS[form]} only.",
            then=f"Set --format to {' or '.join(fitting)}.",
        )
    if isinstance(store, ActivationStore) and layers:
        raise MismatchError(
            f"{folder} is a store of activations, which is exported as a whole, but --layer "
            f"{', '.join(layers)} is given.",
            safe="Nothing was written.",
            then="Leave --layer out; the files are named by layer.",
        )
    unused = {"--texts": texts != TEXTS, "--context": context != CONTEXT}
    if form != "neuronpedia" and any(unused.values()):
        raise ConfigError(
            f"--format neuronpedia alone has {' and '.join(n for n in unused if unused[n])}, but "
            f"the format is {form}.",
            safe="Nothing was written.",
            then="Leave it out, or set --format neuronpedia.",
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out} exists and is not empty.",
            safe="Nothing in it was touched.",
            then="Set --out to a new folder.",
        )
    if isinstance(store, ActivationStore):
        return export_npz(store, out)
    assert isinstance(store, FeatureStore)
    named: list[Key] = [int(x) if x.isdecimal() and x.isascii() else x for x in layers]
    keys = named or list(store.codes)
    for key in keys:
        store.d_sae(key)  # one that is not there is refused before anything is written
    if form == "parquet":
        return write_parquet(store, keys, out)
    if form == "dump":
        of_each = {key: out / f"sae_feats_{_plain(key)}" if len(keys) > 1 else out for key in keys}
        return write_dumps(store, of_each)
    parts = _token_bytes(store)
    if form == "jsonl":
        return [p for key in keys for p in write_sentence_jsonl(store, key, out, parts=parts)]
    return [
        write_neuronpedia(store, key, out, texts=texts, context=context, parts=parts)
        for key in keys
    ]


def _plain(key: Key) -> str:
    _, mark, name = str(key).partition("__")
    return f"layer{layer_of(key)}{mark}{name}"


def _token_bytes(store: FeatureStore) -> dict[int, bytes]:
    """Return the bytes of the model's tokens, where its tokenizer is on this machine."""
    import transformers

    name = str(store.manifest["model_name"])
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, local_files_only=True, trust_remote_code=False
        )
        return token_bytes(tokenizer, range(len(tokenizer)))
    except Exception as error:  # noqa: BLE001 - without it tokens are spelled from their offsets
        log.debug("no tokenizer of %s: %s", name, error)
        return {}


def import_store(source: Path, folder: Path, hook_point: str | None = None) -> Outcome:
    """Make a store of `.npz` files.

    Raises:
        InputError: If there are no such files.
    """
    files = sorted(source.glob("*.npz"))
    if not files:
        raise InputError(
            f"{source} holds no .npz files."
            if source.is_dir()
            else f"there is no folder {source}.",
            then="Name a folder of layer_<i>_shard_<n>.npz files.",
        )
    config = {
        "run": {"dir": str(folder)},
        "import": {"source": str(source), "hook_point": hook_point},
    }
    inputs = {"files": {path.name: fsio.digest(path) for path in files}}
    with Run(folder, "import", config, inputs) as current:
        import_npz(source, folder, hook_point)
        store = ActivationStore(folder)
        current.ledger.ok = store.n_rows
        figures = {"layers": list(store.layers), "rows": store.n_rows, "d_in": store.d_in}
        current.finish(figures)
    return Outcome("import", folder, figures)


def _describe(folder: Path, verify: bool) -> dict[str, Any]:
    try:
        store = open_store(folder)
        whole = not store.verify() if verify else None
    except IntegrityError as error:
        return {"store": str(folder), "problem": str(error)}
    return {
        "store": str(folder),
        "kind": store.manifest["kind"],
        "layers": store.manifest.get("codes", store.manifest["layers"]),
        "shards": len(store.pieces),
        "rows": sum(int(piece["rows"]) for piece in store.pieces),
        "bytes": store.n_bytes(),
        "whole": whole,
        **({"contrast": said} if (said := store.manifest.get("contrast")) else {}),
    }
