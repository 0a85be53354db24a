"""A checkpoint on disk or on the hub: what it is, whether it can be used, and how it is read.

Nothing in a checkpoint is executed: no remote code, no pickled weights. Weights that the
architecture needs and the files lack are an error, where transformers would fill them at random.
"""

import importlib.util
import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
import transformers
from pydantic import model_validator

from saefty.config import Config
from saefty.errors import (
    ConfigError,
    InputError,
    IntegrityError,
    MismatchError,
    MissingExtraError,
    UnsafeArtifactError,
)
from saefty.fsio import digest
from saefty.records import Site

log = logging.getLogger(__name__)

CHECK_NAME = (
    "Check model.name and model.revision; for a gated model set HF_TOKEN, without a network give a "
    "folder."
)
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt",
)  # fmt: skip


class ModelSection(Config):
    """Which model to run, and how."""

    name: str
    """A folder with a Hugging Face checkpoint, or the id of one on the hub."""

    revision: str | None = None
    """Branch, tag or commit of a hub checkpoint; None takes its main branch."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of weights and activations; `auto` is the checkpoint's own, but float32 for a
    float16 checkpoint on the CPU, which has no float16 arithmetic of its own."""

    device: str = "auto"
    """`auto` (cuda, else mps, else cpu), `cpu`, `cuda`, `cuda:1`, `mps`."""

    attn: str = "auto"
    """Attention implementation, such as `eager` or `sdpa`; `auto` leaves it to transformers."""

    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    """How accelerate spreads the blocks over several GPUs and, where they do not fit, the CPU: in
    place of `device`. Needs saefty[device-map]. None puts the whole model on `device`."""

    @model_validator(mode="after")
    def _one_placement(self) -> "ModelSection":
        if self.device_map and self.device != "auto":
            raise ValueError(
                f"model.device={self.device} and model.device_map={self.device_map} are both set; "
                "one says where the whole model goes, the other spreads it: give one of them"
            )
        return self


@dataclass(frozen=True)
class ModelInfo:
    """What a checkpoint's config.json says, known before any weight is read."""

    name: str
    revision: str | None
    """The hub's commit; None for a folder."""
    family: str
    """transformers' model type, such as `gemma2`."""
    architecture: str
    n_layers: int
    d_model: int
    max_length: int
    vocab_size: int

    def check_sites(self, sites: Sequence[Site]) -> None:
        """Refuse layers that the model does not have, and sites asked for twice.

        Raises:
            ConfigError: If a layer is out of range, a site occurs twice, or is given as something
                else than a `Site`.
        """
        for site in sites:
            if not isinstance(site, Site):
                raise ConfigError(
                    f"a place in a model is a Site, not {site!r}.",
                    then='Write sf.Site(20) for what leaves block 20, sf.Site(20, "mlp_out") for '
                    'another part, or Site.parse("blocks.20.hook_resid_post").',
                )
            if not 0 <= site.layer < self.n_layers:
                raise ConfigError(
                    f"layer {site.layer} was asked for, but {self.name} has {self.n_layers} "
                    f"blocks: layers run 0..{self.n_layers - 1}.",
                    then="Name layers in that range (extract.layers, steer.layer).",
                )
        if len(set(sites)) < len(sites):
            twice = next(site for site in sites if list(sites).count(site) > 1)
            raise ConfigError(
                f"{twice} was asked for {list(sites).count(twice)} times.",
                then="Name each layer once in extract.layers.",
            )


