"""`saefty probe`: detectors of harm on SAE features and on what they are to be compared with."""

import json
from pathlib import Path
from typing import Annotated

import typer

from saefty.command import ConfigFile, Debug, Json, Quiet, Words, guarded


def probe(
    words: Words = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", help="Write a detector into this folder (probe.save)."),
    ] = None,
    config: ConfigFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Compare detectors of harm: SAE features, dense activations, words, a random SAE.

    Example: saefty probe probe.features=latest --save guard/
    """

    def job() -> None:
        from saefty.config import load_config
        from saefty.stages.probe import ProbeConfig, run

        flags = {} if save is None else {"probe.save": save}
        outcome = run(load_config(ProbeConfig, config, words or (), flags))
        text = f"{outcome.figures['sentence']}\n{outcome.folder}"
        typer.echo(json.dumps(outcome.as_record()) if as_json else text)

    guarded(job, quiet, debug, as_json)
