"""`saefty annotate`: put SAE features into a file of prompts and responses."""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from saefty.command import Debug, Json, Quiet, guarded

FLAGS = {
    "annotate.input": "--input",
    "model.name": "--model",
    "model.dtype": "--dtype",
    "model.device": "--device",
    "annotate.sae_release": "--sae-release",
    "annotate.sae_id": "--sae-id",
    "annotate.sae": "--sae",
    "annotate.layers": "--target-layer or --layers",
    "annotate.hook_name": "--hook-name",
    "annotate.tokens": "--save-all-tokens",
    "annotate.limit_examples": "--max-samples",
    "annotate.chat": "--chat",
    "output.top_k": "--top-k",
    "output.path": "--output",
}
"""The key of each setting that has a flag -> the flag."""

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Further settings, such as engine.workers=2."),
]


def annotate(
    source: Annotated[Path, typer.Option("--input", help="JSON file of results to annotate.")],
    words: Words = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model folder or hub id.", show_default="google/gemma-2-9b-it"),
    ] = None,
    sae_release: Annotated[
        str | None,
        typer.Option(help="Release of the SAEs.", show_default="gemma-scope-9b-pt-res-canonical"),
    ] = None,
    sae_id: Annotated[
        str | None,
        typer.Option(
            help="SAE in the release; several between commas.",
            show_default="layer_20/width_16k/canonical",
        ),
    ] = None,
    sae: Annotated[
        str | None,
        typer.Option(help="Folder of an SAE in place of release and id; several between commas."),
    ] = None,
    target_layer: Annotated[
        int | None,
        typer.Option(
            help="Block that the SAE reads.", show_default="20, or what the SAE's folder says"
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Blocks of several SAEs, between commas.")
    ] = None,
    hook_name: Annotated[
        str | None,
        typer.Option(
            help="Where the SAE reads.", show_default="blocks.{target_layer}.hook_resid_post"
        ),
    ] = None,
    save_all_tokens: Annotated[
        bool, typer.Option("--save-all-tokens", help="Every token, not the prompt's last alone.")
    ] = False,
    top_k: Annotated[
        int | None, typer.Option(help="Features of a token.", show_default="50")
    ] = None,
    max_samples: Annotated[
        int | None, typer.Option(help="Annotate the first samples only.", show_default="all")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="The annotated file.", show_default="beside the input, with the time"),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat/--raw", help="Apply the chat template, or join the texts as they stand."
        ),
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16, float16.", show_default="auto")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, mps.", show_default="auto")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Tell of every piece, and every sample that failed.")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Add the SAE features of prompts with their responses to a copy of a results file.

    Example: saefty annotate --input results.json --target-layer 20
    """

    def job() -> None:
        from saefty.annotation.job import annotate as run
        from saefty.annotation.settings import AnnotateConfig
        from saefty.config import load_config
        from saefty.errors import ConfigError

        blocks = _blocks(target_layer, layers)
        given = {
            "annotate.input": str(source),
            "model.name": model,
            "model.dtype": dtype,
            "model.device": device,
            "annotate.sae_release": sae_release,
            "annotate.sae_id": sae_id,
            "annotate.sae": sae,
            "annotate.layers": blocks,
            "annotate.hook_name": hook_name,
            "annotate.tokens": "all" if save_all_tokens else None,
            "annotate.limit_examples": max_samples,
            "annotate.chat": True if chat else None,
            "output.top_k": top_k,
            "output.path": None if output is None else str(output),
        }
        ours = [f"{key}={value}" for key, value in given.items() if value is not None]
        try:
            cfg = load_config(AnnotateConfig, None, [*ours, *(words or ())])
        except ConfigError as error:
            typed = {key for key, value in given.items() if value is not None}
            raise ConfigError(
                _in_flags(error.message, typed), safe=error.safe, then=_in_flags(error.then, typed)
            ) from None
        done = run(cfg, verbose=verbose)
        text = json.dumps(done.as_record()) if as_json else f"{done.output}\n{done.ledger}"
        typer.echo(text)

    guarded(job, quiet, debug, as_json)


def _in_flags(text: str, typed: Collection[str]) -> str:
    """Return a message with the flags that were typed in front of the keys that they set."""
    for key in typed:
        text = re.sub(rf"(?<![\w.]){re.escape(key)}(?![\w.])", f"{FLAGS[key]} ({key})", text)
    return text


def _blocks(target_layer: int | None, layers: str | None) -> list[int] | None:
    """Return the blocks that the two flags name.

    Raises:
        ConfigError: If they contradict each other, or are no numbers.
    """
    from saefty.errors import ConfigError

    try:
        named = None if layers is None else [int(word) for word in layers.strip("[]").split(",")]
    except ValueError:
        raise ConfigError(
            f"--layers takes numbers with commas between them, not {layers!r}.",
            then="Write for example --layers 9,20.",
        ) from None
    if named is not None and target_layer is not None and named != [target_layer]:
        raise ConfigError(
            f"--target-layer says {target_layer} and --layers says {named}.",
            then="Give one of them.",
        )
    return [target_layer] if named is None and target_layer is not None else named
