"""The texts that are to be scored: which file, which columns, and what is odd about them."""

import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saefty.config import Config, build_config, load_config
from saefty.data.base import DataSection, load_examples
from saefty.errors import ConfigError, InputError, SaeftyError
from saefty.guards.spec import plain_text
from saefty.records import Example
from saefty.textfile import decode_text, text_lines

log = logging.getLogger(__name__)

STDIN = "-"
MOSTLY = 0.5
"""Share of a file or of a text from which on something odd in it is warned of."""
FLAGS = ("text", "prompt", "response", "messages", "label", "harmful", "group", "id")
"""Keys of `data.` that have a flag of the same name."""


class ScoreConfig(Config):
    """Which texts `saefty guard score` reads."""

    data: DataSection = DataSection()
    """Which data to read, and what its columns mean."""


def data_section(file: str, columns: Mapping[str, str], words: Sequence[str]) -> DataSection | None:
    """Return the data section that a command's words come to; None for standard input.

    Args:
        file: Its name, taken as it is written; `-` is standard input.
        columns: Keys of `data.` and what they are set to, taken likewise; `harmful` may be several
            values with commas between them.
        words: Further KEY=VALUE words, whose values are read as YAML.

    Raises:
        ConfigError: If a setting cannot be used.
        InputError: If there is no such file.
    """
    if file == STDIN:
        if columns or words:
            given = ", ".join([*(f"--{role}" for role in columns), *words])
            raise ConfigError(
                f"standard input is read as lines of text, which have no columns: {given}.",
                then="Leave these out, or give a file.",
            )
        return None
    ours: dict[str, Any] = {"path": file, **columns}
    if "harmful" in columns:
        ours["harmful"] = [one.strip() for one in columns["harmful"].split(",")]
    with _in_words_of_flags():
        further = load_config(ScoreConfig, None, words).data.model_dump(exclude_unset=True)
        section = build_config(ScoreConfig, {"data": {**ours, **further}}).data
    if section.name == "local" and section.path is not None:
        _check_file(section.path)
    return section


def files_read(section: DataSection | None) -> list[str]:
    """Return the names of all files that a section may read."""
    if section is None:
        return []
    parts = section.mixture.parts if section.mixture else ()
    return [name for one in (section, *parts) for name in (one.path, *(one.files or ())) if name]


def read_examples(section: DataSection | None, *, raw: bool) -> list[Example]:
    """Return the texts of a file, or the lines of standard input.

    Args:
        section: As `data_section` returns it.
        raw: How lines are read.

    Raises:
        InputError: If there are none, or they cannot be read.
        ConfigError: If settings contradict each other.
    """
    if section is None:
        text = decode_text(sys.stdin.buffer.read(), "standard input")
        lines = [line for line in text_lines(text) if line.strip()]
        if not lines:
            raise InputError(
                "standard input holds no text.", then="Write a text a line: echo TEXT | saefty …"
            )
        return [Example(str(i), line, raw=raw) for i, line in enumerate(lines)]
    with _in_words_of_flags():
        examples = load_examples(section)
    _warn_of_column(examples, section)
    return examples


@contextmanager
def _in_words_of_flags() -> Iterator[None]:
    """Name the command's flags in errors in the place of the keys that they set."""
    try:
        yield
    except SaeftyError as error:
        raise type(error)(
            _in_flags(error.message), safe=error.safe, then=_in_flags(error.then)
        ) from None


def _warn_of_column(examples: Sequence[Example], section: DataSection) -> None:
    """Name the column that was guessed; say where it holds no running text."""
    named = section.text or section.prompt or section.messages
    if not named and section.name == "local" and section.format != "lines":
        role = "text" if examples[0].raw else "messages" if examples[0].messages else "prompt"
        log.info("the texts are in the column %r: --%s names another", role, role)
    written = [plain_text(example).strip() for example in examples]
    single = sum(bool(text) and len(text.split()) == 1 for text in written)
    if named and single > MOSTLY * len(examples) and any(map(_has_digit, written)):
        log.warning(
            "the column %r holds single words with digits (such as %.40r), as ids are: is it text?",
            named, next(text for text in written if _has_digit(text)),
        )  # fmt: skip


def _has_digit(text: str) -> bool:
    return any(character.isdigit() for character in text)


def _check_file(name: str) -> None:
    """Refuse a text in the place of a file.

    Raises:
        InputError: If there is no such file.
    """
    if Path(name).is_file():
        return
    what = "is a folder, not a file" if Path(name).is_dir() else "is not there: no such file"
    raise InputError(
        f"{name!r:.120} {what}.",
        then="Name a file of texts; to score a text itself: echo TEXT | saefty guard score -",
    )


def _in_flags(text: str) -> str:
    """Return a message with the command's flags in the place of the keys that they set."""
    text = re.sub(r"data\.harmful='\[(.*?)\]'", r"--harmful '\1'", text)
    return re.sub(rf"(?<![\w.])data\.({'|'.join(FLAGS)})(?!\w|\.\w)", r"--\1", text)
