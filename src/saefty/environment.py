"""Keys and tokens: where they come from, and how they are kept out of every message.

A token stands in the environment or in a file `.env` of the working folder, never on the command
line, where other users of the machine and the shell's history would see it. Of `.env` only the
names below are taken: a file that came with a folder of somebody's must not set a proxy, another
hub or a library to load.
"""

import logging
import os
import re
from pathlib import Path

log = logging.getLogger(__name__)

HUB_NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""The variables that hold the hub's token; the second is an old name."""

NAMES = (*HUB_NAMES, "OPENAI_API_KEY")
"""The variables that hold secrets, and all that is read from `.env`."""

DOTENV = ".env"
HIDDEN = "***"
SHORTEST = 6  # a shorter value would black out words by chance
LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)")
SHAPES = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,})")
"""How tokens of the hub and keys of judges look."""

ADDRESS = re.compile(r"(https?://[^\s?\"']+)\?[^\s\"']+")
"""An address with a query, in which a storage server takes its signature."""


_used = set(NAMES)


class Secret:
    """A value that is used and never shown.

    Example:
        >>> Secret("hf_abc")
        ***
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the value, for the one call that needs it."""
        return self._value

    def __repr__(self) -> str:
        return HIDDEN

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return HIDDEN

    def __reduce__(self) -> str:
        raise TypeError("a secret is not written to a file")


def secret(name: str) -> Secret | None:
    """Return a secret of the environment, or None if it is not set or empty.

    Whatever a variable that was asked for holds is kept out of every message from then on.
    """
    _used.add(name)
    value = os.environ.get(name, "").strip()
    return Secret(value) if value else None


def load_environment(folder: Path | str = ".") -> tuple[str, ...]:
    """Take tokens from `.env` of a folder, where the environment does not hold them already.

    Returns:
        The names that were taken.
    """
    path = Path(folder) / DOTENV
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        log.warning("%s could not be read (%s); it was left out", path, type(error).__name__)
        return ()
    found = parse(text)
    if found and _tracked(path):
        log.warning(
            "%s holds %s and is tracked by git: everyone with the repository has it. Run "
            "git rm --cached %s, add it to .gitignore, and make a new token",
            path, ", ".join(sorted(found)), DOTENV,
        )  # fmt: skip
    taken = {name: value for name, value in found.items() if not os.environ.get(name)}
    os.environ.update(taken)
    return tuple(sorted(taken))


def parse(text: str) -> dict[str, str]:
    """Return the secrets that a `.env` file sets; quotes and comments as a shell has them."""
    found = {}
    for line in text.splitlines():
        match = LINE.fullmatch(line.strip())
        if match is None or match[1] not in NAMES:
            continue
        value = match[2].strip()
        quote = value[:1]
        if quote in ("'", '"') and quote in value[1:]:
            value = value[1 : value.index(quote, 1)]
        else:
            value = re.split(r"\s+#", value, maxsplit=1)[0].strip()
        if value:
            found[match[1]] = value
    return found


def redacted(text: str) -> str:
    """Return a text without the secrets of the environment, nor anything that looks like one."""
    for name in sorted(_used):
        value = os.environ.get(name, "").strip()
        if len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    return ADDRESS.sub(rf"\1?{HIDDEN}", SHAPES.sub(HIDDEN, text))


def _tracked(path: Path) -> bool:
    """Return whether git has a file in its index; no where there is no git."""
    import subprocess  # here, so that --help stays quick

    command = ["git", "-C", str(path.parent), "ls-files", "--error-unmatch", path.name]
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
