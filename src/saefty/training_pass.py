"""One pass over a layer's activations that trains several SAEs, from a checkpoint or the start.

A checkpoint holds weights, optimiser, dead counters, early stopping and the place in the stream,
and whether the measurement that is due at its step has been made. A signal lets the step under way
end; a checkpoint is saved before the training stops.
"""

import json
import logging
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saefty import fsio
from saefty.backends import BFLOAT16, Backend
from saefty.checkpoints import (
    Checkpoint,
    best_weights,
    latest_checkpoint,
    load_tensors,
    save_checkpoint,
    save_tensors,
    trim_journal,
)
from saefty.config import config_tree, differing_keys
from saefty.errors import MismatchError, NumericError
from saefty.fidelity import measure_fidelity
from saefty.interrupts import postponed
from saefty.log import progress
from saefty.optimisation import EarlyStopping, Trainee
from saefty.saes.base import SaeConfig
from saefty.saes.native import load_sae, save_sae
from saefty.saes.scaler import Scaler, fit_scaler
from saefty.saes.section import SaeSection
from saefty.training_data import (
    ActivationSource,
    Cursor,
    Split,
    describe_batch,
    epoch_seed,
    held_out_rows,
    stream,
)
from saefty.training_settings import OptimizerSection, TrainSection

log = logging.getLogger(__name__)

METRICS, TRAIN_LOG = "metrics.json", "train_log.jsonl"
MEASURED = "held_out_fvu"
"""What marks a line of the log as a measurement."""
SCALER_ROWS = 1_000_000
MAX_DEAD_ROWS = 10_000_000


@dataclass(frozen=True)
class _Pupil:
    """One SAE of the pass."""

    trainee: Trainee
    config: SaeConfig
    folder: Path
    stopping: EarlyStopping


