"""`saefty data show`: what a dataset or a mixture is made of, in tables and pictures."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saefty.command import Debug, Json, Quiet, guarded

if TYPE_CHECKING:
    from saefty.data.overview import Overview

datasets = typer.Typer(help="Look at datasets.", no_args_is_help=True)

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings of data.; they win over the file."),
]
OVERVIEW = "overview.json"


@datasets.callback()
def _group() -> None:
    """Keep `show` a command of its own, which typer would fold into the group."""


@datasets.command("show")
def show(
    words: Words = None,
    config: Annotated[
        Path | None, typer.Option("-c", "--config", help="YAML file with a section data.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the pictures and overview.json.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the tokenizer that counts tokens.",
            show_default="the mixture's; else characters are counted",
        ),
    ] = None,
    unit: Annotated[
        str | None, typer.Option(help="Count tokens, words or characters as length.")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Show a dataset: sources, categories, shares, lengths, images; pictures with --out.

    Example: saefty data show data.name=galtea data.path=galtea.csv --out pictures
    """

    def job() -> None:
        from saefty import fsio
        from saefty.config import load_config
        from saefty.data.base import load_examples
        from saefty.data.image_overview import ImageOverview
        from saefty.data.lengths import UNITS, lengths
        from saefty.data.overview import DataConfig, Overview
        from saefty.errors import ConfigError

        section = load_config(DataConfig, config, words or ()).data
        counter = tokenizer or (section.mixture.tokenizer if section.mixture else None)
        counted = unit or ("tokens" if counter else "characters")
        if counted not in UNITS:
            raise ConfigError(f"--unit is one of {', '.join(UNITS)}, not {counted!r}.")
        examples = load_examples(section)
        found = Overview.of(examples, lengths(examples, counted, counter), counted)
        files = [Path(path).name for path in (section.path, *(section.files or ())) if path]
        name = " ".join([section.name, *files])
        images = ImageOverview.of(examples)
        record = {"dataset": name, **found.as_record()}
        if images is not None:
            record["images"] = images.as_record()
        if out is not None:
            pictures = _draw(found, name, out)
            fsio.commit_json(out / OVERVIEW, record)
            record["files"] = [str(path) for path in (*pictures, out / OVERVIEW)]
        if as_json:
            typer.echo(json.dumps(record, ensure_ascii=False))
            return
        typer.echo(f"{name}: {found.text()}")
        if images is not None:
            typer.echo(f"\n{images.text()}")
        for path in record.get("files", ()):
            typer.echo(path)

    guarded(job, quiet, debug, as_json)


def _draw(found: "Overview", name: str, out: Path) -> list[Path]:
    """Write the pictures into a folder and return their paths."""
    from saefty.plots.base import SIZE, save_plot
    from saefty.plots.composition import Composition
    from saefty.plots.data_matrix import DataMatrix
    from saefty.plots.length_histogram import Lengths

    counts = found.counts.astype(float)
    matrix = DataMatrix(
        name,
        found.sources,
        found.categories,
        counts,
        "examples",
    )
    means = DataMatrix(
        name,
        found.sources,
        found.categories,
        found.mean_length,
        f"mean length in {found.unit}",
        form="decimal",
        scale="linear",
    )
    shares = Composition(
        f"{name}: shares by example and by length",
        found.by_example,
        found.by_length,
        found.unit,
    )
    lengths = Lengths(f"{name}: length of the examples", found.lengths, found.unit)
    return [
        save_plot("data_matrix", matrix, out / "source_category.png", size=matrix.size),
        save_plot("length_histogram", lengths, out / "lengths.png", size=SIZE),
        save_plot("data_matrix", means, out / "mean_length.png", size=means.size),
        save_plot("composition", shares, out / "composition.png", size=shares.size),
    ]
