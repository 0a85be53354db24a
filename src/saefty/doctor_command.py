"""`saefty doctor`: what is wrong with an SAE, found without a record of its figures."""

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


def doctor(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SAE",
            help="A folder of any known format, a repository, a release, or `latest`; left out, "
            "kept codes alone are examined.",
        ),
    ] = None,
    sae_id: SaeId = None,
    store: Annotated[
        str | None, typer.Option("--store", help="A store of activations to measure on.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The model to read in a store's place.")
    ] = None,
    data: TextFiles = None,
    text: TextColumn = None,
    prompt: PromptColumn = None,
    dump_dir: Annotated[
        Path | None,
        typer.Option("--dump_dir", "--dump-dir", help="Folder of dense codes to examine."),
    ] = None,
    features: Annotated[
        str | None, typer.Option("--features", help="A store of features to examine.")
    ] = None,
    layer: Annotated[int | None, typer.Option("--layer", help="The block to read.")] = None,
    hook_point: Annotated[
        str | None, typer.Option("--hook-point", help="What to read in it.")
    ] = None,
    expected_l0: ExpectedL0 = None,
    expected_fvu: ExpectedFvu = None,
    rows: Annotated[int, typer.Option("--rows", help="About how many tokens.")] = 8192,
    dtype: Dtype = "auto",
    device: Device = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", help="Write doctor.json, doctor.md and pictures there.")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Say what is wrong with an SAE, by findings in words and by experiments that would mend it.

    Exit code 0 if it is healthy, 9 if it is sick.

    Example: saefty doctor FOLDER --store artifacts/extract/acts --out artifacts/doctor
    """

    def job() -> None:
        from saefty.config import build_config
        from saefty.diagnosis.advice import NOT_ITS_CODES
        from saefty.errors import ConfigError, NumericError
        from saefty.stages.doctor import DoctorConfig, check, resolved, write

        models = {"--dtype": (dtype, "auto"), "--device": (device, "auto")}
        given = [name for name, (value, default) in models.items() if value != default]
        if model is None and given:
            raise ConfigError(
                f"{' and '.join(given)} {'say' if len(given) > 1 else 'says'} how to run a model, "
                "and --model is not given.",
                then=f"Leave out {' and '.join(given)}, or give --model.",
            )
        columns = {"--text": text, "--prompt": prompt}
        named = [f"{name} {value}" for name, value in columns.items() if value is not None]
        if named and not data:
            raise ConfigError(
                f"{' and '.join(named)} {'name columns' if len(named) > 1 else 'names a column'} "
                "of a file of texts, and --data is not given.",
                then=f"Give the file: --data FILE, or leave out {' and '.join(named)}.",
            )
        settings: dict[str, Any] = {
            "data": [{"path": str(path), "text": text, "prompt": prompt} for path in data or ()],
            "doctor": {
                "sae": source,
                "sae_id": sae_id,
                "store": store,
                "dump": dump_dir,
                "features": features,
                "layer": layer,
                "hook_point": hook_point,
                "expected_l0": expected_l0,
                "expected_fvu": expected_fvu,
                "rows": rows,
            },
            "run": {"dir": out and str(out)},
        }
        if model is not None:
            settings["model"] = {"name": model, "dtype": dtype, "device": device}
        cfg = resolved(build_config(DoctorConfig, settings))
        report = check(cfg)
        folder = write(cfg, report).folder if out else None
        if as_json:
            where = folder and str(folder)
            figures = report.figures()
            typer.echo(json.dumps({"stage": "doctor", "run": where, "figures": figures}))
        else:
            typer.echo(report.text())
        if not report.healthy:
            cause = report.cause or "no single cause is named"
            what = f"{report.name} is sick: {cause}."
            if cause == NOT_ITS_CODES:
                what = f"{dump_dir or features} does not go with {report.name}: {cause}."
            raise NumericError(what, then=report.then)

    guarded(job, quiet, debug, as_json)