class Pass:
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
        backend: Backend,
        metadata: Mapping[str, Any],
        *,
        overlap: bool,
    ) -> None:
        self.source, self.layer, self.train, self.split = source, layer, train, split
        self.overlap = overlap
        self.state, self.backend, self.metadata = state, backend, metadata
        self.normalize = sae.normalize
        self.device = backend.device
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
                    kernels=backend.kernels,
                    rough=backend.precision == BFLOAT16,
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
        }

    def run(self) -> None:
        """Train from the last checkpoint, or from the start, to the end."""
        found = latest_checkpoint(self.state)
        done, place, measured = self._resume(found) if found else (0, self._begin(), True)
        for pupil in self.pupils:
            trim_journal(
                pupil.folder / TRAIN_LOG,
                lambda line: line["step"] < done + (measured or MEASURED not in line),
            )
        self.held_out = self._scaled_held_out()
        bar = progress(f"training layer {self.layer}", self.n_steps, "steps", done=done)
        with bar as self.bar, postponed() as self.interruption:
            step = self._steps(done, place, measured)
        for pupil in self.pupils:
            self._finish(pupil, step)

    def _steps(self, done: int, place: Cursor, measured: bool) -> int:
        """Take the steps that are left; return how many were taken in all."""
        if not measured:
            self._evaluate(done, place)
        with closing(self._stream(place)) as batches:
            step, place = self._learn_from(batches, done, place)
        self._save(step, place)  # what follows may be interrupted too
        return step

    def _stream(self, place: Cursor) -> Generator[tuple[Cursor, Tensor], None, None]:
        return stream(
            self.source, self.layer, self.size, self.train.seed, self.split.train, place,
            device=self.device, ahead=self.overlap,
        )  # fmt: skip

    def _learn_from(
        self, batches: Iterator[tuple[Cursor, Tensor]], done: int, place: Cursor
    ) -> tuple[int, Cursor]:
        """Take steps to the end; return how many were taken in all, and the batch after them."""
        step, began = done, time.monotonic()
        while step < self.n_steps and self._open():
            place, x = next(batches)
            x = self.scaler.apply(x)  # the batch as it was read is not held meanwhile
            self._learn(x, step, place)
            step, place = step + 1, place.next
            self.bar.advance()
            due = step % self.train.eval_every == 0 or step == self.n_steps
            self._stop_if_asked(step, place, measured=not due)
            if due:
                self._evaluate(step, place)
                rate = (step - done) * self.size
                log.info(
                    "layer %d: step %d of %d, %.0f rows/s",
                    self.layer, step, self.n_steps, rate / (time.monotonic() - began),
                )  # fmt: skip
            if step % self.train.checkpoint_every == 0 and step < self.n_steps:
                self._save(step, place)
        return step, place

    def _stop_if_asked(self, step: int, place: Cursor, *, measured: bool) -> None:
        if self.interruption.came:
            self._save(step, place, measured=measured)
            log.info("layer %d: the state after step %d is saved", self.layer, step)
            self.interruption.check()

    def _begin(self) -> Cursor:
        last = Cursor(0, max(1, SCALER_ROWS // self.size))
        with closing(self._stream(Cursor())) as rows:
            first_epoch = takewhile(lambda item: item[0] < last, rows)
            self.scaler = fit_scaler((x for _, x in first_epoch), self.normalize)
        with closing(self._stream(Cursor())) as rows:
            _, x = next(rows)
        x = self.scaler.apply(x)
        for pupil in self.pupils:
            pupil.trainee.start(x, epoch_seed(self.train.seed, self.layer))
        return Cursor()

    def _learn(self, x: Float[Tensor, "rows d_in"], step: int, place: Cursor) -> None:
        variance = 0.0
        for pupil in self._open():
            try:
                figures = pupil.trainee.step(x, step)
            except NumericError as error:
                named = describe_batch(
                    self.source, x, self.size, self.train.seed, self.split.train, place
                )
                where = f"layer {self.layer}, {pupil.config}, step {step + 1}"
                raise self._diverged(f"{where}: {error.message} {named}") from None
            if (step + 1) % self.train.log_every == 0 or step + 1 == self.n_steps:
                variance = variance or float((x - x.mean(dim=0)).square().sum()) or 1.0
                figures["fvu"] = figures.pop("squared_error") / variance
                fsio.append_line(pupil.folder / TRAIN_LOG, {"step": step + 1, **figures})

    def _diverged(self, message: str) -> NumericError:
        found = latest_checkpoint(self.state)
        return NumericError(
            message,
            safe=f"The checkpoint of step {found.step} is kept." if found else "",
            then="If these rows are far out, leave them out of the store. Else lower optimizer.lr "
            "or set train.grad_clip. Either way set run.dir to a new folder.",
        )

    @torch.no_grad()
    def _evaluate(self, step: int, place: Cursor) -> None:
        """Measure on the held-out rows, and only then take note: a signal leaves no half of it."""
        if len(self.held_out) == 0:
            return
        pupils, measured = self._open(), []
        for pupil in pupils:
            figures = measure_fidelity(pupil.trainee.sae, self._parts(step, place))
            measured.append((figures, self._score(pupil, figures.fvu, step, place)))
        for pupil, (figures, score) in zip(pupils, measured, strict=True):
            record = {"step": step, MEASURED: figures.fvu, "held_out_l0": figures.l0_mean}
            fsio.append_line(pupil.folder / TRAIN_LOG, record)
            stopping = pupil.stopping
            if stopping.is_best(step, score):
                save_tensors(self._best(pupil), pupil.trainee.weights())
            elif stopping.stopped_at:
                log.info(
                    "layer %d, %s: stopped at step %d; the score was best, %.4f, at step %d",
                    self.layer, pupil.config, step, stopping.best_fvu, stopping.best_step,
                )  # fmt: skip

    def _parts(self, step: int, place: Cursor) -> Iterator[Float[Tensor, "rows d_in"]]:
        """Yield the held-out rows a batch at a time, unless a signal asks to stop."""
        for part in self.held_out.split(self.size):
            self._stop_if_asked(step, place, measured=False)
            yield part

    def _score(self, pupil: _Pupil, fvu: float | None, step: int, place: Cursor) -> float | None:
        """Return what early stopping watches: FVU, or the loss where a penalty trades it for L0.

        While the penalty still grows, losses of different steps cannot be compared: None.
        """
        sae = pupil.trainee.sae
        if sae.uses_k:
            return fvu
        if sae.penalty_share < 1:
            return None
        losses = [float(sae.loss(x).total) * len(x) for x in self._parts(step, place)]
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
            "k": pupil.config.k if sae.uses_k else None,
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

    def _save(self, step: int, place: Cursor, *, measured: bool = True) -> None:
        tensors = {
            f"{i}.{name}": value
            for i, pupil in enumerate(self.pupils)
            for name, value in pupil.trainee.state().items()
        }
        for name, value in tensors.items():
            if not bool(torch.isfinite(value).all()):
                raise self._diverged(f"layer {self.layer}, step {step}: {name} is not finite.")
        state = {
            "cursor": [place.epoch, place.batch],
            "measured": measured,
            "stopping": [asdict(pupil.stopping) for pupil in self.pupils],
            "scaler": self.scaler.record(),
            "settings": self.settings,
        }
        self.backend.note(self.state.parents[1])
        save_checkpoint(self.state, Checkpoint(step, tensors, state))

    def _resume(self, found: Checkpoint) -> tuple[int, Cursor, bool]:
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
            pupil.trainee.sae.schedule(found.step - 1, self.n_steps)  # the score depends on it
        log.info("layer %d: continuing at step %d", self.layer, found.step)
        return found.step, Cursor(*found.state["cursor"]), found.state["measured"]