def local_folder(name: str) -> Path | None:
    """Return the folder a model's name means, or None if it can only be a hub id.

    Raises:
        InputError: If the name is spelled as a path but there is no such folder, or the folder
            holds no model or no tokenizer.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise InputError(
                f"model.name={name} is a file, and a model is a folder.",
                then="Set model.name to the folder that save_pretrained wrote, with config.json, "
                f"tokenizer and *.safetensors; the file lies in {folder.absolute().parent}.",
            )
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
            raise InputError(
                f"the model folder {name} does not exist (looked in {folder.absolute()}).",
                then="Set model.name to a folder with config.json, or to a hub id such as "
                "google/gemma-2-2b-it.",
            )
        return None
    held = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(held[:8]) or "nothing"
    if "config.json" not in held:
        raise InputError(
            f"the folder {name} has no config.json; it holds {shown}.",
            then="Set model.name to the folder that save_pretrained wrote.",
        )
    if not set(TOKENIZER_FILES) & set(held):
        raise InputError(
            f"the model folder {name} has no tokenizer; it holds {shown}.",
            then="Write it there with tokenizer.save_pretrained(folder).",
        )
    return folder


def read_config(name: str, revision: str | None) -> tuple[Any, ModelInfo]:
    """Return transformers' configuration of a checkpoint, and our short form of it.

    Raises:
        InputError: If there is no such checkpoint, or a folder has no tokenizer.
        MismatchError: If the configuration does not describe a stack of blocks.
    """
    folder = local_folder(name)
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder or name, revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(unreadable(name, "config.json", error), then=CHECK_NAME) from error
    text = config.get_text_config()
    n_layers = getattr(text, "num_hidden_layers", None)
    if n_layers is None:
        raise MismatchError(
            f"{name} (model type {config.model_type}) does not say how many blocks it has.",
            then="Set model.name to a causal language model.",
        )
    info = ModelInfo(
        name=name,
        revision=getattr(config, "_commit_hash", None),
        family=config.model_type,
        architecture=(config.architectures or [type(config).__name__])[0],
        n_layers=n_layers,
        d_model=text.hidden_size,
        max_length=getattr(text, "max_position_embeddings", None) or 2**31 - 1,
        vocab_size=text.vocab_size,
    )
    return config, info


def unreadable(name: str, what: str, error: Exception) -> str:
    """Return the message for a checkpoint that transformers could not read."""
    reason = str(error).strip().splitlines() or [type(error).__name__]
    where = "" if Path(name).is_dir() else " (neither a folder here nor readable on the hub)"
    return f"cannot read {what} of the model {name}{where}: {reason[0]}"


def choose_device(wanted: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.

    Raises:
        ConfigError: If there is no such device here.
    """
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, number = wanted.partition(":")
    count = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }.get(kind)
    if count is None or (number and not number.isdecimal()) or int(number or 0) >= count:
        here = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        here += ["mps"] * torch.backends.mps.is_available()
        raise ConfigError(
            f"model.device is {wanted!r}, but the devices here are: {', '.join(['cpu', *here])}.",
            then="Set model.device to one of them, or to auto.",
        )
    return torch.device(wanted)


def load_tokenizer(section: ModelSection) -> Any:
    """Return the checkpoint's own tokenizer.

    Raises:
        InputError: If it has none that can be read.
    """
    source = local_folder(section.name) or section.name
    try:
        return transformers.AutoTokenizer.from_pretrained(
            source, revision=section.revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            unreadable(section.name, "the tokenizer", error), then=CHECK_NAME
        ) from error


