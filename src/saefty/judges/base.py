"""What a judge is: prompts and replies in, a score from 0 to 1 for each reply out.

A reply that cannot be judged (an empty one, say) scores NaN, never 0: it is missing, and whoever
averages says how many are.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from saefty import fsio
from saefty.environment import HIDDEN
from saefty.errors import ConfigError
from saefty.records import Example
from saefty.registry import Registry


@runtime_checkable
class Judge(Protocol):
    """Scores replies."""

    def score(
        self, prompts: Sequence[Example | str], replies: Sequence[str]
    ) -> Float[np.ndarray, "items"]:
        """Return a score from 0 to 1 for each reply, NaN where it could not be judged.

        Args:
            prompts: What was replied to.
            replies: One for each prompt, in the same order.
        """


_PRIVATE = re.compile(r"key|token|secret|password|auth", re.IGNORECASE)

JUDGES: Registry[Callable[..., Judge]] = Registry("judge", "saefty.judges")


def make_judge(name: str, options: Mapping[str, Any], key: str = "intervention.judge") -> Judge:
    """Return a judge with its settings.

    Args:
        name: Its name in `JUDGES`.
        options: The arguments it is made with.
        key: The configuration key that names it, for messages.

    Raises:
        ConfigError: If the judge does not take these settings.
        UnknownNameError: If there is no such judge.
    """
    kind = JUDGES[name]
    signature = inspect.signature(kind)
    if "unsteered" in signature.parameters:
        raise ConfigError(
            f"{key}={name}: this judge compares replies with the model's own, so it tells fluency "
            "and not behaviour.",
            then=f"Set intervention.fluency={name}, and {key} to another judge.",
        )
    try:
        signature.bind(**options)
        return kind(**options)
    except (TypeError, ValueError) as error:
        known = ", ".join(signature.parameters) or "none"
        raise ConfigError(
            f"{key}={name} cannot be made with the settings {_shown(options)}: {error}.",
            then=f"Its settings are {known}: {key}_options.NAME=VALUE.",
        ) from error


WRITTEN = ("cache",)
"""Options that name what a judge writes; its scores do not depend on what is there already."""


def judge_record(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a judge's scores depend on beside its settings: the contents of its files.

    A run keeps it with its inputs, so that a word list that has changed makes it another run.

    Args:
        name: The judge's name in `JUDGES`.
        options: Its settings; those that name a file or a folder that is there are read.
    """
    return {
        "name": name,
        "files": {
            key: _contents(Path(value))
            for key, value in options.items()
            if key not in WRITTEN and isinstance(value, str | Path) and _is_there(value)
        },
    }


def _is_there(value: str | Path) -> bool:
    try:
        return bool(str(value)) and Path(value).exists()
    except (OSError, ValueError):  # too long for a path, or a null within: words, not a path
        return False


def _contents(path: Path) -> str:
    """Return the checksum of a file, or of all files of a folder with their names."""
    if path.is_file():
        return fsio.digest(path)
    inside = {
        one.relative_to(path).as_posix(): fsio.digest(one)
        for one in sorted(path.rglob("*"))
        if one.is_file()
    }
    return fsio.digest_bytes(fsio.dump_json(inside).encode())


def _shown(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings for a message, without what may be a key that was put in the wrong place."""
    return {
        name: HIDDEN if _PRIVATE.search(name) and name != "key_variable" else value
        for name, value in options.items()
    }


def check_pairs(prompts: Sequence[Example | str], replies: Sequence[str]) -> None:
    """Refuse lists that do not belong together.

    Raises:
        ValueError: If there is not one reply for each prompt.
    """
    if len(prompts) != len(replies):
        raise ValueError(f"{len(replies)} replies were given for {len(prompts)} prompts")
