"""What a person reads of a run: summary.json, summary.md, and tables as CSV.

A table is made once and written twice: rounded and readable in Markdown, in full in CSV. Text from
data is shown as it is written, never run: a cell that a spreadsheet would take for a formula gets
an apostrophe, and marks that Markdown would interpret are escaped. JSON is strict: what is not a
number (NaN, infinity) becomes null.
"""

import csv
import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from saefty import fsio

# Spreadsheets of East Asian locales take the full-width forms for formulas too.
FORMULA = re.compile(r"^\s*[=+\-@\t\r＝＋－＠]")
MARKS = re.compile(r"([\\`*\[\]<>|])")
MISSING = "–"


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: The key of the value in each row, and the column's name in CSV.
        heading: What stands above it in Markdown, with the unit.
        format: How numbers are shown in Markdown, such as ".3f"; CSV holds them in full.
    """

    key: str
    heading: str
    format: str = ".3f"


@dataclass(frozen=True)
class Table:
    """Rows under named columns; a key that a row lacks is an empty cell."""

    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, records: Sequence[Any]) -> "Table":
        """Return a table of records with all their fields, nested ones under joined names."""
        rows = tuple(flatten(record) for record in records)
        keys = dict.fromkeys(key for row in rows for key in row)
        return cls(tuple(Column(key, key) for key in keys), rows)

    def markdown(self) -> str:
        """Return the table in Markdown, numbers rounded and to the right."""
        cells = [
            [_shown(row.get(column.key), column.format) for column in self.columns]
            for row in self.rows
        ]
        right = [
            all(_is_number(row.get(column.key)) or row.get(column.key) is None for row in self.rows)
            for column in self.columns
        ]
        lines = [
            [_escaped(column.heading) for column in self.columns],
            ["---:" if side else "---" for side in right],
            *cells,
        ]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def csv(self) -> str:
        """Return the table as CSV: UTF-8, full precision, an empty cell for what is missing."""
        out = io.StringIO()
        # RFC 4180 ends lines with CRLF; only then does the writer quote a lone CR in a cell.
        writer = csv.writer(out, lineterminator="\r\n")
        writer.writerow([_spreadsheet(column.key) for column in self.columns])
        for row in self.rows:
            writer.writerow([_spreadsheet(row.get(column.key)) for column in self.columns])
        return out.getvalue()


@dataclass(frozen=True)
class Section:
    """One part of summary.md.

    Attributes:
        title: Its heading.
        text: Markdown of our own; not for text from data.
        table: Shown below the text.
        figure: A picture's path relative to the report's folder, shown below the table.
        caption: What the picture shows, in a sentence.
    """

    title: str
    text: str = ""
    table: Table | None = None
    figure: str | None = None
    caption: str = ""


def write_report(
    folder: Path,
    *,
    title: str,
    lead: str,
    sections: Sequence[Section],
    figures: Mapping[str, Any],
    tables: Mapping[str, Table] | None = None,
) -> list[Path]:
    """Write summary.json, summary.md and a CSV file a table.

    Args:
        folder: The run folder.
        title: The heading of summary.md.
        lead: What was found and how sure it is, in one paragraph of Markdown.
        sections: The parts of summary.md, in order.
        figures: The numbers, for summary.json.
        tables: Tables by file name without suffix.

    Returns:
        The files written, summary.md first.
    """
    written = [folder / "summary.md", folder / "summary.json"]
    fsio.commit_text(written[0], markdown_report(title, lead, sections))
    fsio.commit_json(written[1], plain(figures))
    for name, table in (tables or {}).items():
        written.append(fsio.safe_join(folder, f"{name}.csv"))
        fsio.commit_text(written[-1], table.csv())
    return written


def markdown_report(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Return the text of summary.md."""
    parts = [f"# {_escaped(title)}", lead.strip()]
    for section in sections:
        parts.append(f"## {_escaped(section.title)}")
        if section.text:
            parts.append(section.text.strip())
        if section.table is not None:
            parts.append(section.table.markdown().strip())
        if section.figure is not None:
            parts.append(f"![{_escaped(section.caption or section.title)}]({section.figure})")
            if section.caption:
                parts.append(f"*{_escaped(section.caption)}*")
    return "\n\n".join(parts) + "\n"


def plain(value: Any) -> Any:
    """Return a value as strict JSON can hold it.

    Dataclasses and configurations become objects, arrays lists, paths text, sets sorted lists; NaN
    and infinity become null.

    Raises:
        TypeError: If the value is of no such kind.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float | np.generic):
        value = value.item() if isinstance(value, np.generic) else value
        return None if isinstance(value, float) and not math.isfinite(value) else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, set | frozenset):
        return [plain(item) for item in sorted(value)]
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def flatten(record: Any) -> dict[str, Any]:
    """Return a record's fields as one level: `auroc.low` becomes `auroc_low`."""
    flat: dict[str, Any] = {}
    for key, value in plain(record).items():
        if isinstance(value, dict):
            flat |= {f"{key}_{inner}": item for inner, item in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _shown(value: Any, form: str) -> str:
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return format(value, form)
    return _escaped(str(value))


def _escaped(text: str) -> str:
    return MARKS.sub(r"\\\1", " ".join(text.split()))


def _spreadsheet(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    text = value if isinstance(value, str) else str(value)
    return f"'{text}" if FORMULA.match(text) else text
