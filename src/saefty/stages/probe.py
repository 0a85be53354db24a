"""probe: SAE features against dense activations, words and a random SAE, as detectors of harm."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import model_validator

from saefty import fsio
from saefty.config import Config, config_tree, differing_keys
from saefty.detection.comparison import Detector
from saefty.detection.inputs import DENSE, WORDS
from saefty.detection.job import DetectionJob
from saefty.detection.report import write_detection_report
from saefty.detection.result import Detection
from saefty.detection.saving import MeasuredDetector, detector_to_save, save_detector
from saefty.encoding import in_words
from saefty.engine import ThreadsSection
from saefty.errors import ConfigError, MismatchError
from saefty.evaluation_inputs import (
    labelled_examples,
    recorded_model,
    recorded_reading,
    recorded_with_model,
    with_folders,
)
from saefty.evaluation_settings import ProbeSection
from saefty.guards.place import RECORD, check_place
from saefty.guards.spec import GuardModel
from saefty.models.base import ModelAdapter, ModelSection
from saefty.reading import ReadingSection
from saefty.records import example_from
from saefty.runs import METADATA, Ledger, Run, RunSection, read_metadata, run_folder
from saefty.saes.base import SparseAutoencoder
from saefty.stages.base import Outcome, load_saes, model_inputs, open_model, settle_arithmetic
from saefty.stores.activations import ActivationStore
from saefty.stores.features import FeatureStore

log = logging.getLogger(__name__)


class ProbeConfig(Config):
    """Configuration of `saefty probe`."""

    model: ModelSection | None = None
    """Which model to run; None takes the one the features were made with."""

    probe: ProbeSection = ProbeSection()
    """Which features to compare with other inputs, and how."""

    engine: ThreadsSection = ThreadsSection()
    """How the process uses this machine."""

    run: RunSection = RunSection()
    """Where the run's folder lies."""

    @model_validator(mode="after")
    def _one_source(self) -> "ProbeConfig":
        given = self.probe
        if (given.features is None) == (given.sae is None) or (given.sae and not given.store):
            raise ValueError(
                "set either probe.features, or probe.sae and probe.store (with probe.features, "
                "probe.store may name activations of the same examples)"
            )
        if given.save_detector is not None and given.save is None:
            raise ValueError("probe.save_detector needs probe.save, the folder to write it to")
        if not given.poolings:
            raise ValueError("probe.poolings names no pooling: choose from max, mean and last")
        return self


def run(cfg: ProbeConfig, *, model: ModelAdapter | None = None) -> Outcome:
    """Compare detectors and write the report; a complete run is not done again.

    Args:
        cfg: The configuration.
        model: A model that is loaded already; None loads the one that made the features.
    """
    cfg = cfg.model_copy(update={"probe": with_folders(cfg.probe, cfg.run.root)})
    section = cfg.probe
    features = FeatureStore(section.features) if section.features else None
    activations = ActivationStore(section.store) if section.store else None
    source = features or activations
    assert source is not None  # the configuration names one
    saes = load_saes(Path(section.sae), section.layers) if section.sae else {}
    inputs: dict[str, Any] = {"source": source.manifest["fingerprint"]}
    if features is not None and activations is not None:
        inputs["store"] = activations.manifest["fingerprint"]
    # All that can be refused is refused before a model is loaded, which takes minutes.
    labelled_examples(
        source.examples(),
        Ledger(),
        drop_missing=section.drop_missing_labels,
        section="probe",
        made_by="extract" if features is None else "encode",
    )
    place = run_folder(cfg.run, "probe") if cfg.run.dir or cfg.run.id else None
    if section.save is not None:
        _check_savable(source)
        _check_apart(section.save, place)
    recorded = _recorded_inputs(place).get("model")
    if model is not None:
        inputs["model"] = model_inputs(model)
    elif section.baselines and activations is None:
        wanted = cfg.model or recorded_model(source.folder, "probe.baselines=false")
        if recorded is None:
            recorded_reading(source.folder)
            model = _opened(wanted, cfg)
        inputs["model"] = recorded if model is None else model_inputs(model)
    folder = place or run_folder(cfg.run, "probe")
    with Run(folder, "probe", _deciding(cfg), inputs) as current:
        if section.save is not None:
            check_place(section.save, folder)
        if current.finished and (section.save is None or _is_there(section, folder, current)):
            log.info("%s is complete; set run.dir to a new folder to compare again", folder)
            return Outcome("probe", folder, current.figures)
        if not current.finished and model is None and "model" in inputs:
            model = _opened(wanted, cfg)
            _check_same_model(model, recorded, folder)
        reads = model is not None or section.save is not None
        kept = folder / "activations"
        if current.finished and activations is None and kept.is_dir():
            activations = ActivationStore(kept)
        job = DetectionJob(
            folder,
            current.fingerprint,
            section,
            features,
            activations,
            saes=saes,
            model=None if current.finished else model,
            reading=recorded_reading(source.folder) if reads else ReadingSection(),
            ledger=current.ledger,
        )
        if current.finished:
            assert section.save is not None  # else there is nothing left to do
            found = job.again(MeasuredDetector.read(folder, current.figures, section.save_detector))
            detector = found.all.detectors[0]
            _save(section.save, found, detector, job, source.folder, saes, model)
            log.info("%s is complete; its detector was saved in %s", folder, section.save)
            return Outcome("probe", folder, {**current.figures, "saved": detector.candidate.name})
        found = job.run()
        if section.save is not None:
            detector = detector_to_save(found, section.save_detector)
            _save(section.save, found, detector, job, source.folder, saes, model)
            found = replace(found, saved=detector)
        figures = write_detection_report(folder, found)
        current.finish(figures)
    return Outcome("probe", folder, figures)


