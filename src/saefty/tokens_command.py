"""`saefty tokens` and the views of its runs: compare-tokens, compare-layers, show-tokens."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from saefty.command import ConfigFile, Debug, Json, Quiet, Words, guarded, run_stage

RunFolder = Annotated[
    str, typer.Argument(help="A run of tokens or encode: its folder, or latest (below outputs).")
]
Sentence = Annotated[int, typer.Option("--sentence", "-s", help="Which sentence, from 0.")]
Tokens = Annotated[
    str, typer.Option("--tokens", "-t", help="Token positions, such as 1,4,7-9; a BOS is 0.")
]
TopN = Annotated[int, typer.Option("--top-n", min=1, help="Bars a token.")]
Dpi = Annotated[int, typer.Option("--dpi", min=30, max=600, help="Dots an inch of a PNG.")]
OutFile = Annotated[
    Path | None,
    typer.Option("--out", help="The picture (.png or .svg); into the run's pictures if left out."),
]


def tokens(
    words: Words = None,
    config: ConfigFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Look at sentences: which latents fire on each token, as a store and as pictures.

    Example: saefty tokens -c config.yaml output.jsonl=true
    """
    run_stage("sentences", "TokensConfig", words, config, quiet, debug, as_json)


def compare_tokens(
    run: RunFolder,
    layer: Annotated[str, typer.Option("--layer", "-l", help="Which layer.")],
    sentence: Sentence,
    chosen: Tokens,
    top_n: TopN = 10,
    dpi: Dpi = 150,
    out: OutFile = None,
    as_json: Json = False,
) -> None:
    """Draw chosen tokens of one layer side by side.

    Example: saefty compare-tokens latest --layer 6 --sentence 0 --tokens 1,4,7
    """

    def job() -> None:
        from saefty.sentence_views import open_run, positions_of
        from saefty.stores.jsonl import layer_folder

        views, positions = open_run(run), positions_of(chosen)
        key = views.layer(layer)
        data = views.compare_tokens(key, sentence, positions, top_n)
        name = f"compare_tokens_{layer_folder(key)}_sentence_{sentence:04d}_{_named(positions)}"
        _save(data, out or views.folder / "pictures" / f"{name}.png", dpi, as_json)

    guarded(job, False, False, as_json)


def compare_layers(
    run: RunFolder,
    sentence: Sentence,
    chosen: Tokens,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Which layers, such as 0,6; all if left out.")
    ] = None,
    top_n: TopN = 10,
    dpi: Dpi = 150,
    out: OutFile = None,
    as_json: Json = False,
) -> None:
    """Draw chosen tokens in several layers: a row a layer, a column a token.

    Example: saefty compare-layers latest --sentence 0 --tokens 1,4 --layers 0,6,12
    """

    def job() -> None:
        from saefty.sentence_views import open_run, positions_of

        views, positions = open_run(run), positions_of(chosen)
        keys = [views.layer(word.strip()) for word in layers.split(",")] if layers else None
        data = views.compare_layers(sentence, positions, keys, top_n)
        name = f"compare_layers_sentence_{sentence:04d}_{_named(positions)}"
        _save(data, out or views.folder / "pictures" / f"{name}.png", dpi, as_json)

    guarded(job, False, False, as_json)


def show_tokens(
    run: Annotated[
        str | None, typer.Argument(help="A run, whose sentences are shown; or use --model.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="A model's folder or hub id, with --text.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="A text to tokenise.")] = None,
    sentence: Annotated[
        int | None, typer.Option("--sentence", "-s", help="One sentence of the run, from 0.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how text falls into tokens: position, id, text, role, characters.

    Example: saefty show-tokens latest --sentence 0
    """

    def job() -> None:
        from saefty.token_tables import of_run, of_texts, table

        tables = of_run(run, sentence) if run else of_texts(model, text or [])
        typer.echo(json.dumps(tables, ensure_ascii=False) if as_json else table(tables))

    guarded(job, False, False, as_json)


def _named(positions: list[int]) -> str:
    shown = "-".join(map(str, positions[:12]))
    return f"tokens_{shown}" + ("-more" if len(positions) > 12 else "")


def _save(data: Any, path: Path, dpi: int, as_json: bool) -> None:
    from saefty.errors import ConfigError
    from saefty.plots.base import save_plot

    if path.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"--out: {path} is neither a .png nor an .svg file.")
    save_plot("token_bars", data, path, size=data.size, dpi=dpi)
    typer.echo(json.dumps({"picture": str(path)}) if as_json else str(path))
