"""What every command does alike: options, messages, exit codes, and the line that resumes a run."""

import importlib
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saefty import interrupts
from saefty.environment import load_environment, redacted
from saefty.errors import ExternalError, ResourceError, SaeftyError
from saefty.interrupts import Terminated, handled

if TYPE_CHECKING:
    from saefty.stages.base import Outcome

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings; they win over the file."),
]
ConfigFile = Annotated[Path | None, typer.Option("-c", "--config", help="YAML file to start from.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show warnings and errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show everything, and tracebacks.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
SaeId = Annotated[str | None, typer.Option("--sae-id", help="The SAE inside it.")]
TextFiles = Annotated[
    list[Path] | None, typer.Option("--data", help="A file of texts; may be given several times.")
]
TextColumn = Annotated[
    str | None, typer.Option("--text", help="The column of text, read without a template.")
]
PromptColumn = Annotated[
    str | None, typer.Option("--prompt", help="The column of prompts, read in the template.")
]
ExpectedL0 = Annotated[float | None, typer.Option("--expected-l0", help="L0 that it should have.")]
ExpectedFvu = Annotated[
    float | None, typer.Option("--expected-fvu", help="FVU that it should have.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="Number format of the model.")]
Device = Annotated[str, typer.Option("--device", help="Where the model runs.")]

INTERRUPTED, TERMINATED = 130, 143
STAGES = ("extract", "train", "encode", "analyze", "eval", "probe", "steer", "tokens")
RUN_KEYS = ("run.dir=", "run.root=", "run.id=", "output_dir=")


def guarded(job: Callable[[], None], quiet: bool, debug: bool, as_json: bool) -> None:
    """Do a job; turn what can go wrong into a message and an exit code.

    Args:
        job: What the command does; it prints its own result.
        quiet: Show warnings and errors only.
        debug: Show everything, and tracebacks.
        as_json: Write an error as one JSON object.

    Raises:
        SaeftyError: What the job raised, with `debug`.
        Exit: With the exit code of what went wrong.
    """
    from saefty.log import set_up

    set_up(quiet=quiet, debug=debug)
    load_environment()
    interrupts.resumable = None
    try:
        with handled():
            job()
    except SaeftyError as error:
        if debug:
            raise
        folder = interrupts.resumable
        if as_json:
            record = {**error.as_record(), "run": folder and str(folder)}
            typer.echo(redacted(json.dumps(record)), err=True)
        else:
            typer.echo(redacted(f"Error: {error}"), err=True)
            # What lies outside is mended there; other errors want another command.
            if folder and isinstance(error, ResourceError | ExternalError):
                typer.echo(_resume_line(folder), err=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt as error:
        folder = interrupts.resumable
        typer.echo("\nInterrupted. What was committed is safe.", err=True)
        if folder:
            typer.echo(_resume_line(folder), err=True)
        else:
            typer.echo("No run had begun: the same command starts it.", err=True)
        code = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
        raise typer.Exit(code) from None


def _resume_line(folder: Path) -> str:
    """Return the command that goes on: the same words, and the run's folder."""
    words = sys.argv[1:]
    if not words:  # called from a program that is not the command line
        return f"To resume: the same command with run.dir={folder}"
    if words[0] in STAGES:
        words = [word for word in words if not word.startswith(RUN_KEYS)]
        words.append(f"run.dir={folder}")
    return f"To resume: saefty {shlex.join(words)}"


def print_outcome(outcome: "Outcome", as_json: bool, text: str | None = None) -> None:
    """Print what a stage did: its folder (or a text), or one JSON object."""
    typer.echo(json.dumps(outcome.as_record()) if as_json else text or str(outcome.folder))


def run_stage(
    module: str,
    config_class: str,
    words: Sequence[str] | None,
    path: Path | None,
    quiet: bool,
    debug: bool,
    as_json: bool,
) -> None:
    """Run the stage of a module of this package, with settings of the command line."""

    def job() -> None:
        from saefty.config import load_config

        stage = importlib.import_module(f"saefty.{module}")
        cfg = load_config(getattr(stage, config_class), path, words or ())
        print_outcome(stage.run(cfg), as_json)

    guarded(job, quiet, debug, as_json)
