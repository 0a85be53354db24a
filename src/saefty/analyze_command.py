"""`saefty analyze`: statistics and pictures of SAE codes, of a store or a dump of dense chunks."""

import json
from pathlib import Path
from typing import Annotated

import typer

from saefty.command import Debug, Json, Quiet, Words, guarded


def analyze(
    words: Words = None,
    dump_dir: Annotated[
        Path | None,
        typer.Option("--dump_dir", "--dump-dir", help="Folder of dense codes (analyze.dump)."),
    ] = None,
    sample_tokens: Annotated[
        int | None,
        typer.Option(
            "--sample_tokens",
            "--sample-tokens",
            help="Tokens to look at closely (analyze.sample_tokens).",
            show_default="20000",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("-c", "--config", help="YAML file to start from.")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Measure how often and how strongly the latents of an SAE fire, and draw it.

    Example: saefty analyze --dump_dir ./sae_feats_layer20 --sample_tokens 20000
    """

    def job() -> None:
        from saefty.analysis_report import printed
        from saefty.config import load_config
        from saefty.stages.analyze import AnalyzeConfig, run

        flags = {"analyze.dump": dump_dir, "analyze.sample_tokens": sample_tokens}
        ours = [f"{key}={value}" for key, value in flags.items() if value is not None]
        outcome = run(load_config(AnalyzeConfig, config, [*ours, *(words or ())]))
        text = f"{printed(dict(outcome.figures))}\n{outcome.folder}"
        typer.echo(json.dumps(outcome.as_record()) if as_json else text)

    guarded(job, quiet, debug, as_json)
