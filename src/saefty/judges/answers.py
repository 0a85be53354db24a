"""Answers of judges in one SQLite file, so that no question is paid for twice.

Each answer is committed and flushed to the disk when it comes, before the next question of that
place in the queue: a run that is killed asks again at most what was under way. Runs and processes
share the file. Where two ask the same at once, the first answer is kept and both use it. A row
carries a checksum, because SQLite notices no changed byte within a value; a row that fails it is
asked again and said. A file that SQLite cannot read is moved aside, never deleted.
"""

import fcntl
import hashlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from saefty import fsio
from saefty.errors import ConfigError, DiskError, IntegrityError

log = logging.getLogger(__name__)

VERSION = 1
PATIENCE = 60.0  # seconds for which another process may hold the file
DAMAGED = (sqlite3.DatabaseError, UnicodeDecodeError)
"""What SQLite raises on a file that is none, or none any more."""
SIDE_FILES = ("-journal", "-wal", "-shm")
_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, text TEXT NOT NULL, finish TEXT, tokens_in INTEGER NOT NULL,
    tokens_out INTEGER NOT NULL, model TEXT NOT NULL, seal TEXT NOT NULL
) WITHOUT ROWID
"""


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        text: Its words, as they came; keys are taken out.
        finish: Why it stopped, as the endpoint says.
        tokens_in: Tokens of the question that were charged.
        tokens_out: Tokens of the answer that were charged.
        model: The model that the endpoint says has answered.
    """

    text: str
    finish: str | None
    tokens_in: int
    tokens_out: int
    model: str


def question_key(
    url: str, model: str, messages: Sequence[Mapping[str, str]], params: Mapping[str, Any]
) -> str:
    """Return the name of a question: equal if and only if everything that was asked is equal."""
    asked = [url, model, list(messages), dict(params)]
    text = json.dumps(asked, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


class Answers:
    """The answers that are known.

    Args:
        path: The SQLite file; made if it is missing.

    Raises:
        ConfigError: If the path is a folder, or the file is of a later version or another program.
        DiskError: If the file cannot be written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._damaged: set[str] = set()
        self._connection: sqlite3.Connection | None = None

    def __enter__(self) -> "Answers":
        if self.path.is_dir():
            raise ConfigError(
                f"the cache of answers {self.path} is a folder.",
                then="Name a file in it, such as judge.sqlite.",
            )
        with fsio.disk_errors(self.path):
            fsio.make_folder(self.path.parent)
            with _alone(self.path):
                self._connection = self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def get(self, key: str) -> Answer | None:
        """Return the answer to a question, or None if it is not known."""
        with self._mapped():
            row = self._live.execute(
                "SELECT text, finish, tokens_in, tokens_out, model, seal FROM answers "
                "WHERE key = ?",
                (key,),
            ).fetchone()
        if row is None:
            return None
        if row[5] != _seal(key, row[:5]):
            if key not in self._damaged:
                log.warning("an answer in %s is damaged; its question is asked again", self.path)
            self._damaged.add(key)
            return None
        return Answer(*row[:5])

    def put(self, key: str, answer: Answer) -> Answer:
        """Keep an answer, on the disk when this returns.

        Returns:
            The answer that is kept: another process's, if it came first.
        """
        row = (answer.text, answer.finish, answer.tokens_in, answer.tokens_out, answer.model)
        keep = "REPLACE" if key in self._damaged else "IGNORE"
        with self._mapped(), self._live as connection:
            connection.execute(
                f"INSERT OR {keep} INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)",  # noqa: S608 - ours
                (key, *row, _seal(key, row)),
            )
        self._damaged.discard(key)
        return self.get(key) or answer

    def __len__(self) -> int:
        with self._mapped():
            return int(self._live.execute("SELECT COUNT(*) FROM answers").fetchone()[0])

    @property
    def _live(self) -> sqlite3.Connection:
        assert self._connection is not None, "answers are read and written inside a with block"
        return self._connection

    def _open(self) -> sqlite3.Connection:
        if self.path.exists() and self.path.stat().st_size == 0:
            log.warning("the cache of answers %s is empty; it is begun anew", self.path)
        try:
            return _connect(self.path)
        except sqlite3.OperationalError as error:
            raise _cannot_write(self.path, error) from None
        except DAMAGED as error:
            aside = _move_aside(self.path)
            log.warning(
                "the cache of answers %s cannot be read (%s); it was moved to %s, and a new one "
                "was begun: questions whose answers it held are asked again",
                self.path, error, aside,
            )  # fmt: skip
            return _connect(self.path)

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        """Turn SQLite's errors into ours."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise _cannot_write(self.path, error) from None
        except DAMAGED as error:
            raise IntegrityError(
                f"the cache of answers {self.path} is damaged: {error}.",
                safe="Answers that it still holds are not lost; nothing was deleted.",
                then="Run the same command again: it moves the file aside and begins a new one.",
            ) from None


def _connect(path: Path) -> sqlite3.Connection:
    """Open a file and look it over.

    Raises:
        ConfigError: If a later version wrote it, or another program.
        DatabaseError: If it is not a whole SQLite file.
    """
    # One thread at a time uses it: the one that asks, while the caller's waits.
    connection = sqlite3.connect(path, timeout=PATIENCE, check_same_thread=False)
    # A changed byte may be no UTF-8 any more; the checksum tells.
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    try:
        # A rollback journal, not WAL: that one needs shared memory, which network disks have not.
        connection.execute("PRAGMA journal_mode=PERSIST")
        connection.execute("PRAGMA synchronous=FULL")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise ConfigError(
                f"the cache of answers {path} has version {version}; this release reads up to "
                f"{VERSION}.",
                then="Name another file, or install a newer release.",
            )
        (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            raise sqlite3.DatabaseError(" ".join(state.split()))
        if version == 0:
            with connection:
                connection.execute(_TABLE)
                connection.execute(f"PRAGMA user_version={VERSION}")
        found = [row[1] for row in connection.execute("PRAGMA table_info(answers)")]
        if found != ["key", "text", "finish", "tokens_in", "tokens_out", "model", "seal"]:
            raise ConfigError(
                f"{path} is a database of something else: its table of answers holds the columns "
                f"{', '.join(found)}.",
                then="Name another file with the option cache.",
            )
    except BaseException:
        connection.close()
        raise
    return connection


def _move_aside(path: Path) -> Path:
    """Give a file, and what SQLite keeps beside it, another name."""
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    os.replace(path, aside)
    for suffix in SIDE_FILES:
        with suppress(FileNotFoundError):
            os.replace(f"{path}{suffix}", f"{aside}{suffix}")
    return aside


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process at a time open the file, so that two do not both move it aside."""
    with open(path.with_name(f"{path.name}.lock"), "ab") as file:
        with suppress(OSError):  # a disk without locks: SQLite's own remain
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _cannot_write(path: Path, error: sqlite3.Error) -> DiskError:
    return DiskError(
        f"the cache of answers {path} could not be used: {error}.",
        safe="Answers that were committed stay in it.",
        then="Free some space or check its permissions, and run the same command again; or name "
        "another file with the option cache.",
    )


def _seal(key: str, row: Sequence[Any]) -> str:
    return fsio.digest_bytes(json.dumps([key, *row], ensure_ascii=True).encode("ascii"))
