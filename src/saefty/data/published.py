"""Published datasets, read from a copy on this machine or from the hub, with their columns checked.

Every one of them is read by its own file beside this one, which says what its columns mean. What a
row lacks is an error that names the columns there are and those there should be.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from saefty.data.base import DATASETS, DataSection, Record, SourceSection
from saefty.errors import ConfigError, InputError

FILES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".lines", ".gz")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Published:
    """A dataset as its authors published it.

    Attributes:
        name: What it is called here.
        repo: Its id on the hub.
        columns: The columns that are needed; others may be there.
        subset: The file or folder of the repository that is read unless `data.subset` says which.
        revision: The revision that is read unless `data.revision` says which.
        split: Its only split, where that is not called `train`.
        spellings: Columns of other copies of it, and what they are called here.
    """

    name: str
    repo: str
    columns: tuple[str, ...]
    subset: str | None = None
    revision: str | None = None
    split: str | None = None
    spellings: Mapping[str, str] = field(default_factory=dict)

    def rows(self, section: DataSection) -> Iterator[tuple[str, Record]]:
        """Yield each row with its place, for messages.

        `data.path` is a file, a folder that holds a copy of the repository, or another id on the
        hub; without it the repository itself is read.

        Raises:
            InputError: If a row lacks a column.
            ConfigError: If `data.format` is set to plain lines.
        """
        if section.format == "lines":
            raise ConfigError(
                f"data.format=lines reads one sentence a line, but {self.name} is a table of "
                f"{_listed(self.columns)}. Leave data.format out.",
            )
        where, source = section.path or self.repo, self._source(section)
        for i, record in enumerate(DATASETS[source.name](source)):
            place = f"{where}, row {i} (counted from 0)"
            for other, column in self.spellings.items():
                if other in record and column not in record:
                    record = {**record, column: record[other]}
            missing = [column for column in self.columns if column not in record]
            if missing:
                raise InputError(
                    f"{place}: {self.name} has the columns {_listed(self.columns)}, but this row "
                    f"has {_listed(record)}: {_listed(missing)} is missing.",
                    then="Set data.path to a file as it was published, or use data.name=local (a "
                    "file) or data.name=hub with data.prompt, data.text or data.messages.",
                )
            yield place, record

    def _source(self, section: DataSection) -> DataSection:
        """Return the section that reads the file, the folder or the repository."""
        path = section.path
        if path is not None and (path.endswith(FILES) or not _may_be_repository(path)):
            return section.model_copy(update={"name": "local"})
        own = path in (None, self.repo)
        usual = section.split == SourceSection.model_fields["split"].default
        changes = {
            "name": "hub",
            "path": path or self.repo,
            "subset": section.subset or self.subset,
            "revision": section.revision or (self.revision if own else None),
            "split": self.split if self.split and usual else section.split,
        }
        return section.model_copy(update=changes)


def _may_be_repository(path: str) -> bool:
    """Tell a folder or a hub id from a file."""
    return Path(path).is_dir() or (not Path(path).exists() and bool(HUB_ID.fullmatch(path)))


def _listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, names))
