"""`saefty steer`: replies under a vector beside plain ones, and sweeps over strengths."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from saefty.command import (
    ConfigFile,
    Debug,
    Device,
    Dtype,
    Json,
    Quiet,
    SaeId,
    Words,
    guarded,
    run_stage,
)
from saefty.steer_vector_command import effects, told_by_flags
from saefty.steer_vector_command import vector as make_vector

steering = typer.Typer(
    help="Steer a model with a vector, and measure what that does.", no_args_is_help=True
)
steering.command("effects")(effects)
steering.command("vector")(make_vector)


@steering.command("generate")
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to reply to.")] = None,
    alpha: Annotated[
        list[float] | None,
        typer.Option("--alpha", help="How strongly, in --unit; may be given several times."),
    ] = None,
    vector: Annotated[
        Path | None, typer.Option("--vector", help="A vector that was saved.")
    ] = None,
    latent: Annotated[
        int | None, typer.Option("--latent", help="With --sae: the latent whose row is the vector.")
    ] = None,
    sae: Annotated[
        str | None, typer.Option("--sae", help="A folder, a release, or a repository.")
    ] = None,
    sae_id: SaeId = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The model; the vector's own if left out.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="A file of prompts instead of words.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write all replies here: FILE.jsonl, a line a prompt."),
    ] = None,
    method: Annotated[
        int, typer.Option("--method", min=1, max=2, help="1 adds; 2 adds and keeps the norm.")
    ] = 1,
    where: Annotated[
        str,
        typer.Option(
            "--where", help="both, prefill, decode, response, last, or places such as 3,4."
        ),
    ] = "both",
    unit: Annotated[
        str, typer.Option("--unit", help="What alpha counts: activation, residual, latent.")
    ] = "activation",
    latent_max: Annotated[
        float | None,
        typer.Option(
            "--latent-max", help="The latent's largest value, for --sae and --unit latent."
        ),
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Bring the vector to length 1 first.")
    ] = False,
    layer: Annotated[int | None, typer.Option("--layer", help="The block to steer in.")] = None,
    hook_point: Annotated[
        str | None, typer.Option("--hook-point", help="What to change in it.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest reply.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="0 takes the likeliest token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of sampling.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it stands, without a template.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Print what a model replies, plain and steered, side by side.

    Of more than ten prompts ten are shown, and a file holds all.

    Example: saefty steer generate --vector french --unit residual --alpha 0.5 "How do I bake?"
    """

    def job() -> None:
        from saefty.config import build_config
        from saefty.errors import ConfigError
        from saefty.stages.steer_generate import GenerateConfig, check_file, keep, replies, shown

        settings: dict[str, Any] = {
            "steer": {
                "vector": vector and str(vector),
                "sae": sae,
                "sae_id": sae_id,
                "latent": latent,
                "layer": layer,
                "hook_point": hook_point,
                "normalize": normalize,
                "unit": unit,
                "latent_max": latent_max,
                "where": _places(where),
                "method": method,
                "alphas": alpha or (),
                "max_new_tokens": max_new_tokens,
                "temperature": temperature,
                "seed": seed,
                "raw": raw,
            },
            "prompts": prompts or (),
            "data": data and {"path": str(data)},
            "model": model,
            "dtype": dtype,
            "device": device,
        }
        wrong = [one for one in alpha or () if not math.isfinite(one)]
        if wrong:
            raise ConfigError(
                f"--alpha is {wrong[0]}, and no vector can be added {wrong[0]} times.",
                then="Give a number: with --unit residual, 0.3 to 1 is usual.",
            )
        check_file(out)
        with told_by_flags(GenerateConfig, "steer"):
            found = replies(build_config(GenerateConfig, settings))
        kept = None if as_json and out is None else keep(found, out)
        typer.echo(json.dumps(found, ensure_ascii=False) if as_json else shown(found, kept=kept))

    guarded(job, quiet, debug, as_json)


@steering.command("sweep")
def sweep(
    words: Words = None,
    config: ConfigFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Steer at many strengths by both methods, judge the replies, and draw scores over alpha.

    Example: saefty steer sweep -c configs/steer.yaml steer.sae=runs/sae steer.latent=12332
    """
    run_stage("stages.steer_sweep", "SweepConfig", words, config, quiet, debug, as_json)


@steering.command("compare")
def compare(
    words: Words = None,
    config: ConfigFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Compare vectors: score, intervals, and what else each one changes.

    Example: saefty steer compare -c compare.yaml compare.vectors="{caa: DIR, sae_ts: DIR}"
    """
    run_stage("stages.steer_compare", "CompareConfig", words, config, quiet, debug, as_json)


def _places(where: str) -> str | list[int]:
    """Return the word, or the places that are listed with commas."""
    parts = [part.strip() for part in where.split(",")]
    return [int(part) for part in parts] if all(part.isdigit() for part in parts) else where
