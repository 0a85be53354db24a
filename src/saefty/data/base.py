"""From a dataset's columns to `Example`s: which column is what, and which labels mean harmful.

A dataset is a function from a `DataSection` to records (one mapping a row). Everything after that
is the same for all of them and stands here: naming columns, mapping labels, checking ids.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from saefty.config import Config
from saefty.errors import InputError
from saefty.records import Example, Message
from saefty.registry import Registry, nearest

log = logging.getLogger(__name__)

Record = Mapping[str, Any]
GUESSED_COLUMNS = {"messages": "messages", "prompt": "prompt", "text": "text"}
TRUE_WORDS = frozenset({"true", "1", "1.0", "yes", "harmful"})
FALSE_WORDS = frozenset({"false", "0", "0.0", "no", "harmless", "benign"})


class DataSection(Config):
    """Which data to read, and what its columns mean."""

    name: str = "local"
    """The dataset; `local` reads `data.path`, `hub` a dataset of the Hugging Face hub."""

    path: str | None = None
    """A JSONL, JSON, CSV or Parquet file, or the id of a dataset on the hub."""

    split: str = "train"
    """The split of a hub dataset."""

    revision: str | None = None
    """The revision of a hub dataset; its commit is recorded."""

    text: str | None = None
    """Column of running text, tokenised as it stands, without a chat template."""

    prompt: str | None = None
    """Column of the user's turn; the tokenizer's chat template is applied where it has one."""

    response: str | None = None
    """Column of the answer that is teacher-forced after the prompt."""

    messages: str | None = None
    """Column of whole conversations: a list of {role, content}."""

    image: str | None = None
    """Column of image paths."""

    label: str | None = None
    """Column of labels: true, 1 or `harmful` against false, 0 or `harmless`, unless `data.harmful`
    says otherwise. An empty value is a missing label."""

    group: str | None = None
    """Column that names examples which belong together (the same prompt, say); a split never
    separates them."""

    id: str | None = None
    """Column of unique ids; None numbers the rows from 0."""

    source: str | None = None
    """Column that says where an example comes from; None uses the dataset's name."""

    harmful: tuple[str, ...] | None = None
    """Values of the label column that mean harmful; all other values mean harmless."""

    limit: int | None = Field(default=None, gt=0)
    """Read at most this many rows; None reads all."""

    @field_validator("harmful", mode="before")
    @classmethod
    def _as_words(cls, given: object) -> object:
        """Accept one value for a list of one, and numbers and truth values for what they spell."""
        if given is None or isinstance(given, dict):
            return given
        values = given if isinstance(given, list | tuple) else [given]
        return tuple(_word(value) for value in values)


DATASETS: Registry[Callable[[DataSection], Iterator[Record]]] = Registry("dataset", "saefty.data")


def load_examples(section: DataSection) -> list[Example]:
    """Read a dataset.

    Raises:
        InputError: If it is empty, a named column is missing, a label cannot be understood, or ids
            repeat.
    """
    records: list[Record] = []
    for record in DATASETS[section.name](section):
        if section.limit is not None and len(records) >= section.limit:
            break
        records.append(record)
    where = section.path or section.name
    if not records:
        raise InputError(
            f"{where} holds no examples: 0 rows.", then="Check data.path and data.split."
        )
    columns = _columns(section, records[0], where)
    if section.harmful is not None and "label" in columns:
        _check_harmful((record.get(columns["label"]) for record in records), section, where)
    examples = [
        _example(record, columns, section, i, f"{where}, row {i} (counted from 0)")
        for i, record in enumerate(records)
    ]
    _check_ids(examples, where)
    return examples


def _columns(section: DataSection, first: Record, where: str) -> dict[str, str]:
    """Return role -> column, with text columns guessed where none is named."""
    roles = ("text", "prompt", "response", "messages", "image", "label", "group", "id", "source")
    columns = {role: getattr(section, role) for role in roles if getattr(section, role)}
    if not columns.keys() & {"text", "prompt", "messages"}:
        guessed = next((role for role, name in GUESSED_COLUMNS.items() if name in first), None)
        if guessed is None:
            raise InputError(
                f"{where} has no column called text, prompt or messages, only {_listed(first)}.",
                then="Set data.text (running text), data.prompt (a user's turn) or data.messages.",
            )
        columns[guessed] = GUESSED_COLUMNS[guessed]
    for role, name in columns.items():
        if name not in first:
            raise InputError(
                f"{where} has no column {name!r} (data.{role}), only {_listed(first)}."
                f"{nearest(name, [str(key) for key in first])}"
            )
    given = sorted(columns.keys() & {"text", "prompt", "messages"})
    if len(given) > 1:
        raise InputError(
            f"data.{given[0]} and data.{given[1]} are both set, but an example has one text.",
            then="Set one of data.text, data.prompt and data.messages.",
        )
    return columns


