"""`saefty sae verify`: an SAE's figures against its record, and the cause if they are off."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from saefty.command import (
    Debug,
    Device,
    Dtype,
    ExpectedFvu,
    ExpectedL0,
    Json,
    PromptColumn,
    Quiet,
    SaeId,
    TextColumn,
    TextFiles,
    guarded,
)


def verify(
    source: Annotated[
        str, typer.Argument(help="A folder of any known format, a repository, or a release.")
    ],
    sae_id: SaeId = None,
    model: Annotated[str | None, typer.Option("--model", help="The model to read.")] = None,
    data: TextFiles = None,
    text: TextColumn = None,
    prompt: PromptColumn = None,
    store: Annotated[
        str | None, typer.Option("--store", help="A store of activations in the model's place.")
    ] = None,
    layer: Annotated[int | None, typer.Option("--layer", help="The block to read.")] = None,
    hook_point: Annotated[
        str | None, typer.Option("--hook-point", help="What to read in it.")
    ] = None,
    expected_l0: ExpectedL0 = None,
    expected_fvu: ExpectedFvu = None,
    margin: Annotated[
        float | None,
        typer.Option("--margin", help="Share by which figures may differ beside sampling."),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", help="About how many tokens.")] = 8192,
    try_all: Annotated[
        bool, typer.Option("--try-all", help="Try every cause even where it is healthy.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", help="Write verify.json and verify.md there.")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Measure an SAE against its record; if it is off, say which known cause restores it.

    Exit code 0 if it is healthy, 9 if it is not.

    Example: saefty sae verify FOLDER --model google/gemma-2-2b --data texts.jsonl
    """

    def job() -> None:
        from saefty.config import build_config
        from saefty.errors import ConfigError, NumericError
        from saefty.stages.verify import VerifyConfig, check, write

        columns = {"--text": text, "--prompt": prompt}
        named = [f"{name} {value}" for name, value in columns.items() if value is not None]
        if named and not data:
            raise ConfigError(
                f"{' and '.join(named)} {'name columns' if len(named) > 1 else 'names a column'} "
                "of a file of texts, and --data is not given.",
                then=f"Give the file: --data FILE, or leave out {' and '.join(named)}.",
            )
        files = [{"path": str(path), "text": text, "prompt": prompt} for path in data or ()]
        settings: dict[str, Any] = {
            "data": files,
            "verify": {
                "sae": source,
                "sae_id": sae_id,
                "store": store,
                "layer": layer,
                "hook_point": hook_point,
                "expected_l0": expected_l0,
                "expected_fvu": expected_fvu,
                "margin": margin,
                "rows": rows,
                "try_all": try_all,
            },
            "run": {"dir": out and str(out)},
        }
        models = {"--dtype": (dtype, "auto"), "--device": (device, "auto")}
        given = [name for name, (value, default) in models.items() if value != default]
        if store is not None and given:
            raise ConfigError(
                f"--store {store} is measured without a model, and {' and '.join(given)} "
                f"{'say' if len(given) > 1 else 'says'} how to run one: both are given.",
                then=f"Leave out {' and '.join(given)}, or give --model in the place of --store.",
            )
        if model is not None:
            settings["model"] = {"name": model, "dtype": dtype, "device": device}
        cfg = build_config(VerifyConfig, settings)
        report = check(cfg)
        folder = write(cfg, report).folder if out else None
        if as_json:
            figures = report.figures()
            where = folder and str(folder)
            typer.echo(json.dumps({"stage": "verify", "run": where, "figures": figures}))
        else:
            typer.echo(report.text())
        if not report.verdict.healthy:
            cause = report.verdict.cause or "no single cause is named"
            raise NumericError(f"{report.name} is not healthy: {cause}.", then=report.verdict.then)

    guarded(job, quiet, debug, as_json)
