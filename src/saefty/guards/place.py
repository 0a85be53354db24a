"""Where a guard's folder may be: what belongs into it, and what must not be written over."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saefty import fsio
from saefty.errors import ConfigError, IntegrityError

RECORD, WEIGHTS, WORDS, CARD, SAE = (
    "guard.json", "guard.safetensors", "vocabulary.txt", "guard.md", "sae",
)  # fmt: skip
_ANOTHER = "Name a new folder, or remove this one if it is not needed."


def check_place(folder: Path, run: Path | str) -> None:
    """Refuse, before any work is done, a folder into which a run's guard cannot be written.

    Args:
        folder: Where the guard is to go.
        run: The run; a guard that it wrote itself may be there.

    Raises:
        ConfigError: If the folder holds something else, or the guard of another run.
    """
    there = _held(folder)
    facts = (there or {}).get("facts")
    if there is not None and not (isinstance(facts, dict) and facts.get("run") == str(run)):
        raise ConfigError(
            f"{folder} holds a guard already, which this run did not write.",
            safe="Nothing in it was touched.",
            then=_ANOTHER,
        )


def check_same(folder: Path, record: Mapping[str, Any]) -> None:
    """Refuse a folder that holds something else than this guard, finished or not.

    Raises:
        ConfigError: If it does.
    """
    there = _held(folder)
    if there is None:
        return
    differing = [key for key in record if key != "saefty" and there.get(key) != record[key]]
    if differing:
        raise ConfigError(
            f"{folder} holds another guard; they differ in {', '.join(differing)}.",
            safe="Nothing in it was touched.",
            then=_ANOTHER,
        )


def _held(folder: Path) -> dict[str, Any] | None:
    """Return the record of the guard in a folder; None where there is none, or half of one.

    Raises:
        ConfigError: If the folder is a file, or holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, and a guard is a folder.", then=_ANOTHER)
    if not folder.is_dir():
        return None
    ours = {RECORD, WEIGHTS, WORDS, CARD, SAE}
    held = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in held if name not in ours and not name.startswith(fsio.TEMP_PREFIX)]
    if foreign:
        raise ConfigError(
            f"{folder} holds something else than a guard: {', '.join(foreign[:5])}.",
            safe="Nothing in it was touched.",
            then=_ANOTHER,
        )
    if RECORD not in held:
        return None
    try:
        return fsio.read_sealed(folder / RECORD)
    except IntegrityError as error:
        raise ConfigError(
            f"{folder} holds a guard that cannot be read: {error.message}",
            safe="Nothing in it was touched.",
            then=_ANOTHER,
        ) from None


def no_guard(folder: Path) -> tuple[str, str]:
    """Return what a folder without a guard is, and what to do."""
    if folder.is_file():
        return (
            f"{folder} is a file, and a guard is a folder with {RECORD}.",
            "Name the folder that saefty probe --save wrote.",
        )
    if not folder.is_dir():
        return (
            f"there is no guard {folder}: no such folder.",
            "Make one with saefty probe --save FOLDER, or name where it lies: --guard FOLDER.",
        )
    held = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    return (
        f"{folder} holds no guard: it has no {RECORD}, but {held}.",
        "Name the folder that saefty probe --save wrote; if its writing was interrupted, run that "
        "command again.",
    )
