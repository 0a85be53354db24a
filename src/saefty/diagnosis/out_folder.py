"""Whether a report can be written into a folder, asked before anything is measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saefty import fsio
from saefty.config import as_typed, differing_keys
from saefty.errors import ConfigError, MismatchError
from saefty.locks import LOCK_FILES
from saefty.runs import METADATA, RESUME_FREE, read_metadata

UNTOUCHED = "Nothing in it was touched, and nothing was measured."
ANOTHER = "Set --out to a new or empty folder."


def refuse_unfit(folder: Path | None, stage: str, config: Mapping[str, Any]) -> None:
    """Refuse a folder that holds something else than a run of this stage with these settings.

    Args:
        folder: The folder; None where nothing is written.
        stage: The stage that will write.
        config: Its configuration as JSON values.

    Raises:
        ConfigError: If it is a file, or holds files that are no run's.
        MismatchError: If it holds a run of another stage or of other settings.
        IntegrityError: If its record of a run is damaged.
    """
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file, not a folder.", safe=UNTOUCHED, then=ANOTHER)
    if not folder.is_dir():
        return
    held = {path.name for path in folder.iterdir()} - LOCK_FILES
    if METADATA not in held:
        held = {name for name in held if not name.startswith(fsio.TEMP_PREFIX)}
        if held:
            listed = ", ".join(sorted(held)[:5])
            raise ConfigError(
                f"--out {folder} is not empty and holds no run: {listed}.",
                safe=UNTOUCHED,
                then=ANOTHER,
            )
        return
    old = read_metadata(folder)
    if old["stage"] != stage:
        raise MismatchError(
            f"--out {folder} holds a run of the stage {old['stage']}, and {stage} writes its own.",
            safe=UNTOUCHED,
            then=ANOTHER,
        )
    now = json.loads(fsio.dump_json(config))
    changed = differing_keys(_decisive(old["config"]), _decisive(now))
    if changed:
        raise MismatchError(
            f"--out {folder} holds a {stage} run of other settings (run -> this command):\n  "
            + "\n  ".join(as_typed(line) for line in changed),
            safe=UNTOUCHED,
            then=ANOTHER,
        )


def _decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the sections that results depend on."""
    return {key: one for key, one in config.items() if not f"{key}.".startswith(RESUME_FREE)}
