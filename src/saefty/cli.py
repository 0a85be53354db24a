"""The command line: words and files become objects, errors become messages.

Results go to standard output, everything else to standard error. Heavy libraries are imported
inside the commands, so that `--help` answers at once.
"""

import json
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from saefty.analyze_command import analyze
from saefty.annotate_command import annotate
from saefty.command import ConfigFile, Debug, Json, Quiet, Words, guarded, print_outcome, run_stage
from saefty.data_command import datasets
from saefty.doctor_command import doctor
from saefty.environment import redacted
from saefty.guard_command import guards
from saefty.probe_command import probe
from saefty.sae_commands import saes
from saefty.steer_command import steering
from saefty.store_commands import stores
from saefty.tokens_command import compare_layers, compare_tokens, show_tokens, tokens

app = typer.Typer(
    name="saefty",
    help="Sparse autoencoders for the safety of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(stores, name="store")
app.add_typer(saes, name="sae")
app.add_typer(datasets, name="data")
app.add_typer(steering, name="steer")
app.add_typer(guards, name="guard")
app.command("analyze")(analyze)
app.command("annotate")(annotate)
app.command("doctor")(doctor)
app.command("probe")(probe)
app.command("tokens")(tokens)
app.command("compare-tokens")(compare_tokens)
app.command("compare-layers")(compare_layers)
app.command("show-tokens")(show_tokens)


@app.command()
def extract(
    words: Words = None,
    config: ConfigFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Run a model over a dataset and keep its activations.

    Example: saefty extract model.name=FOLDER data.path=prompts.jsonl extract.layers="[0,2]"
    """
    run_stage("stages.extract", "ExtractConfig", words, config, quiet, debug, as_json)


@app.command()
def train(
    words: Words = None,
    config: ConfigFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Train sparse autoencoders on extracted activations.

    Example: saefty train train.store=latest sae.k=64 train.max_steps=5000
    """
    run_stage("stages.train", "TrainConfig", words, config, quiet, debug, as_json)


@app.command()
def encode(
    words: Words = None,
    config: ConfigFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Encode every token of a dataset into sparse features.

    Example: saefty encode encode.sae=latest model.name=FOLDER data.path=prompts.jsonl
    """
    run_stage("stages.encode", "EncodeConfig", words, config, quiet, debug, as_json)


@app.command("eval")
def evaluate(
    words: Words = None,
    config: ConfigFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Rank latents by how they track harm, gate them, and write a report.

    Example: saefty eval eval.features=latest eval.topk_latents=50 intervention.enabled=true
    """
    run_stage("stages.eval", "EvalConfig", words, config, quiet, debug, as_json)


@app.command()
def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write; artifacts/demo, or artifacts/demo-vision, if left out."),
    ] = None,
    vision: Annotated[
        bool, typer.Option("--vision", help="Pictures with questions, and what attention adds.")
    ] = False,
    short: Annotated[bool, typer.Option("--short", help="A smaller run, under a minute.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of prompts, training and splits.")] = 0,
    model: Annotated[
        Path | None, typer.Option(help="A sandbox model folder; the shipped one if left out.")
    ] = None,
    retrain: Annotated[
        Path | None, typer.Option(help="Train the sandbox model anew into this folder first.")
    ] = None,
    world: Annotated[int, typer.Option(help="Seed of the sandbox world.")] = 0,
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Do the whole main job on a small world whose ground truth is known.

    Example: saefty demo --vision --out artifacts/demo-vision
    """

    def job() -> None:
        sandbox = import_module(f"saefty.sandbox.{'vision_demo' if vision else 'demo'}")
        outcome = sandbox.run(
            out or Path("artifacts/demo-vision" if vision else "artifacts/demo"),
            short=short,
            seed=seed,
            model_folder=model,
            retrain=retrain,
            world_seed=world,
        )
        print_outcome(outcome, as_json, sandbox.table(outcome))

    guarded(job, quiet, debug, as_json)


@app.command("list")
def list_kinds(
    kind: Annotated[
        str,
        typer.Argument(
            help="saes, formats, datasets, metrics, plots, models, judges, interventions."
        ),
    ],
    as_json: Json = False,
) -> None:
    """List what there is of one kind.

    Example: saefty list saes
    """

    def job() -> None:
        from saefty.catalogue import names_of

        names = names_of(kind)
        typer.echo(json.dumps(names) if as_json else "\n".join(names))

    guarded(job, False, False, as_json)


def main() -> None:
    """Run the command line; a traceback, with `--debug` or of a bug, shows no token."""
    try:
        app()
    except Exception as error:  # noqa: BLE001 - shown as it is, but for tokens
        sys.stderr.write(redacted(traceback.format_exc()))
        sys.exit(getattr(error, "exit_code", 1))