def _listed(record: Record) -> str:
    return ", ".join(repr(str(key)) for key in record)


def _example(
    record: Record, columns: Mapping[str, str], section: DataSection, row: int, where: str
) -> Example:
    def cell(role: str) -> Any:
        value = record.get(columns[role]) if role in columns else None
        missing = value is None or value == "" or (isinstance(value, float) and value != value)
        return None if missing else value

    def text(role: str) -> str | None:
        value = cell(role)
        if value is not None and not isinstance(value, str):
            if isinstance(value, list | dict | bytes):
                raise InputError(
                    f"{where}: column {columns[role]!r} (data.{role}) holds a "
                    f"{type(value).__name__}, not text."
                )
            return str(value)
        if value is not None and not value.isascii():
            _check_writable(value, f"{where}: column {columns[role]!r} (data.{role})")
        return value

    messages = _messages(cell("messages"), where) if "messages" in columns else None
    name = text("id")
    return Example(
        id=name if name is not None else str(row),
        prompt=text("text") or text("prompt") or "",
        response=text("response"),
        messages=messages,
        image=text("image"),
        label=_label(cell("label"), section, where) if "label" in columns else None,
        group=text("group"),
        source=text("source") or (Path(section.path).name if section.path else section.name),
        raw="text" in columns,
    )


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    try:
        turns = json.loads(value) if isinstance(value, str) else value
        read = tuple(Message(str(turn["role"]), str(turn["content"])) for turn in turns or ())
    except (TypeError, KeyError, ValueError):
        raise InputError(
            f"{where}: data.messages needs a list of {{role, content}}, but found {value!r:.80}."
        ) from None
    for turn in read:
        _check_writable(turn.role + turn.content, f"{where}: data.messages")
    return read


def _check_writable(text: str, where: str) -> None:
    """Refuse half of a surrogate pair, which JSON can spell and no file or tokenizer can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} holds {text[error.start]!r} at character {error.start}: half of a character.",
            then="Write the text again from its source; it was cut within a character.",
        ) from None


def _label(value: Any, section: DataSection, where: str) -> bool | None:
    if value is None or (isinstance(value, float) and value != value):
        return None
    if section.harmful is not None:
        return _word(value) in section.harmful
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    word = str(value).strip().lower()
    if word in TRUE_WORDS or word in FALSE_WORDS:
        return word in TRUE_WORDS
    raise InputError(
        f"{where}: the label {value!r} is neither harmful nor harmless.",
        then=f"Say which values are harmful, for example data.harmful='[{value}]'.",
    )


def _word(value: Any) -> str:
    """Return how a label is written in `data.harmful`: the same for 1, 1.0 and "1"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _check_harmful(values: Iterable[Any], section: DataSection, where: str) -> None:
    """Refuse values of `data.harmful` that never occur: a misspelt one would make all harmless."""
    wanted = section.harmful or ()
    seen = Counter(_word(value) for value in values if value is not None and value != "")
    absent = [word for word in wanted if word not in seen]
    if not seen or not absent:
        return
    found = ", ".join(f"{word!r} ({n})" for word, n in seen.most_common(10))
    if len(absent) == len(wanted):
        raise InputError(
            f"no label of {where} is one of data.harmful={list(wanted)}; its labels are {found}."
            f"{nearest(absent[0], list(seen))}",
            then="Set data.harmful to the values that mean harmful.",
        )
    log.warning("%s has no label %s; its labels are %s", where, ", ".join(absent), found)


def _check_ids(examples: Iterable[Example], where: str) -> None:
    counts = Counter(example.id for example in examples)
    repeated = [name for name, n in counts.items() if n > 1]
    if repeated:
        raise InputError(
            f"{where} uses {len(repeated)} ids for more than one row: {', '.join(repeated[:10])}.",
            then="Set data.id to a column of unique ids, or leave it out to number the rows.",
        )
