"""`saefty store`: look at stores, verify, repair, export and import them."""

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from saefty.command import Debug, Json, Quiet, guarded, print_outcome

stores = typer.Typer(
    help="Look at stores, verify, repair, export and import them.", no_args_is_help=True
)

Folder = Annotated[Path, typer.Argument(help="The run's folder.")]


@stores.command("list")
def store_list(
    root: Annotated[Path, typer.Argument(help="A folder of runs, or one run.")] = Path("artifacts"),
    verify: Annotated[bool, typer.Option("--verify", help="Also check every file.")] = False,
    as_json: Json = False,
) -> None:
    """List the stores below a folder: layers, shards, rows, sizes, and whether they are whole."""

    def job() -> None:
        from saefty.storekeeping import list_stores

        found = list_stores(root, verify=verify)
        typer.echo(json.dumps(found) if as_json else _store_lines(found, root))

    guarded(job, False, False, as_json)


@stores.command("verify")
def store_verify(folder: Folder, as_json: Json = False) -> None:
    """Check every file of a store against its checksum; exit code 4 if one is damaged."""

    def job() -> None:
        from saefty.errors import IntegrityError
        from saefty.storekeeping import verify_store

        damage = verify_store(folder)
        if damage:
            raise IntegrityError(
                "\n".join(damage),
                then=f"Run saefty store repair {shlex.quote(str(folder))}; it makes only the "
                "damaged pieces again.",
            )
        typer.echo(json.dumps({"store": str(folder), "whole": True}) if as_json else "whole")

    guarded(job, False, False, as_json)


@stores.command("repair")
def store_repair(
    folder: Folder, quiet: Quiet = False, debug: Debug = False, as_json: Json = False
) -> None:
    """Make the damaged pieces of a store again, and no others."""

    def job() -> None:
        from saefty.storekeeping import repair_store

        print_outcome(repair_store(folder), as_json)

    guarded(job, quiet, debug, as_json)


@stores.command("export")
def store_export(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", help="The new folder.")],
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="npz (activations); parquet, jsonl, dump or neuronpedia (features). "
            "Left out: npz or parquet.",
        ),
    ] = None,
    layer: Annotated[
        list[str] | None, typer.Option("--layer", help="Only this layer; may be repeated.")
    ] = None,
    texts: Annotated[
        int, typer.Option("--texts", min=1, help="neuronpedia: most texts a latent.")
    ] = 20,
    context: Annotated[
        int, typer.Option("--context", min=0, help="neuronpedia: tokens beside the strongest.")
    ] = 32,
    as_json: Json = False,
) -> None:
    """Write a store in a form that other tools read.

    Example: saefty store export runs/features --format jsonl --layer 12 --out sentences
    """

    def job() -> None:
        from saefty.storekeeping import export_store

        written = export_store(folder, out, form, layer or (), texts=texts, context=context)
        files = [str(path) for path in written]
        typer.echo(json.dumps({"files": files}) if as_json else str(out))

    guarded(job, False, False, as_json)


@stores.command("import")
def store_import(
    source: Annotated[Path, typer.Argument(help="A folder of layer_<i>_shard_<n>.npz files.")],
    out: Annotated[Path, typer.Option("--out", help="The new store's folder.")],
    hook_point: Annotated[str | None, typer.Option(help="Where they were read.")] = None,
    as_json: Json = False,
) -> None:
    """Make a store of activations from .npz files."""

    def job() -> None:
        from saefty.storekeeping import import_store

        print_outcome(import_store(source, out, hook_point), as_json)

    guarded(job, False, False, as_json)


def _store_lines(found: list[dict[str, Any]], root: Path) -> str:
    if not found:
        return f"no complete store below {root}"
    lines = []
    for store in found:
        if "problem" in store:
            lines.append(f"{store['store']}  {store['problem']}")
            continue
        state = {None: "not verified", True: "whole", False: "damaged"}[store["whole"]]
        lines.append(
            f"{store['store']}  {store['kind']}  layers {store['layers']}  "
            f"{store['shards']} shards  {store['rows']:,} rows  "
            f"{store['bytes'] / 1e6:,.1f} MB  {state}{_contrast(store)}"
        )
    return "\n".join(lines)


def _contrast(store: dict[str, Any]) -> str:
    """Say which contrast a store holds; nothing of a store of plain activations."""
    contrast = store.get("contrast")
    return f"  contrast {contrast['method']}, {contrast['scope']}" if contrast else ""
