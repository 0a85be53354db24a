"""Training: several SAEs of a layer from one pass over its activations, resumable to the byte.

Everything a training depends on is fixed before the first step: the split, the scaler, the order
of the batches, the first weights. A checkpoint holds the rest (weights, optimiser, dead counters,
early stopping, place in the stream), so an interrupted training ends with the same bytes as one
that was left alone. No random number is drawn while it runs.
"""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saefty import fsio
from saefty.checkpoints import (
    Checkpoint,
    best_weights,
    latest_checkpoint,
    load_tensors,
    remove_checkpoints,
    save_checkpoint,
    save_tensors,
    trim_journal,
)
from saefty.config import config_tree, differing_keys
from saefty.errors import ConfigError, MismatchError, NumericError
from saefty.fidelity import measure_fidelity
from saefty.kernels.base import choose_kernels
from saefty.log import progress
from saefty.optimisation import EarlyStopping, Trainee
from saefty.saes.base import SaeConfig, SaeSection
from saefty.saes.native import load_sae, save_sae
from saefty.saes.scaler import Scaler, fit_scaler
from saefty.training_data import (
    ActivationSource,
    Cursor,
    Split,
    epoch_seed,
    held_out_rows,
    split_by_example,
    stream,
)
from saefty.training_settings import OptimizerSection, TrainSection

log = logging.getLogger(__name__)

METRICS, TRAIN_LOG, CHECKPOINTS = "metrics.json", "train_log.jsonl", "checkpoints"
SCALER_ROWS = 1_000_000
MAX_DEAD_ROWS = 10_000_000

__all__ = ["OptimizerSection", "TrainSection", "TrainedSae", "train_saes"]


@dataclass(frozen=True)
class TrainedSae:
    """A finished SAE: where it lies, and how good it is."""

    folder: Path
    layer: int
    config: SaeConfig
    metrics: dict[str, Any]


@dataclass(frozen=True)
class _Pupil:
    """One SAE of the pass."""

    trainee: Trainee
    config: SaeConfig
    folder: Path
    stopping: EarlyStopping


