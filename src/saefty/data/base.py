"""From a dataset's columns to `Example`s: which column is what, and which labels mean harmful.

A dataset is a function from a `DataSection` to records (one mapping a row). Everything after that
is the same for all of them and stands here: naming columns, mapping labels, checking ids. A dataset
that knows what its columns mean yields `Row`s, whose keys are the roles below.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from saefty.config import Config
from saefty.data.image_cells import rows_with_paths
from saefty.data.labels import check_labels, is_missing, label_of, word_of
from saefty.errors import ConfigError, InputError
from saefty.records import Example, Message
from saefty.registry import Registry, nearest

log = logging.getLogger(__name__)

Record = Mapping[str, Any]
GUESSED_COLUMNS = {"messages": "messages", "prompt": "prompt", "text": "text"}
ROLES = (
    "text", "prompt", "response", "messages", "image", "label", "group", "category", "id", "source",
    "span",
)  # fmt: skip
"""What a column can be: keys of `data.` that name columns, and keys of a `Row`."""


class Row(dict[str, Any]):
    """A record whose columns are called by their roles, so that none has to be named."""


class SourceSection(Config):
    """One source of examples, and what its columns mean."""

    name: str = "local"
    """The dataset; `local` reads `data.path`, `hub` a dataset of the Hugging Face hub."""

    path: str | None = None
    """A JSONL, JSON, CSV or Parquet file, or the id of a dataset on the hub."""

    files: tuple[str, ...] | None = None
    """Several files of one form instead of `data.path`, read one after the other."""

    format: Literal["lines", "csv", "jsonl", "json", "parquet"] | None = None
    """How a file is read: `lines` is one sentence a line, with no header and no quoting, in the
    column `text`; None tells it by the file's suffix."""

    encoding: str | None = None
    """The encoding of a text file, such as cp932; None is UTF-8, or what a byte-order mark says."""

    split: str = "train"
    """The split of a hub dataset."""

    subset: str | None = None
    """A folder or a file of a hub dataset, such as harmless-base; None leaves the choice to it."""

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
    """Column of images: paths, relative to the data file's folder, or (in Parquet and on the hub)
    the images themselves."""

    label: str | None = None
    """Column of labels: true, 1 or `harmful` against false, 0 or `harmless`, unless `data.harmful`
    says otherwise. An empty value is a missing label."""

    group: str | None = None
    """Column that names examples which belong together (the same prompt, say); a split never
    separates them."""

    category: str | None = None
    """Column of categories, such as the kind of harm."""

    id: str | None = None
    """Column of unique ids; None numbers the rows from 0."""

    source: str | None = None
    """Column that says where an example comes from; None uses the dataset's name."""

    span: str | None = None
    """Column of token positions [start, end) for `pooling.name=span_mean`, BOS counted as 0."""

    harmful: tuple[str, ...] | None = None
    """Values of the label column that mean harmful; all other values mean harmless. Without
    `data.label` they are values of the category, where the dataset has one."""

    unlabelled: Literal["harmful", "harmless"] | None = None
    """What examples without a label are taken for; None leaves their label unknown."""

    limit: int | None = Field(default=None, gt=0)
    """Read at most this many rows; None reads all."""

    @field_validator("harmful", mode="before")
    @classmethod
    def _as_words(cls, given: object) -> object:
        """Accept one value for a list of one, and numbers and truth values for what they spell."""
        if given is None or isinstance(given, dict):
            return given
        values = given if isinstance(given, list | tuple) else [given]
        return tuple(word_of(value) for value in values)


class PartSection(SourceSection):
    """One part of a mixture."""

    part: str | None = None
    """The part's name, which becomes its examples' source; parts of one name are drawn from
    together. None takes the dataset's name, or that of the file."""


class MixtureSection(Config):
    """What `data.name=mixture` is made of."""

    parts: tuple[PartSection, ...] = ()
    """The datasets, each a section of the keys of `data.`, and `part`."""

    shares: dict[str, float] | None = None
    """Part -> its share of the whole; together they are 1. None takes parts by their size."""

    by: Literal["examples", "tokens", "words", "characters"] = "examples"
    """What the shares and the total count; tokens need a tokenizer."""

    total: int | None = Field(default=None, gt=0)
    """Examples, tokens, words or characters of the whole; None is as much as the shares allow."""

    when_short: Literal["refuse", "take"] = "refuse"
    """What to do where a part holds less than its share: refuse, or take what there is."""

    tokenizer: str | None = None
    """Folder or hub id of the tokenizer that counts tokens."""

    seed: int = Field(default=0, ge=0)
    """Seed of what is drawn, and of the order."""


class DataSection(SourceSection):
    """Which data to read, and what its columns mean."""

    mixture: MixtureSection | None = None
    """The parts of `data.name=mixture`."""


DATASETS: Registry[Callable[[DataSection], Iterator[Record]]] = Registry("dataset", "saefty.data")


