"""Training: several SAEs of a layer from one pass over its activations, resumable to the byte.

Everything a training depends on is fixed before the first step: the split, the scaler, the order
of the batches, the first weights, the backend. A checkpoint holds the rest, so an interrupted
training ends with the same bytes as one that was left alone. No random number is drawn while it
runs. What a pass does is in `training_pass.py`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saefty import fsio
from saefty.backends import FLOAT32, Backend
from saefty.checkpoints import remove_checkpoints
from saefty.errors import ConfigError
from saefty.saes.base import ARCHITECTURES, SaeConfig
from saefty.saes.section import SaeSection
from saefty.training_data import ActivationSource, split_by_example
from saefty.training_pass import METRICS, Pass
from saefty.training_settings import OptimizerSection, TrainSection

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"

__all__ = ["METRICS", "OptimizerSection", "TrainSection", "TrainedSae", "train_saes"]


@dataclass(frozen=True)
class TrainedSae:
    """A finished SAE: where it lies, and how good it is."""

    folder: Path
    layer: int
    config: SaeConfig
    metrics: dict[str, Any]


def train_saes(
    source: ActivationSource,
    sae: SaeSection,
    train: TrainSection,
    optimizer: OptimizerSection,
    folder: Path | str,
    *,
    metadata: Mapping[str, Any] | None = None,
    threads: int | None = None,
    overlap: bool = True,
) -> list[TrainedSae]:
    """Train the SAEs asked for on every layer asked for, and save each in a folder of its own.

    The folders are `layer_<i>`, or `layer_<i>_k<k>_d<d_sae>` where several SAEs share a layer, or
    `layer_<i>_<arch>_k<k>_d<d_sae>` where several architectures do. What is finished is not done
    again; what was interrupted goes on from its last checkpoint.

    Args:
        source: The activations.
        sae: Which SAEs; several values of `arch`, `k` or `expansion_factor` share one pass.
        train: How long, and what to watch.
        optimizer: How weights move.
        folder: The run's folder, which the caller has locked.
        metadata: What cfg.json should say about the model, such as `model_name`.
        threads: How many threads torch may use; None takes what an interrupted training was begun
            with, else torch's own number. It is restored afterwards.
        overlap: Read the next batch in a thread while the present one is learnt from.

    Returns:
        The SAEs, layer by layer, in the order of the configuration.

    Raises:
        ConfigError: If a layer was not extracted or an SAE cannot have the shape asked for.
        InputError: If the rows cannot be split or do not vary.
        MismatchError: If a checkpoint was made with other settings.
        NumericError: If a loss is not finite; the last checkpoint is kept.
        KeyboardInterrupt: If the command line was asked to stop; the steps taken are saved.
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
    precision = _precision(train.precision, configs)
    trained = []
    for layer in layers:
        folders = [Path(folder) / _name(layer, config, configs) for config in configs]
        state = Path(folder) / CHECKPOINTS / f"layer_{layer}"
        if not all((path / METRICS).is_file() for path in folders):
            backend = Backend.choose(Path(folder), train.device, threads, precision)
            with backend.in_use():
                Pass(
                    source, layer, sae, train, optimizer, split, folders, state, backend,
                    metadata or {}, overlap=overlap,
                ).run()  # fmt: skip
        remove_checkpoints(state)
        trained += [
            TrainedSae(path, layer, config, fsio.read_json(path / METRICS))
            for path, config in zip(folders, configs, strict=True)
        ]
    return trained


def _name(layer: int, config: SaeConfig, configs: list[SaeConfig]) -> str:
    if len(configs) == 1:
        return f"layer_{layer}"
    arch = f"_{config.arch}" if len({one.arch for one in configs}) > 1 else ""
    return f"layer_{layer}{arch}_k{config.k}_d{config.d_sae}"


def _precision(wanted: str, configs: Sequence[SaeConfig]) -> str:
    """Return in which precision latents are proposed, and say where another one is asked for."""
    exact = sorted({one.arch for one in configs if not ARCHITECTURES[one.arch].uses_k})
    if wanted == FLOAT32 or not exact:
        return wanted
    log.warning(
        "train.precision=%s acts where the k largest latents are selected: %s learns in float32",
        wanted, ", ".join(exact),
    )  # fmt: skip
    return wanted if any(ARCHITECTURES[one.arch].uses_k for one in configs) else FLOAT32
