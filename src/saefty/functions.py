"""The stages as functions: objects in, stores and SAEs out, the same runs on disk as by command.

Keyword arguments are the stages' own keys, section by section where they have one: `train(acts,
layer=12, k=64, out=..., optimizer={"lr": 1e-3}, train={"max_steps": 500})`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from saefty.baselines import names_to_codes
from saefty.config import build_config
from saefty.data.base import DataSection, load_examples
from saefty.diagnosis.doctor_report import DoctorReport
from saefty.diagnosis.row_checks import given_rows
from saefty.errors import InputError
from saefty.evaluation import LatentEvaluation, evaluate_latents
from saefty.models.base import ModelAdapter
from saefty.records import Example
from saefty.runs import find_run
from saefty.saes.base import SparseAutoencoder
from saefty.saes.native import load_sae
from saefty.sources import load_sae as load_any_sae
from saefty.stages import analyze as analyze_stage
from saefty.stages import doctor as doctor_stage
from saefty.stages import encode as encode_stage
from saefty.stages import extract as extract_stage
from saefty.stages import probe as probe_stage
from saefty.stages import train as train_stage
from saefty.stages.base import GIVEN_IN_PYTHON, find_saes
from saefty.stores.activations import ActivationStore
from saefty.stores.features import FeatureStore

Out = Path | str


def dataset(name: str, **keys: Any) -> list[Example]:
    """Read a dataset.

    Args:
        name: A file, or the name of a dataset (`saefty list datasets`).
        **keys: The other keys of `data.`, such as `text`, `prompt`, `label`, `group`, `limit`.

    Raises:
        InputError: If it is empty, or a column or label cannot be used.
    """
    where = {"name": "local", "path": name} if Path(name).suffix else {"name": name}
    return load_examples(build_config(DataSection, {**where, **keys}))


def extract(
    model: ModelAdapter, examples: Sequence[Example], layers: Sequence[int], out: Out, **keys: Any
) -> ActivationStore:
    """Keep the activations of some blocks; an existing folder is resumed.

    Args:
        model: The model.
        examples: What it reads.
        layers: Blocks, counted from 0.
        out: The run's folder.
        **keys: The other keys of `extract.`, such as `hook_point`, `pooling`, `truncate`.
    """
    cfg = build_config(
        extract_stage.ExtractConfig,
        {
            "model": {"name": model.name},
            "data": {"name": GIVEN_IN_PYTHON},
            "extract": {"layers": list(layers), **keys},
            "run": {"dir": str(out)},
        },
    )
    outcome = extract_stage.run(cfg, model=model, examples=examples)
    return ActivationStore(outcome.folder)


def train(
    acts: ActivationStore,
    out: Out,
    *,
    layer: int | None = None,
    model: ModelAdapter | None = None,
    train: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    **keys: Any,
) -> SparseAutoencoder:
    """Train one SAE; an existing folder is resumed.

    Args:
        acts: The activations.
        out: The run's folder.
        layer: Which layer of the store; None if it has one.
        model: The model the activations come from, for the loss recovered; None loads it.
        train: Keys of `train.`, such as `max_steps`, `batch_size`, `seed`.
        optimizer: Keys of `optimizer.`, such as `lr`.
        **keys: Keys of `sae.`, such as `arch`, `k`, `expansion_factor`.

    Raises:
        InputError: If the store has several layers and none is named.
    """
    if layer is None and len(acts.layers) > 1:
        raise InputError(
            f"the store holds layers {list(acts.layers)}.", then="Say which one: layer=..."
        )
    cfg = build_config(
        train_stage.TrainConfig,
        {
            "train": {
                "layers": [acts.layers[0] if layer is None else layer],
                "store": str(acts.folder),
                **(train or {}),
            },
            "sae": keys,
            "optimizer": optimizer or {},
            "run": {"dir": str(out)},
        },
    )
    outcome = train_stage.run(cfg, store=acts, model=model)
    return load_sae(find_saes(outcome.folder)[0])


def encode(
    model: ModelAdapter,
    sae: SparseAutoencoder,
    examples: Sequence[Example],
    out: Out,
    **keys: Any,
) -> FeatureStore:
    """Write the sparse features of every token of some examples; an existing folder is resumed.

    Args:
        model: The model.
        sae: The SAE; its `site` says where it reads.
        examples: What the model reads.
        out: The run's folder.
        **keys: The other keys of `encode.`, such as `truncate`.

    Raises:
        ValueError: If the SAE does not know its site.
    """
    if sae.site is None:
        raise ValueError("the SAE does not know its site; set sae.site to where it was trained")
    cfg = build_config(
        encode_stage.EncodeConfig,
        {
            "model": {"name": model.name},
            "data": {"name": GIVEN_IN_PYTHON},
            "encode": {"sae": GIVEN_IN_PYTHON, **keys},
            "run": {"dir": str(out)},
        },
    )
    saes = {sae.site.layer: sae}
    outcome = encode_stage.run(cfg, model=model, examples=examples, saes=saes)
    return FeatureStore(outcome.folder)


def doctor(
    sae: Any,
    acts: Any,
    *,
    out: Out | None = None,
    **keys: Any,
) -> DoctorReport:
    """Say what is wrong with an SAE, by experiments on activations; no record is needed.

    Args:
        sae: The SAE, or whatever `load_sae` reads.
        acts: A store or its folder, which may hold neighbouring blocks to try, or raw activations
            [rows, d_in].
        out: Where to write doctor.json, doctor.md and the pictures; None writes nothing.
        **keys: The other keys of `doctor.`, such as `layer`, `rows`, `dump`, `expected_l0`.

    Returns:
        The report: `healthy`, `cause`, `sentence`, `then`, `text()`, `figures()`.

    Raises:
        InputError: If it is given something else, or too few rows.
        SaeftyError: As the loaders of SAE and store.
    """
    if isinstance(sae, Path | str):
        sae = load_any_sae(sae)
    if isinstance(acts, Path | str):
        acts = ActivationStore.open(find_run(acts, "extract"))
    for given, wanted in ((sae, SparseAutoencoder), (acts, ActivationStore | Tensor | np.ndarray)):
        if not isinstance(given, wanted):
            kind = "an SAE" if wanted is SparseAutoencoder else "activations"
            raise InputError(
                f"{type(given).__name__} is not {kind}.",
                then="sf.doctor takes an SAE or its folder, then an ActivationStore, its folder, "
                "or a tensor or array [rows, d_in]; codes are given as features= or dump=.",
            )
    is_store = isinstance(acts, ActivationStore)
    cfg = build_config(
        doctor_stage.DoctorConfig,
        {
            "doctor": {
                "sae": GIVEN_IN_PYTHON if sae.folder is None else str(sae.folder),
                "store": str(acts.folder) if isinstance(acts, ActivationStore) else GIVEN_IN_PYTHON,
                **keys,
            },
            "run": {"dir": out and str(out)},
        },
    )
    held = None if is_store else given_rows(acts)
    dtype = "" if is_store else str(acts.dtype).removeprefix("torch.")
    report = doctor_stage.check(cfg, sae=sae, rows=held, kept_as=dtype)
    if out is not None:
        doctor_stage.write(cfg, report)
    return report


def analyze(
    codes: FeatureStore | ActivationStore,
    out: Out,
    *,
    sae: SparseAutoencoder | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """Measure what the latents of an SAE do over all tokens, and draw it (`show_img`).

    Args:
        codes: The features; or activations, which are encoded on the way.
        out: The run's folder.
        sae: With activations: an SAE that lies in a folder.
        **keys: The other keys of `analyze.`, such as `layers`, `sample_tokens`.

    Returns:
        The figures of summary.json.

    Raises:
        ValueError: If activations come without an SAE, or the SAE without a folder.
    """
    given: dict[str, Any] = {"features": str(codes.folder)}
    if isinstance(codes, ActivationStore):
        if sae is None or sae.folder is None:
            raise ValueError("activations are encoded with an SAE that was loaded from a folder")
        layers = [sae.site.layer] if sae.site else None
        given = {"store": str(codes.folder), "sae": str(sae.folder), "layers": layers}
    cfg = build_config(
        analyze_stage.AnalyzeConfig,
        {"analyze": {**given, **keys}, "run": {"dir": str(out)}},
    )
    return dict(analyze_stage.run(cfg).figures)


def evaluate(
    feats: FeatureStore, *, layer: int | None = None, pooling: str = "max", **keys: Any
) -> LatentEvaluation:
    """Choose latents that track harm on one half of the examples and report them on the other.

    For the whole report, with baselines and the causal test, use the stage (`saefty eval`).

    Args:
        feats: The features of labelled examples; those without a label are left out.
        layer: Which layer; None if there is one.
        pooling: How an example's tokens become one row: `max`, `mean`, `sum`, `last`.
        **keys: Keywords of `saefty.evaluation.evaluate_latents`, such as `top`, `seed`.
    """
    records = feats.examples()
    usable = [one["status"] == "ok" and one["label"] is not None for one in records]
    rows = [i for i, used in enumerate(usable) if used]
    pooled = feats.pooled(feats.layers[0] if layer is None else layer, pooling)
    return evaluate_latents(
        pooled[np.array(rows, dtype=int)],
        np.array([records[i]["label"] for i in rows], dtype=bool),
        names_to_codes([records[i]["group"] for i in rows]),
        names_to_codes([records[i]["source"] for i in rows]),
        **keys,
    )


def probe(
    feats: FeatureStore | Out,
    out: Out,
    *,
    acts: ActivationStore | Out | None = None,
    model: ModelAdapter | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """Compare detectors of harm on SAE features with those on what else is known of the examples.

    Args:
        feats: The features of labelled examples, or their folder.
        out: The run's folder.
        acts: Activations of the same examples, or their folder; None runs the model.
        model: The model, if it is loaded already.
        **keys: The other keys of `probe.`, such as `poolings`, `k`, `save`, `seed`.

    Returns:
        The figures of summary.json; `sentence` says what came out.
    """
    cfg = build_config(
        probe_stage.ProbeConfig,
        {
            "probe": {
                "features": str(feats.folder if isinstance(feats, FeatureStore) else feats),
                "store": acts and str(acts.folder if isinstance(acts, ActivationStore) else acts),
                **keys,
            },
            "run": {"dir": str(out)},
        },
    )
    return dict(probe_stage.run(cfg, model=model).figures)