def load_examples(section: DataSection) -> list[Example]:
    """Read a dataset.

    Raises:
        InputError: If it is empty, a named column is missing, a label cannot be understood, or ids
            repeat.
    """
    records: list[Record] = []
    sources: list[str] = []
    columns: list[dict[str, str]] = []  # of each record: files may differ in what they have
    where = section.path or ", ".join(section.files or ()) or section.name
    for part in _files(section):
        begin = len(records)
        left = None if section.limit is None else section.limit - begin
        rows = islice(DATASETS[section.name](part), left)
        first = next(rows, None)
        if first is None:
            continue
        of_part = _columns(section, first, part.path or section.name)
        image = of_part.get("image", "image" if isinstance(first, Row) else None)
        kept = set(of_part.values())
        records += rows_with_paths(chain([first], rows), image, kept, part.path, section.name)
        columns += [of_part] * (len(records) - begin)
        named = Path(part.path).name if part.path else section.name
        sources += [named] * (len(records) - begin)
        if _text_column(of_part) != _text_column(columns[0]):
            log.warning(
                "%s is read by its column %r, but %s by %r; a chat template is applied to prompts "
                "and messages, not to texts",
                sources[0], _text_column(columns[0]), named, _text_column(of_part),
            )  # fmt: skip
    if not records:
        raise InputError(
            f"{where} holds no examples: 0 rows.", then="Check data.path and data.split."
        )
    check_labels(
        (
            _Cells(record, own, where).value(_judged(own, section))
            for record, own in zip(records, columns, strict=True)
        ),
        section.harmful,
        where,
    )
    examples = [
        _example(record, own, section, i, source, f"{where}, row {i} (counted from 0)")
        for i, (record, own, source) in enumerate(zip(records, columns, sources, strict=True))
    ]
    _check_ids(examples, where)
    return examples


def _files(section: DataSection) -> list[DataSection]:
    """Return one section a file.

    Raises:
        ConfigError: If both `data.path` and `data.files` are set, or the list is empty.
    """
    if section.files is None:
        return [section]
    if section.path is not None or not section.files:
        raise ConfigError(
            "data.files names no file."
            if not section.files
            else f"data.files and data.path ({section.path}) are both set. Set one of them."
        )
    return [section.model_copy(update={"path": path, "files": None}) for path in section.files]


def _columns(section: DataSection, first: Record, where: str) -> dict[str, str]:
    """Return role -> column, with text columns guessed where none is named."""
    columns = {role: getattr(section, role) for role in ROLES if getattr(section, role)}
    if isinstance(first, Row):
        columns = {role: role for role in ROLES if role in first} | columns
    elif not columns.keys() & {"text", "prompt", "messages"}:
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


def _text_column(columns: Mapping[str, str]) -> str | None:
    return next((columns[role] for role in GUESSED_COLUMNS if role in columns), None)


def _judged(columns: Mapping[str, str], section: SourceSection) -> str:
    """Return the role that says what is harmful: the label, or the category in its stead."""
    by_category = section.harmful is not None and section.label is None and "category" in columns
    return "category" if by_category else "label"


def _listed(record: Record) -> str:
    return ", ".join(repr(str(key)) for key in record)


class _Cells:
    """A row's cells by their roles."""

    def __init__(self, record: Record, columns: Mapping[str, str], where: str) -> None:
        if isinstance(record, Row):  # rows of a mixture differ in what they have
            named = {role: column for role, column in columns.items() if column in record}
            columns = {role: role for role in ROLES if role in record} | named
        self.record, self.columns, self.where = record, columns, where

    def value(self, role: str) -> Any:
        """Return a cell; None where it is missing."""
        value = self.record.get(self.columns[role]) if role in self.columns else None
        return None if is_missing(value) else value

    def text(self, role: str) -> str | None:
        """Return a cell of text.

        Raises:
            InputError: If it holds something else, or half of a character.
        """
        value = self.value(role)
        if value is None:
            return None
        place = f"{self.where}: column {self.columns[role]!r} (data.{role})"
        if isinstance(value, list | dict | bytes):
            raise InputError(f"{place} holds a {type(value).__name__}, not text.")
        if isinstance(value, str) and not value.isascii():
            _check_writable(value, place)
        return str(value)


def _example(
    record: Record,
    columns: Mapping[str, str],
    section: DataSection,
    row: int,
    source: str,
    where: str,
) -> Example:
    cells = _Cells(record, columns, where)
    columns, text = cells.columns, cells.text
    messages = _messages(cells.value("messages"), where) if "messages" in columns else None
    label = label_of(cells.value(_judged(columns, section)), section.harmful)
    if label is None and section.unlabelled is not None:
        label = section.unlabelled == "harmful"
    name = text("id")
    return Example(
        id=name if name is not None else str(row),
        prompt=text("text") or text("prompt") or "",
        response=text("response"),
        messages=messages,
        image=text("image"),
        label=label,
        group=text("group"),
        source=text("source") or source,
        raw="text" in columns,
        category=text("category"),
        span=_span(cells.value("span"), where),
    )


def _span(value: Any, where: str) -> tuple[int, int] | None:
    """Return token positions [start, end): two numbers, or their spelling as JSON in a CSV."""
    if value is None:
        return None
    try:
        start, end = json.loads(value) if isinstance(value, str) else value
        if int(start) == start and int(end) == end and 0 <= start < end:
            return int(start), int(end)
    except (TypeError, ValueError):
        pass
    raise InputError(
        f"{where}: data.span needs [start, end) with 0 <= start < end, but found {value!r:.80}.",
        then="Give the positions of the first token and of the one behind the last, BOS counted "
        "as 0; an empty cell leaves the example without a span.",
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


def _check_ids(examples: Iterable[Example], where: str) -> None:
    counts = Counter(example.id for example in examples)
    repeated = [name for name, n in counts.items() if n > 1]
    if repeated:
        raise InputError(
            f"{where} uses {len(repeated)} ids for more than one row: {', '.join(repeated[:10])}.",
            then="Set data.id to a column of unique ids, or leave it out to number the rows.",
        )
