"""The model that a guard reads: found by its record, and refused where it is another one."""

import logging

from saefty.errors import InputError, MismatchError
from saefty.guards.spec import GuardModel, GuardSpec
from saefty.models.base import ModelAdapter, inspect_model, load_model
from saefty.pairing import model_relation

log = logging.getLogger(__name__)

WEIGHTS, TOKENIZER = ".safetensors", "tokenizer.json"


def open_guard_model(spec: GuardSpec, name: str | None, device: str) -> ModelAdapter:
    """Load the model that a guard reads, in the number format that it was fitted in.

    Args:
        spec: The guard's.
        name: Where the model lies on this machine; None takes the name in the guard's record.
        device: Where it runs.

    Raises:
        InputError: If there is no such model here.
        MismatchError: If it is not the guard's.
    """
    recorded, site = spec.place
    wanted = name or recorded.name
    revision = recorded.revision if wanted == recorded.name else None
    try:
        info = inspect_model(wanted, revision)
    except InputError as error:
        if name is not None:
            raise
        raise InputError(
            f"the guard reads {_described(recorded)}, which cannot be had here: {error.message}",
            then="Say where it lies: --model FOLDER, or load_guard(folder, model=...).",
        ) from None
    _check_width(recorded, info.name, info.d_model)
    info.check_sites([site])
    return load_model(wanted, revision=revision, dtype=recorded.dtype, device=device)


def check_model(spec: GuardSpec, model: ModelAdapter) -> None:
    """Refuse a model that is not the guard's; warn where that cannot be told, or reads otherwise.

    Args:
        spec: The guard's.
        model: The model that is to be read.

    Raises:
        MismatchError: If its width, its weights or its tokenizer are others.
        ConfigError: If it has no such block.
    """
    recorded, site = spec.place
    _check_width(recorded, model.name, model.d_model)
    model.info.check_sites([site])
    here = GuardModel.of(model)
    if recorded.files and here.files:
        differing = [
            name
            for name in sorted({*recorded.files, *here.files})
            if (name.endswith(WEIGHTS) or name == TOKENIZER)
            and recorded.files.get(name) != here.files.get(name)
        ]
        if differing:
            raise MismatchError(
                f"{model.name} is not the model that this guard was fitted on, {recorded.name}: "
                f"{', '.join(differing[:4])} {'differs' if len(differing) == 1 else 'differ'}.",
                then="Give the model of the guard's record, or fit a guard on this one with saefty "
                "probe --save.",
            )
    elif recorded.revision and here.revision:
        if recorded.revision != here.revision:
            raise MismatchError(
                f"{model.name} is read at commit {here.revision}, but this guard was fitted on "
                f"{recorded.name} at commit {recorded.revision}.",
                then=f"Set model.revision={recorded.revision}, or leave out --model.",
            )
    else:
        relation = model_relation(recorded.name, model.name)
        log.warning(
            "whether %s holds the weights that the guard was fitted on (%s) cannot be told%s",
            model.name, _described(recorded),
            "" if relation == "same" else "; by its name it is another model",
        )  # fmt: skip
    if here.dtype != recorded.dtype:
        log.warning(
            "the guard was fitted on activations in %s and reads them in %s: scores differ a "
            "little",
            recorded.dtype, here.dtype,
        )  # fmt: skip


def _check_width(recorded: GuardModel, name: str, d_model: int) -> None:
    if d_model != recorded.d_model:
        raise MismatchError(
            f"{name} is {d_model} wide, but this guard reads {recorded.name}, {recorded.d_model} "
            "wide.",
            then=f"Give --model {recorded.name}, or a folder that holds it.",
        )


def _described(model: GuardModel) -> str:
    return model.name + (f" at commit {model.revision}" if model.revision else "")
