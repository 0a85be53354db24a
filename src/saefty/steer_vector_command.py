"""`saefty steer effects` and `saefty steer vector`: measure effects, and make vectors."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from saefty.config import Config


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
        str | None,
        typer.Option("--hook-point", help="caa: what to read in the block; or else resid_post."),
    ] = None,
    latent: Annotated[
        list[str] | None,
        typer.Option("--latent", help="A latent to move, 12 or 12:0.5; may be given again."),
    ] = None,
    effects_run: Annotated[
        str | None, typer.Option("--effects", help="A run of steer effects, or latest.")
    ] = None,
    lam: Annotated[
        float | None,
        typer.Option(
            "--lambda", help="SAE-TS: how much of the common effect to take out; or else 1."
        ),
    ] = None,
    fit: Annotated[
        str | None, typer.Option("--fit", help="SAE-TS: ridge, or else descent.")
    ] = None,
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
        str | None,
        typer.Option("--pooling", help="Tokens that count: mean (if left out), response or last."),
    ] = None,
    top: Annotated[
        int | None, typer.Option("--top", help="latent_difference: only so many latents.")
    ] = None,
    like: Annotated[
        Path | None, typer.Option("--like", help="random: a vector whose place and length to take.")
    ] = None,
    norm: Annotated[float | None, typer.Option("--norm", help="Bring it to this length.")] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of what is drawn; 0 if left out.")
    ] = None,
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

    decoder needs --sae and --latent: what the latents write.

    caa needs --model, --layer, --positive and --negative, and may have --hook-point and --pooling:
    the mean activation of one set of texts less that of another.

    latent_difference needs --model, --sae, --positive and --negative, and may have --pooling and
    --top: the same difference of the latents, decoded.

    sae_ts, rotation and pseudo_inverse need --effects and --latent, and may have --lambda, --fit,
    --penalty, --seed and --sae: the direction whose measured effects are those latents.

    random needs --like, and may have --seed: a direction drawn at random, as a control.

    All may have --norm, and --model with --texts to measure the lengths that alpha can count. Of
    several SAEs --layer or --sae-id names one. What means nothing to a method is refused.

    Example: saefty steer vector --method decoder --sae FOLDER --latent 12332 --out french
    """

    def job() -> None:
        from saefty.config import build_config
        from saefty.errors import ConfigError
        from saefty.interventions.vectors import check_targets
        from saefty.stages.steer_vector import VectorConfig, run

        def data(path: Path | None) -> dict[str, Any] | None:
            return path and {"path": str(path), "text": text, "prompt": prompt}  # type: ignore[return-value]

        if model is None and (dtype, device) != ("auto", "auto"):
            raise ConfigError(
                f"--dtype {dtype} and --device {device} say how --model is read, but there is no "
                "--model.",
                then="Name it, or leave them out.",
            )
        making = {
            "method": method,
            "sae": sae,
            "sae_id": sae_id,
            "layer": layer,
            "hook_point": hook_point,
            "latents": latent,
            "effects": effects_run,
            "lam": lam,
            "fit": fit,
            "penalty": penalty,
            "pooling": pooling,
            "top": top,
            "like": like and str(like),
            "norm": norm,
            "seed": seed,
        }
        settings: dict[str, Any] = {
            "vector": {key: value for key, value in making.items() if value is not None},
            "model": model and {"name": model, "dtype": dtype, "device": device},
            "positive": data(positive),
            "negative": data(negative),
            "texts": data(texts),
        }
        check_targets(out, export)
        with told_by_flags(VectorConfig, "vector", "model", "positive", "negative", "texts"):
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


@contextmanager
def told_by_flags(cls: "type[Config]", *sections: str) -> Iterator[None]:
    """Let messages about keys name the options that set them, which are all that was typed.

    Args:
        cls: The configuration that the options are put into.
        sections: Those whose every key has an option of its own; of the others a path or a name has
            one, which is called after its section.

    Raises:
        SaeftyError: What is raised within, with other words.
    """
    from saefty.config import known_keys
    from saefty.errors import SaeftyError
    from saefty.stages.steer_vector import flag_of

    named = [key.rpartition(".") for key in known_keys(cls)]
    keys = [
        f"{section}.{key}"
        for section, _, key in named
        if section in sections or (section and key in ("path", "name"))
    ]
    found = re.compile(rf"\b({'|'.join(map(re.escape, sorted(keys, key=len)[::-1]))})(\.\d+)?\b")

    def flag(match: re.Match[str]) -> str:
        section, _, key = match[1].rpartition(".")
        return flag_of(section if key in ("path", "name") else key)

    try:
        yield
    except SaeftyError as error:
        for part in ("message", "safe", "then"):
            text = getattr(error, part).replace("Set data.path to ", "Name ")
            # One option is the whole model: there is none for its revision.
            text = re.sub(r"\bmodel\.name( and model\.revision)?\b", "--model", text)
            text = re.sub(r"\bmodel\.(dtype|device)\b", r"--\1", text)
            text = found.sub(flag, text)
            setattr(error, part, re.sub(r"^(steer|vector): ", "", text, flags=re.MULTILINE))
        raise
