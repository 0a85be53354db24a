"""Sick SAEs, each with one fault planted as it comes about, and healthy ones beside them.

All patients of a seed come from one reading of the sandbox's model and a few short trainings, which
are kept in the folder and shared. A fault is planted where it arises: in the training's settings,
in the SAE's files, in the rows of a store or in the matrices of a dump, by NumPy alone. Nothing
here shares code with the experiments that are to find it. Sick SAEs come without a record of their
figures, unless it is asked for.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

import saefty as sf
from saefty.diagnosis import finding
from saefty.records import Example
from saefty.sandbox.language_model import MODEL_FOLDER
from saefty.sandbox.world import World
from saefty.stores.activations import KIND, ActivationStore, commit_activations
from saefty.stores.base import EXAMPLES, MANIFEST, RECORDS, StoreWriter

LAYER, WIDTH, TEXTS, STEPS = 1, 256, 600, 400
WEIGHTS, CFG = "sae_weights.safetensors", "cfg.json"
QUICK = {"batch_size": 256, "loss_recovered_examples": 0, "validation": 0.25, "max_steps": STEPS}
CHUNK, CHUNKS = 1500, 2  # tokens of a dump, and how many chunks of them
TRAININGS: dict[str, dict] = {
    "relu": {"arch": "relu", "options": {"l1": 3.0}},
    "topk": {"arch": "topk", "k": 12},
    "jumprelu": {"arch": "jumprelu"},
    "weak": {"arch": "relu", "options": {"l1": 0.003}},
    "standardised": {"arch": "jumprelu", "normalize": "per_dimension"},
}


@dataclass(frozen=True)
class Patient:
    """What is shown to the doctor, and what it may answer.

    Attributes:
        name: The fault, or the name of a healthy one.
        sae: The SAE's folder.
        store: A store of activations.
        model: The model's folder, where the rows are those of a model.
        dump: A folder of codes as they were kept.
        layer: The layer of the store that the SAE is read at.
        accepted: Which causes are right; none for a healthy one.
        sound: The SAE, the store and its layer as they would be without the fault; None where only
            another training mends it.
    """

    name: str
    sae: Path | None
    store: Path | None
    model: Path | None
    dump: Path | None
    layer: int
    accepted: tuple[str, ...]
    sound: tuple[Path, Path, int] | None


def build(patient: str, folder: Path, seed: int = 0, *, with_record: bool = False) -> Patient:
    """Plant a fault, or show a healthy SAE.

    Args:
        patient: One of `SICK`, `HEALTHY` or `FURTHER`.
        folder: Where everything lies; what another patient has made there already is used.
        seed: Of the texts and of the trainings.
        with_record: Leave the figures of the training beside the SAE.
    """
    name = f"{patient} recorded" if with_record else patient
    return PATIENTS[patient](fresh_ward(folder, seed, name, with_record), patient)


def fresh_ward(folder: Path, seed: int, name: str, with_record: bool = False) -> "Ward":
    """Return the ward of a seed with an empty bed for a patient."""
    home = folder / f"seed_{seed}"
    bed = home / "patients" / name.replace(" ", "_")
    if bed.exists():
        shutil.rmtree(bed)
    return Ward(home, seed, bed, with_record)


class Ward:
    """What patients of a seed share, each made when it is first asked for."""

    def __init__(self, home: Path, seed: int, bed: Path, with_record: bool) -> None:
        self.home, self.seed, self.bed, self._with_record = home, seed, bed, with_record
        bed.mkdir(parents=True)

    def store(self, name: str = "post") -> ActivationStore:
        """Return activations: `post` of four blocks, `pre` of two, `all` with special tokens."""
        folder = self.home / name
        if not (folder / MANIFEST).exists():
            layers, keys = STORES[name]
            documents = World(0).documents(TEXTS, seed=100 + self.seed)
            examples = [Example(f"{i}", one.text, raw=True) for i, one in enumerate(documents)]
            sf.extract(sf.load_model(str(MODEL_FOLDER)), examples, layers, folder, **keys)
        return ActivationStore(folder)

    def trained(self, name: str, store: ActivationStore | None = None) -> Path:
        """Return the folder of an SAE of block 1, trained on good rows or on others."""
        folder = self.home / f"sae_{name}"
        if not (folder / f"layer_{LAYER}" / CFG).exists():
            keys = dict(TRAININGS[name])
            optimizer = {"lr": 3e-3, **keys.pop("optimizer", {})}
            train = {**QUICK, "seed": self.seed}
            sf.train(
                store or self.store(), folder, layer=LAYER, d_sae=WIDTH, train=train,
                optimizer=optimizer, **keys,
            )  # fmt: skip
        return folder / f"layer_{LAYER}"

    def copy(self, source: Path) -> "Files":
        """Return a copy of an SAE's folder whose files may be rewritten."""
        return Files(source, self.bed / "sae", self._with_record)

    def derived(
        self, change: Callable[[np.ndarray], np.ndarray], dtype: torch.dtype = torch.float32
    ) -> Path:
        """Return a store whose rows are changed, as another model or another script gives them."""
        return derived_store(self.store(), self.bed / "acts", change, dtype)

    def patient(self, name: str, sae: Path, accepted: tuple[str, ...] = (), **keys) -> Patient:
        facts = {
            "store": self.store().folder, "model": MODEL_FOLDER, "dump": None, "layer": LAYER,
            "sound": None, **keys,
        }  # fmt: skip
        return Patient(name, sae, accepted=accepted, **facts)


