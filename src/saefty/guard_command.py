"""`saefty guard`: score texts with a saved detector, and look at one."""

import json
from pathlib import Path
from typing import Annotated

import typer

from saefty.command import Debug, Device, Json, PromptColumn, Quiet, TextColumn, guarded

guards = typer.Typer(help="Score texts with a saved detector of harm.", no_args_is_help=True)

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Further settings of data., such as data.limit."),
]


@guards.command("score")
def score(
    file: Annotated[
        str, typer.Argument(help="JSONL, JSON, CSV, Parquet or plain lines; - reads lines.")
    ],
    words: Words = None,
    guard: Annotated[Path, typer.Option("--guard", help="The guard's folder.")] = Path("guard"),
    text: TextColumn = None,
    prompt: PromptColumn = None,
    response: Annotated[
        str | None, typer.Option("--response", help="The column of answers behind the prompts.")
    ] = None,
    messages: Annotated[
        str | None, typer.Option("--messages", help="The column of whole conversations.")
    ] = None,
    label: Annotated[
        str | None, typer.Option("--label", help="The column of labels, to measure the guard.")
    ] = None,
    harmful: Annotated[
        str | None,
        typer.Option("--harmful", help="Labels that mean harmful: unsafe or hate,violence."),
    ] = None,
    group: Annotated[
        str | None, typer.Option("--group", help="The column of what belongs together.")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option("--id", help="The column of ids.", show_default="row numbers")
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(
            "--threshold",
            help="A probability, or fpr_1pct, from which on a text is flagged.",
            show_default="the guard's own",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write a line of JSON for each text there.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Where the model lies here.", show_default="as the guard's record says"
        ),
    ] = None,
    device: Device = "auto",
    truncate: Annotated[
        str | None,
        typer.Option(
            "--truncate",
            help="Texts longer than the model's context: never, left, right.",
            show_default="as in training",
        ),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Give each text of a file a probability of harm; measure the guard where there are labels.

    Example: saefty guard score prompts.jsonl --guard guard --prompt question --out scores.jsonl
    """

    def job() -> None:
        from saefty.guards.job import ScoreRequest, score_file

        columns = {
            "text": text,
            "prompt": prompt,
            "response": response,
            "messages": messages,
            "label": label,
            "group": group,
            "id": id_column,
            "harmful": harmful,
        }
        request = ScoreRequest(
            guard=guard,
            file=file,
            columns={role: name for role, name in columns.items() if name is not None},
            words=tuple(words or ()),
            threshold=threshold,
            out=out,
            model=model,
            device=device,
            truncate=truncate,
        )
        found = score_file(request)
        typer.echo(json.dumps(found.record(), ensure_ascii=False) if as_json else found.text())

    guarded(job, quiet, debug, as_json)


@guards.command("info")
def info(
    guard: Annotated[Path, typer.Argument(help="The guard's folder.")],
    as_json: Json = False,
) -> None:
    """Say what a guard reads, where it decides and on what it was measured.

    Example: saefty guard info guard
    """

    def job() -> None:
        from saefty.guards.files import read_guard
        from saefty.guards.report import describe, described

        files = read_guard(guard)
        found = describe(files)
        typer.echo(json.dumps(found, ensure_ascii=False) if as_json else described(files))

    guarded(job, False, False, as_json)