def train_saes(
    source: ActivationSource,
    sae: SaeSection,
    train: TrainSection,
    optimizer: OptimizerSection,
    folder: Path | str,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> list[TrainedSae]:
    """Train the SAEs asked for on every layer asked for, and save each in a folder of its own.

    The folders are `layer_<i>`, or `layer_<i>_k<k>_d<d_sae>` where several SAEs share a layer. What
    is finished is not done again; what was interrupted goes on from its last checkpoint.

    Args:
        source: The activations.
        sae: Which SAEs; several values of `k` or `expansion_factor` share one pass.
        train: How long, and what to watch.
        optimizer: How weights move.
        folder: The run's folder, which the caller has locked.
        metadata: What cfg.json should say about the model, such as `model_name`.

    Returns:
        The SAEs, layer by layer, in the order of the configuration.

    Raises:
        ConfigError: If a layer was not extracted or an SAE cannot have the shape asked for.
        InputError: If the rows cannot be split or do not vary.
        MismatchError: If a checkpoint was made with other settings.
        NumericError: If a loss is not finite; the last checkpoint is kept.
    """
    layers = source.layers if train.layers is None else train.layers
    absent = [layer for layer in layers if layer not in source.layers]
    if absent:
        raise ConfigError(
            f"train.layers names layer {absent[0]}, but the store holds {list(source.layers)}. "
            "Extract that layer, or choose among these."
        )
    configs = sae.configs(source.d_in)
    split = split_by_example(source, train.validation, train.seed, train.validation_rows)
    trained = []
    for layer in layers:
        folders = [Path(folder) / _name(layer, config, len(configs) > 1) for config in configs]
        state = Path(folder) / CHECKPOINTS / f"layer_{layer}"
        if not all((path / METRICS).is_file() for path in folders):
            _Pass(source, layer, sae, train, optimizer, split, folders, state, metadata or {}).run()
        remove_checkpoints(state)
        trained += [
            TrainedSae(path, layer, config, fsio.read_json(path / METRICS))
            for path, config in zip(folders, configs, strict=True)
        ]
    return trained


class _Pass:
    """The SAEs of one layer, trained on the same batches."""

    def __init__(
        self,
        source: ActivationSource,
        layer: int,
        sae: SaeSection,
        train: TrainSection,
        optimizer: OptimizerSection,
        split: Split,
        folders: list[Path],
        state: Path,
        metadata: Mapping[str, Any],
    ) -> None:
        self.source, self.layer, self.train, self.split = source, layer, train, split
        self.state, self.metadata = state, metadata
        self.normalize = sae.normalize
        self.device = _device(train.device)
        n_train = int(split.train.sum())
        self.size = min(train.batch_size, n_train)
        self.n_steps = train.max_steps
        if train.epochs is not None:
            per_epoch = max(1, n_train // self.size)
            self.n_steps = min(self.n_steps, max(1, round(train.epochs * per_epoch)))
        dead_rows = train.dead_rows or min(MAX_DEAD_ROWS, self.n_steps * self.size // 10)
        self.pupils = [
            _Pupil(
                Trainee(
                    config,
                    optimizer,
                    grad_clip=train.grad_clip,
                    n_steps=self.n_steps,
                    dead_after=max(1, dead_rows),
                    device=self.device,
                ),
                config,
                path,
                EarlyStopping(train.patience),
            )
            for config, path in zip(sae.configs(source.d_in), folders, strict=True)
        ]
        self.settings = {
            "sae": config_tree(sae),
            "train": {k: v for k, v in config_tree(train).items() if k != "layers"},
            "optimizer": config_tree(optimizer),
            "store": {"layer": layer, "n_rows": source.n_rows, "d_in": source.d_in},
            "backend": {
                "device": self.device,
                "kernels": type(choose_kernels(self.device)).__name__,
            },
        }

    def run(self) -> None:
        """Train from the last checkpoint, or from the start, to the end."""
        found = latest_checkpoint(self.state)
        done, cursor = self._resume(found) if found else (0, self._begin())
        step = done
        for pupil in self.pupils:
            trim_journal(pupil.folder / TRAIN_LOG, step)
        self.held_out = self._scaled_held_out()
        batches = stream(
            self.source, self.layer, self.size, self.train.seed, self.split.train, cursor
        )
        began = time.monotonic()
        with progress(f"training layer {self.layer}", self.n_steps, "steps", done=step) as bar:
            while step < self.n_steps and self._open():
                place, raw = next(batches)
                if step > done and step % self.train.checkpoint_every == 0:
                    self._save(step, place)
                x = self.scaler.apply(raw.to(self.device))
                self._learn(x, step, place)
                step += 1
                bar.advance()
                if step % self.train.eval_every == 0 or step == self.n_steps:
                    self._evaluate(step)
                    rate = (step - done) * self.size
                    log.info(
                        "layer %d: step %d of %d, %.0f rows/s",
                        self.layer, step, self.n_steps, rate / (time.monotonic() - began),
                    )  # fmt: skip
        for pupil in self.pupils:
            self._finish(pupil, step)

    def _begin(self) -> Cursor:
        keep, seed = self.split.train, self.train.seed
        last = Cursor(0, max(1, SCALER_ROWS // self.size))
        rows = stream(self.source, self.layer, self.size, seed, keep, Cursor())
        first_epoch = takewhile(lambda item: item[0] < last, rows)
        self.scaler = fit_scaler((x for _, x in first_epoch), self.normalize)
        _, first = next(stream(self.source, self.layer, self.size, seed, keep, Cursor()))
        x = self.scaler.apply(first.to(self.device))
        for pupil in self.pupils:
            pupil.trainee.start(x, epoch_seed(seed, self.layer))
        return Cursor()

    def _learn(self, x: Float[Tensor, "rows d_in"], step: int, place: Cursor) -> None:
        variance = 0.0
        for pupil in self._open():
            try:
                figures = pupil.trainee.step(x, step)
            except NumericError as error:
                found = latest_checkpoint(self.state)
                raise NumericError(
                    f"layer {self.layer}, k {pupil.config.k}, step {step + 1}: {error.message} The "
                    f"rows of batch {place.batch} of epoch {place.epoch} are finite, so the "
                    "training itself diverged.",
                    safe=f"The checkpoint of step {found.step} is kept." if found else "",
                    then="Lower optimizer.lr or set train.grad_clip, with run.dir on a new folder.",
                ) from None
            if (step + 1) % self.train.log_every == 0 or step + 1 == self.n_steps:
                variance = variance or float((x - x.mean(dim=0)).square().sum()) or 1.0
                figures["fvu"] = figures.pop("squared_error") / variance
                fsio.append_line(pupil.folder / TRAIN_LOG, {"step": step + 1, **figures})

    @torch.no_grad()
    def _evaluate(self, step: int) -> None:
        if len(self.held_out) == 0:
            return
        for pupil in self._open():
            figures = measure_fidelity(pupil.trainee.sae, self.held_out.split(self.size))
            record = {"step": step, "held_out_fvu": figures.fvu, "held_out_l0": figures.l0_mean}
            fsio.append_line(pupil.folder / TRAIN_LOG, record)
            stopping = pupil.stopping
            if stopping.is_best(step, self._score(pupil, figures.fvu)):
                save_tensors(self._best(pupil), pupil.trainee.weights())
            elif stopping.stopped_at:
                log.info(
                    "layer %d, k %d: stopped at step %d; the score was best, %.4f, at step %d",
                    self.layer, pupil.config.k, step, stopping.best_fvu, stopping.best_step,
                )  # fmt: skip

    def _score(self, pupil: _Pupil, fvu: float | None) -> float | None:
        """Return what early stopping watches: FVU, or the loss where a penalty trades it for L0.

        While the penalty still grows, losses of different steps cannot be compared: None.
        """
        sae = pupil.trainee.sae
        if sae.uses_k:
            return fvu
        if sae.penalty_share < 1:
            return None
        losses = [float(sae.loss(x).total) * len(x) for x in self.held_out.split(self.size)]
        return sum(losses) / len(self.held_out)

    def _finish(self, pupil: _Pupil, step: int) -> None:
        stopping = pupil.stopping
        steps = stopping.stopped_at or step
        best_step = steps if stopping.best_fvu is None else stopping.best_step
        if best_step < steps:
            pupil.trainee.load_weights(load_tensors(self._best(pupil)))
        dead_share = len(pupil.trainee.dead) / pupil.config.d_sae
        where = self.split.held_out if len(self.held_out) else self.split.train
        rows = self.held_out if len(self.held_out) else self._first_rows()
        with torch.no_grad():
            pupil.trainee.sae.calibrate(rows)
        sae = pupil.trainee.sae.folded(self.scaler)
        sae.site = self.source.site(self.layer)
        sae.metadata = dict(self.metadata)
        save_sae(sae, pupil.folder, self.scaler)
        limit = max(1, self.train.validation_rows // self.size)
        batches = self.source.batches(self.layer, self.size, keep=where)
        figures = measure_fidelity(
            load_sae(pupil.folder, self.device),
            (x for _, x in zip(range(limit + 1), batches, strict=False)),
        )
        metrics = {
            "layer": self.layer,
            "site": sae.site.name,
            "arch": pupil.config.arch,
            "d_in": pupil.config.d_in,
            "d_sae": pupil.config.d_sae,
            "k": pupil.config.k,
            "measured_on": "held_out" if len(self.held_out) else "train",
            **figures.record(),
            "dead_share": dead_share,
            "steps": steps,
            "best_step": best_step,
            "n_train_rows": int(self.split.train.sum()),
            "rows_seen": steps * self.size,
        }
        fsio.commit_json(pupil.folder / METRICS, metrics)

    def _open(self) -> list[_Pupil]:
        return [pupil for pupil in self.pupils if pupil.stopping.stopped_at is None]

    def _best(self, pupil: _Pupil) -> Path:
        return best_weights(self.state, self.pupils.index(pupil))

    def _scaled_held_out(self) -> Float[Tensor, "rows d_in"]:
        rows = held_out_rows(self.source, self.layer, self.size, self.split.held_out)
        return self.scaler.apply(rows.to(self.device))

    def _first_rows(self) -> Float[Tensor, "rows d_in"]:
        keep, seed = self.split.train, epoch_seed(self.train.seed, 0)
        rows = next(self.source.batches(self.layer, self.train.validation_rows, seed, keep=keep))
        return self.scaler.apply(rows.to(self.device))

    def _save(self, step: int, place: Cursor) -> None:
        tensors = {
            f"{i}.{name}": value
            for i, pupil in enumerate(self.pupils)
            for name, value in pupil.trainee.state().items()
        }
        state = {
            "cursor": [place.epoch, place.batch],
            "stopping": [asdict(pupil.stopping) for pupil in self.pupils],
            "scaler": self.scaler.record(),
            "settings": self.settings,
        }
        save_checkpoint(self.state, Checkpoint(step, tensors, state))

    def _resume(self, found: Checkpoint) -> tuple[int, Cursor]:
        differing = differing_keys(found.state["settings"], json.loads(json.dumps(self.settings)))
        if differing:
            raise MismatchError(
                "\n".join(["the interrupted training had other settings:", *differing]),
                safe=f"Its checkpoint of step {found.step} is kept.",
                then="Use the same settings to continue it, or set run.dir to a new folder.",
            )
        self.scaler = Scaler.from_record(found.state["scaler"])
        for i, (pupil, record) in enumerate(zip(self.pupils, found.state["stopping"], strict=True)):
            prefix = f"{i}."
            pupil.trainee.restore(
                {
                    name.removeprefix(prefix): value
                    for name, value in found.tensors.items()
                    if name.startswith(prefix)
                }
            )
            for name, value in record.items():
                setattr(pupil.stopping, name, value)
        log.info("layer %d: continuing at step %d", self.layer, found.step)
        return found.step, Cursor(*found.state["cursor"])


def _name(layer: int, config: SaeConfig, several: bool) -> str:
    return f"layer_{layer}_k{config.k}_d{config.d_sae}" if several else f"layer_{layer}"


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name