STORES: dict[str, tuple[list[int], dict]] = {
    "post": ([0, 1, 2, 3], {}),
    "pre": ([1, 2], {"hook_point": "resid_pre"}),
    "all": ([LAYER], {"tokens": "all"}),
}


class Files:
    """A copy of an SAE's folder: its weights in float64 and its settings."""

    def __init__(self, source: Path, folder: Path, with_record: bool) -> None:
        left = ["checksums.json", "scaler.json", *([] if with_record else ["metrics.json"])]
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*left))
        self.path = folder
        self.w = {k: v.astype(np.float64) for k, v in load_file(folder / WEIGHTS).items()}
        self.cfg = json.loads((folder / CFG).read_text())

    def write(self) -> Path:
        save_file({k: v.astype(np.float32) for k, v in self.w.items()}, self.path / WEIGHTS)
        (self.path / CFG).write_text(json.dumps(self.cfg))
        return self.path

    def reading(self, scale: np.ndarray | float = 1.0, shift: np.ndarray | float = 0.0) -> None:
        """Let the weights read and write `scale` x + shift instead of x."""
        scale, shift = (value * np.ones(len(self.w["W_enc"])) for value in (scale, shift))
        self.w["W_enc"] = self.w["W_enc"] / scale[:, None]
        self.w["b_enc"] = self.w["b_enc"] - shift @ self.w["W_enc"]
        self.w["W_dec"] = self.w["W_dec"] * scale
        self.w["b_dec"] = self.w["b_dec"] * scale + shift

    def latents_times(self, factor: float) -> None:
        """Multiply the latents; what they decode to stays."""
        for name in ("W_enc", "b_enc", "threshold"):
            if name in self.w:
                self.w[name] = self.w[name] * factor
        self.w["W_dec"] = self.w["W_dec"] / factor

    def latents(self, x: np.ndarray) -> np.ndarray:
        """Return the codes of raw activations."""
        return activated(self.w, self.cfg, x @ self.w["W_enc"] + self.w["b_enc"])


def activated(w: dict[str, np.ndarray], cfg: dict, pre: np.ndarray) -> np.ndarray:
    """Return the codes of pre-activations, for the three architectures in use here."""
    z = np.maximum(pre, 0)
    if "threshold" in w:
        return z * (pre > w["threshold"])
    if cfg["architecture"] == "topk":
        least = np.partition(pre, -cfg["k"], axis=1)[:, -cfg["k"], None]
        return z * (pre >= least)
    return z


def rows_of(store: ActivationStore, layer: int = LAYER) -> np.ndarray:
    """Return all rows of a layer, float64."""
    return np.concatenate([x.numpy() for x in store.batches(layer, 4096)]).astype(np.float64)