def _deciding(cfg: ProbeConfig) -> dict[str, Any]:
    """Return the settings without what is saved, which decides nothing of the comparison."""
    tree = config_tree(cfg)
    return {**tree, "probe": {**tree["probe"], "save": None, "save_detector": None}}


def _recorded_inputs(folder: Path | None) -> dict[str, Any]:
    if folder is None or not (folder / METADATA).exists():
        return {}
    return dict(read_metadata(folder)["inputs"])


def _opened(wanted: ModelSection, cfg: ProbeConfig) -> ModelAdapter:
    settle_arithmetic(cfg.engine, cfg.run.dir)
    return open_model(wanted, [])


def _check_same_model(model: ModelAdapter, recorded: Any, folder: Path) -> None:
    """Refuse to resume with another model than the run was started with."""
    now = json.loads(fsio.dump_json(model_inputs(model)))
    changed = differing_keys({"model": recorded}, {"model": now})
    if changed:
        raise MismatchError(
            f"{folder} was started with another model (run -> now):\n  " + "\n  ".join(changed),
            safe="The run in the folder is unchanged.",
            then="Restore that model to resume it, or set run.dir to a new folder.",
        )


def _check_apart(save: Path, folder: Path | None) -> None:
    """Refuse a guard in the run's own folder, before anything is written."""
    if folder is not None and save.resolve() == folder.resolve():
        raise ConfigError(
            f"probe.save and run.dir are the same folder, {save}: a guard has a folder of its own.",
            safe="Nothing was written.",
            then="Name another folder for the guard, such as one beside it.",
        )
    check_place(save, folder or "")


def _is_there(section: ProbeSection, folder: Path, current: Run) -> bool:
    """Return whether a complete run's guard is there already.

    Raises:
        ConfigError: If it is another detector's.
    """
    assert section.save is not None  # asked only where a guard is wanted
    path = section.save / RECORD
    if not path.exists():
        return False
    there = fsio.read_sealed(path)["facts"]["probe"]
    wanted = MeasuredDetector.read(folder, current.figures, section.save_detector).name
    if there != wanted:
        raise ConfigError(
            f"{section.save} holds the guard of {there} already, not of {wanted}.",
            safe="Nothing in it was touched.",
            then="Name another folder with --save.",
        )
    log.info("the guard of %s is in %s already", there, section.save)
    return True


def _check_savable(source: FeatureStore | ActivationStore) -> None:
    """Refuse, before the work, what would be refused after it."""
    contrast = source.manifest.get("contrast")
    if contrast is not None:
        raise ConfigError(
            f"{source.folder} was made of {in_words(contrast)}; a guard reads plain activations.",
            then="Extract again without extract.contrast, or leave probe.save out.",
        )
    pooling = recorded_reading(source.folder).pooling.name
    if pooling != "none":
        raise ConfigError(
            f"{source.folder} holds one row an example, pooled by {pooling} while it was made; a "
            "guard reads tokens.",
            then="Extract again without extract.pooling, or leave probe.save out.",
        )


def _save(
    folder: Path,
    found: Detection,
    detector: Detector,
    job: DetectionJob,
    source: Path,
    saes: dict[int, SparseAutoencoder],
    model: ModelAdapter | None,
) -> None:
    """Write a detector as a guard, with all it needs to read text."""
    candidate, features = detector.candidate, job.features
    layer, sae, read = candidate.layer, None, None
    facts = recorded_with_model(source) or {}
    if candidate.family not in (WORDS, DENSE):
        assert layer is not None  # of all that reads latents
        if layer not in saes:
            saes = load_saes(Path(features.sae_folder(layer)), [layer])
        sae = saes[layer]
    if candidate.family != WORDS:
        width = sae.d_in if sae is not None else candidate.rows.shape[1]
        read = _guard_model(facts, width, model, source)
    save_detector(
        folder,
        found,
        detector,
        examples=[example_from(job.records[i]) for i in found.data.rows],
        reading=job.reading,
        model=read,
        site=None if layer is None else features.site(layer),
        signed=layer is not None and features.signed(layer),
        sae=sae,
        data=dict(facts.get("inputs", {}).get("data", {})),
        run=job.folder,
    )


def _guard_model(
    facts: dict[str, Any], width: int, model: ModelAdapter | None, where: Path
) -> GuardModel:
    if model is not None:
        return GuardModel.of(model)
    if not facts:
        raise ConfigError(
            f"{where} does not say which model it was made with, and a guard must know it.",
            then="Set model.name and leave probe.store out, or save a bag of words "
            "(probe.save_detector='bag of words').",
        )
    name = str(facts["config"]["model"]["name"])
    return GuardModel.recorded(name, width, facts.get("inputs", {}).get("model", {}))