def load_weights(section: ModelSection, auto_class: Any, **arguments: Any) -> Any:
    """Return the checkpoint's model, ready to be read: on its device, without gradients.

    Args:
        section: Which model, and how to run it.
        auto_class: transformers' class for the kind of model, such as `AutoModelForCausalLM`.
        **arguments: For the constructor of the model's own class.

    Raises:
        ConfigError: If the device or the attention implementation cannot be used.
        InputError: If the weights cannot be read or are not complete.
        IntegrityError: If a weight file is damaged.
        MismatchError: If the weights have other shapes than config.json says.
        MissingExtraError: If `device_map` is set and accelerate is not installed.
        UnsafeArtifactError: If the weights are pickled.
    """
    folder = local_folder(section.name)
    if folder is not None and not any(folder.glob("*.safetensors")):
        _refuse_without_safetensors(folder)
    if section.device_map and importlib.util.find_spec("accelerate") is None:
        raise MissingExtraError(
            f"model.device_map={section.device_map} needs the package accelerate.",
            then="Run pip install 'saefty[device-map]', or set model.device in its place.",
        )
    device = choose_device(section.device)
    options: dict[str, Any] = {"device_map": section.device_map} if section.device_map else {}
    if section.attn != "auto":
        options["attn_implementation"] = section.attn
    try:
        model, report = auto_class.from_pretrained(
            folder or section.name,
            revision=section.revision,
            dtype=section.dtype,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, with the names
            output_loading_info=True,
            **options,
            **arguments,
        )
    except safetensors.SafetensorError as error:
        raise IntegrityError(
            f"a weight file of the model {section.name} is damaged: {error}",
            then="Copy or download the model again.",
        ) from error
    except (ValueError, ImportError) as error:
        if section.attn == "auto":
            raise InputError(
                unreadable(section.name, "the weights", error), then=CHECK_NAME
            ) from error
        raise ConfigError(
            f"model.attn={section.attn} cannot be used with {section.name}: {error}",
            then="Set model.attn to auto, eager or sdpa.",
        ) from error
    except OSError as error:
        raise InputError(unreadable(section.name, "the weights", error), then=CHECK_NAME) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"the weights of {section.name} are not complete: {len(missing)} tensors are missing, "
            f"among them {', '.join(missing[:3])}.",
            then="Copy or download the model again, or save it with its language-model head.",
        )
    misfits = sorted(report["mismatched_keys"])
    if misfits:
        name, found, wanted = misfits[0]
        raise MismatchError(
            f"the weights of {section.name} do not fit its config.json: {name} is {list(found)}, "
            f"but should be {list(wanted)} ({len(misfits)} tensors in all).",
            then="Copy the config.json that belongs to the weights.",
        )
    if not section.device_map:
        model = model.to(device)
    on_cpu = all(weight.device.type == "cpu" for weight in model.parameters())
    if section.dtype == "auto" and model.dtype == torch.float16 and on_cpu:
        log.info("the float16 weights of %s are read as float32 on the CPU", section.name)
        model = model.float()
    return model.eval().requires_grad_(False)


def input_device(model: Any) -> torch.device:
    """Return where a model's inputs go: to its embeddings, or to where accelerate runs them.

    Weights that accelerate keeps in main memory or on disk until they are used have no device.
    """
    embedding = model.get_input_embeddings()
    outer = getattr(embedding, "_hf_hook", None)
    for hook in getattr(outer, "hooks", [outer]):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return embedding.weight.device


def describe(section: ModelSection, info: ModelInfo, model: Any) -> dict[str, Any]:
    """Return what must be known to run the same model again, as JSON values.

    A folder's files are named with their digests, a hub checkpoint by its commit. A model that is
    spread over devices says where each part lies.
    """
    folder = local_folder(section.name)
    kinds = ("*.safetensors", "*.json", "*.jinja")
    files = sorted(path for kind in kinds for path in folder.glob(kind)) if folder else []
    spread = {name: str(where) for name, where in getattr(model, "hf_device_map", {}).items()}
    return {
        "name": section.name,
        "revision": info.revision,
        "files": {path.name: digest(path) for path in files},
        "family": info.family,
        "architecture": info.architecture,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(input_device(model)),
        **({"device_map": spread} if spread else {}),
        "attn": getattr(model.config.get_text_config(), "_attn_implementation", None),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _refuse_without_safetensors(folder: Path) -> None:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt*") for path in folder.glob(pattern))
    if pickled:
        raise UnsafeArtifactError(
            f"the weights in {folder} are pickled ({pickled[0]}); reading them could run code.",
            then="Convert them once, where you trust them, with save_pretrained(folder), which "
            "writes safetensors.",
        )
    raise InputError(
        f"the model folder {folder} has no weights (*.safetensors).",
        then="Write them there with model.save_pretrained(folder).",
    )