def read_by(sae: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what a saved SAE makes of rows: its codes and its reconstruction."""
    w = {k: v.astype(np.float64) for k, v in load_file(sae / WEIGHTS).items()}
    cfg = json.loads((sae / CFG).read_text())
    z = activated(w, cfg, x @ w["W_enc"] + w["b_enc"])
    return z, z @ w["W_dec"] + w["b_dec"]


def derived_store(
    source: ActivationStore, folder: Path, change: Callable[[np.ndarray], np.ndarray],
    dtype: torch.dtype = torch.float32,
) -> Path:  # fmt: skip
    """Write a copy of a store whose rows are changed, every layer's alike."""
    left = ("layer_*", RECORDS, MANIFEST, "rows")
    shutil.copytree(source.folder, folder, ignore=shutil.ignore_patterns(*left))
    writer = StoreWriter(folder, KIND, f"{source.manifest['fingerprint']} changed")
    table, first, records = source.rows(), 0, []
    for piece, record in enumerate(source.pieces):
        here = slice(first, first + record["rows"])
        first = here.stop
        layers = {
            layer: torch.from_numpy(change(source.shard(layer, piece).double().numpy())).to(dtype)
            for layer in source.layers
        }
        rows = {name: column[here] for name, column in table.items()}
        records.append(commit_activations(writer, piece, layers, rows, {"masked": {}}))
    kept = ("layers", "sites", "d_in", "pooling", "model_name", "n_rows", "masked", "failed")
    facts = {name: source.manifest[name] for name in kept}
    facts["dtype"] = str(dtype).removeprefix("torch.")
    writer.finish(records, facts, [EXAMPLES])
    return folder


def write_dump(folder: Path, matrices: list[np.ndarray], layer: int = LAYER) -> Path:
    """Save matrices as a script does that takes each for [tokens, latents]."""
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps({"SAE_D_FEAT": matrices[0].shape[1]}))
    total = 0
    for number, matrix in enumerate(matrices):
        total += len(matrix)
        held = {"sae_feats": torch.from_numpy(matrix.copy()), "total_tokens_so_far": total}
        torch.save(held, folder / f"sae_feats_layer{layer}_chunk{number:05d}.pt")
    return folder


def chunked(matrix: np.ndarray) -> list[np.ndarray]:
    """Cut a matrix into chunks of rows."""
    return [matrix[first : first + CHUNK] for first in range(0, len(matrix), CHUNK)]


def _healthy(ward, name):
    return ward.patient(name, ward.copy(ward.trained(name)).write())


def _weak(ward, name):
    sae = ward.copy(ward.trained("weak")).write()
    return ward.patient(name, sae, (finding.WEAK_SPARSITY,))


def _bias(ward, name):
    source = ward.trained("relu")
    sae = ward.copy(source)
    size = (rows_of(ward.store()) @ sae.w["W_enc"]).std()
    sae.w["b_enc"] = sae.w["b_enc"] + 1.5 * size
    sound = (source, ward.store().folder, LAYER)
    return ward.patient(name, sae.write(), (finding.ENCODER_BIAS,), sound=sound)


def _uncentred(ward, name):
    # A model with a few large dimensions of constant value, as many have; the SAE was trained on
    # rows less their mean, and the mean was lost.
    x = rows_of(ward.store())
    large = np.zeros(x.shape[1])
    rng = np.random.default_rng([ward.seed, 1])
    large[rng.permutation(len(large))[:8]] = rng.choice([-1, 1], 8) * 12 * x.std()
    source = ward.trained("jumprelu")
    sound = ward.copy(source)
    sound.reading(shift=large)
    shutil.copytree(sound.write(), ward.bed / "sound")
    sick = sound
    sick.reading(shift=-(x.mean(axis=0) + large))
    store = ward.derived(lambda rows: rows + large)
    return ward.patient(
        name, sick.write(), (finding.INPUT_OFFSET,), store=store, model=None,
        sound=(ward.bed / "sound", store, LAYER),
    )  # fmt: skip


def _scale(ward, name):
    source = ward.trained("jumprelu")
    sae = ward.copy(source)
    sae.reading(0.1)  # what it reads is a tenth of what it is given
    sound = (source, ward.store().folder, LAYER)
    return ward.patient(name, sae.write(), (finding.SCALE,), sound=sound)


def _standardised(ward, name):
    source = ward.trained("standardised")
    scaler = json.loads((source / "scaler.json").read_text())
    mean, scale = np.array(scaler["mean"]), np.array(scaler["scale"])
    sae = ward.copy(source)
    sae.reading(1 / scale, -mean / scale)
    sound = (source, ward.store().folder, LAYER)
    return ward.patient(name, sae.write(), (finding.STANDARDISATION,), sound=sound)


