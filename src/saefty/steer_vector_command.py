"""`saefty steer effects` and `saefty steer vector`: measure effects, and make vectors."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from saefty.command import (
    ConfigFile,
    Debug,
    Device,
    Dtype,
    Json,
    PromptColumn,
    Quiet,
    SaeId,
    TextColumn,
    Words,
    guarded,
    run_stage,
)


def effects(
    words: Words = None,
    config: ConfigFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Measure what many vectors do to an SAE's latents: the data that SAE-TS learns from.

    Example: saefty steer effects model.name=FOLDER effects.sae=latest data.path=prompts.jsonl
    """
    run_stage("stages.effects", "EffectsConfig", words, config, quiet, debug, as_json)


def vector(
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="decoder, caa, latent_difference, sae_ts, rotation, pseudo_inverse or random.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="A folder, or NAME.safetensors.")],
    sae: Annotated[
        str | None, typer.Option("--sae", help="The SAE; SAE-TS takes that of its effects.")
    ] = None,
    sae_id: SaeId = None,
    layer: Annotated[
        int | None,
        typer.Option("--layer", help="The block; of several SAEs the one that reads it."),
    ] = None,
    hook_point: Annotated[
        str, typer.Option("--hook-point", help="For caa: what to read in the block.")
    ] = "resid_post",
    latent: Annotated[
        list[str] | None,
        typer.Option("--latent", help="A latent to move, 12 or 12:0.5; may be given again."),
    ] = None,
    effects_run: Annotated[
        str | None, typer.Option("--effects", help="A run of steer effects, or latest.")
    ] = None,
    lam: Annotated[
        float, typer.Option("--lambda", help="SAE-TS: how much of the common effect to take out.")
    ] = 1.0,
    fit: Annotated[str, typer.Option("--fit", help="SAE-TS: ridge or descent.")] = "ridge",
    penalty: Annotated[
        float | None, typer.Option("--penalty", help="SAE-TS: of the ridge fit.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="The model to read.")] = None,
    positive: Annotated[
        Path | None, typer.Option("--positive", help="Texts that show the behaviour.")
    ] = None,
    negative: Annotated[Path | None, typer.Option("--negative", help="Texts that do not.")] = None,
    texts: Annotated[
        Path | None, typer.Option("--texts", help="Texts to measure lengths on, for alpha's units.")
    ] = None,
    text: TextColumn = None,
    prompt: PromptColumn = None,
    pooling: Annotated[
        str | None, typer.Option("--pooling", help="Tokens that count: last, response or mean.")
    ] = None,
    top: Annotated[
        int | None, typer.Option("--top", help="latent_difference: only so many latents.")
    ] = None,
    like: Annotated[
        Path | None, typer.Option("--like", help="random: a vector whose place and length to take.")
    ] = None,
    norm: Annotated[float | None, typer.Option("--norm", help="Bring it to this length.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    export: Annotated[
        Path | None, typer.Option("--export", help="Write the bare vector too: .npy, .safetensors.")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Make a vector to steer with, and save it with where it comes from.

    Example: saefty steer vector --method decoder --sae FOLDER --latent 12332 --out french
    """

    def job() -> None:
        from saefty.config import build_config
        from saefty.interventions.vectors import check_targets
        from saefty.stages.steer_vector import VectorConfig, run

        def data(path: Path | None) -> dict[str, Any] | None:
            return path and {"path": str(path), "text": text, "prompt": prompt}  # type: ignore[return-value]

        settings: dict[str, Any] = {
            "vector": {
                "method": method,
                "sae": sae,
                "sae_id": sae_id,
                "layer": layer,
                "hook_point": hook_point,
                "latents": latent or [],
                "effects": effects_run,
                "lam": lam,
                "fit": fit,
                "penalty": penalty,
                "pooling": pooling,
                "top": top,
                "like": like and str(like),
                "norm": norm,
                "seed": seed,
            },
            "model": model and {"name": model, "dtype": dtype, "device": device},
            "positive": data(positive),
            "negative": data(negative),
            "texts": data(texts),
        }
        check_targets(out, export)
        made = run(build_config(VectorConfig, settings))
        where = made.save(out)
        if export is not None:
            made.export(export)
        figures = {
            "method": made.method,
            "site": made.site.name,
            "d_model": made.d_model,
            "norm": made.norm,
            "norms": dict(made.norms),
            "held_out": made.provenance.get("held_out"),
        }
        record = {"stage": "steer vector", "run": str(where), "figures": figures}
        typer.echo(json.dumps(record) if as_json else str(where))

    guarded(job, quiet, debug, as_json)