def _wrong_layer(ward, name):
    source = ward.trained("jumprelu")
    sae = ward.copy(source)
    sae.cfg["metadata"]["hook_name"] = f"blocks.{LAYER + 1}.hook_resid_post"
    sound = (source, ward.store().folder, LAYER)
    return ward.patient(
        name, sae.write(), (finding.WRONG_TENSOR,), layer=LAYER + 1, sound=sound
    )  # fmt: skip


def _pre_for_post(ward, name):
    source = ward.trained("jumprelu")
    sae = ward.copy(source)
    sae.cfg["metadata"]["hook_name"] = f"blocks.{LAYER}.hook_resid_pre"
    return ward.patient(
        name, sae.write(), (finding.WRONG_TENSOR,), store=ward.store("pre").folder,
        sound=(source, ward.store().folder, LAYER),
    )  # fmt: skip


def _axes_swapped(ward, name):
    source = ward.trained("relu")
    sae = ward.copy(source)
    z = sae.latents(rows_of(ward.store())[: CHUNKS * CHUNK]).astype(np.float32)
    dump = write_dump(ward.bed / "dump", [part.T for part in chunked(z)])
    return ward.patient(name, sae.write(), (finding.AXES_SWAPPED,), dump=dump)


def _reconstruction(ward, name):
    source = ward.trained("topk")
    sae = ward.copy(source)
    z = sae.latents(rows_of(ward.store())[: CHUNKS * CHUNK])
    x_hat = (z @ sae.w["W_dec"] + sae.w["b_dec"]).astype(np.float32)
    dump = write_dump(ward.bed / "dump", chunked(x_hat))
    return ward.patient(name, sae.write(), (finding.RECONSTRUCTION,), dump=dump)


def _bos(ward, name):
    source = ward.trained("topk")
    return ward.patient(
        name, ward.copy(source).write(), (finding.SPECIAL_TOKENS,),
        store=ward.store("all").folder, sound=(source, ward.store().folder, LAYER),
    )  # fmt: skip


def _half_dead(ward, name):
    sae = ward.copy(ward.trained("topk"))
    dead = np.arange(len(sae.w["b_enc"])) % 5 < 3
    sae.w["W_enc"][:, dead] = 0.0
    sae.w["b_enc"][dead] = 0.0
    return ward.patient(name, sae.write(), (finding.DEAD_LATENTS,))


def _overflow(ward, name):
    # A model with a louder residual stream, whose codes were kept in float16.
    sae = ward.copy(ward.trained("relu"))
    sae.latents_times(16.0)
    sae.reading(16.0)
    store = ward.derived(lambda rows: 16 * rows)
    with np.errstate(over="ignore"):
        z = sae.latents(16 * rows_of(ward.store())[: CHUNKS * CHUNK]).astype(np.float16)
    dump = write_dump(ward.bed / "dump", chunked(z))
    return ward.patient(
        name, sae.write(), (finding.OVERFLOW,), store=store, model=None, dump=dump
    )  # fmt: skip


def _saturated(ward, name):
    # Activations kept in float16, cut off at its largest number, as several models do it.
    sae = ward.copy(ward.trained("topk"))
    sae.reading(32.0)
    store = ward.derived(lambda rows: np.clip(32 * rows, -65504, 65504), torch.float16)
    return ward.patient(name, sae.write(), (finding.OVERFLOW,), store=store, model=None)


PATIENTS: dict[str, Callable[[Ward, str], Patient]] = {
    "weak L1": _weak,
    "positive encoder bias": _bias,
    "uncentred input": _uncentred,
    "scale 10x off": _scale,
    "raw instead of standardised": _standardised,
    "wrong layer": _wrong_layer,
    "pre for post": _pre_for_post,
    "axes swapped": _axes_swapped,
    "reconstruction instead of codes": _reconstruction,
    "BOS included": _bos,
    "half dead": _half_dead,
    "fp16 overflow": _overflow,
    "relu": _healthy,
    "topk": _healthy,
    "jumprelu": _healthy,
    "fp16 activations cut off": _saturated,
}
SICK = tuple(PATIENTS)[:12]
HEALTHY = tuple(PATIENTS)[12:15]
FURTHER = tuple(PATIENTS)[15:]
