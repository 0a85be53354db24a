"""A run folder: one execution of a stage, with everything needed to trust, resume and repeat it.

    metadata.json   configuration, inputs, seeds, git commit, versions; fixed when the run starts
    journal.jsonl   when the run was started or resumed, and by which process
    finished.json   figures and the ledger; written last, so that its presence means "complete"
    .lock           held while a process writes in the folder

The same command on an existing folder resumes it. What the folder was started with must be what it
is resumed with: the keys that differ are printed, and nothing is touched. A run that is refused
before it has done any work leaves no folder.
"""

import fcntl
import json
import logging
import os
import platform
import secrets
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from saefty import fsio
from saefty.config import Config, differing_keys
from saefty.errors import ConfigError, LockedError, MismatchError, SaeftyError

log = logging.getLogger(__name__)

METADATA, FINISHED, JOURNAL, LOCK = "metadata.json", "finished.json", "journal.jsonl", ".lock"
RECORDED_PACKAGES = ("saefty", "torch", "transformers", "tokenizers", "numpy", "safetensors")
RESUME_FREE = ("run.", "engine.", "output.")
"""Keys that do not change results, so that a run may be resumed with other values of them."""


class RunSection(Config):
    """Where a run's folder lies."""

    dir: Path | None = None
    """The run's folder; None makes `<root>/<kind>/<id>`. An existing folder is resumed."""

    root: Path = Path("artifacts")
    """The folder of all runs."""

    id: str | None = None
    """The run's name below `<root>/<kind>`; None generates one from the time."""


@dataclass
class Ledger:
    """What became of every row that came in: in = ok + skipped + failed."""

    ok: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Rows that came in."""
        return self.ok + self.skipped.total() + self.failed.total()

    def as_record(self) -> dict[str, Any]:
        """Return the ledger as JSON values."""
        return {
            "in": self.total,
            "ok": self.ok,
            "skipped": dict(sorted(self.skipped.items())),
            "failed": dict(sorted(self.failed.items())),
        }

    def __str__(self) -> str:
        def listed(counts: Counter[str]) -> str:
            reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(counts.items()))
            return f"{counts.total()}" + (f" ({reasons})" if reasons else "")

        return (
            f"in {self.total} = ok {self.ok} + skipped {listed(self.skipped)} "
            f"+ failed {listed(self.failed)}"
        )


class Run:
    """One execution of a stage in its folder; a context manager that holds the folder's lock.

    Args:
        folder: The run's folder; created if missing, resumed if it holds a run.
        stage: The command, such as "extract".
        config: The resolved configuration.
        inputs: What the results depend on beside the configuration: fingerprints of the model, the
            tokenizer, the data, the store or the SAE.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.stage = stage
        self.ledger = Ledger()
        # Through JSON and back, so that tuples and lists compare equal with what is on disk.
        self._facts = json.loads(
            fsio.dump_json({"stage": stage, "config": config, "inputs": inputs or {}})
        )
        self._lock = FolderLock(folder)

    def __enter__(self) -> "Run":
        if self.folder.is_dir() and not (self.folder / LOCK).exists():
            self._refuse_foreign_folder()  # before a lock file is put into it
        self._lock.acquire()
        try:
            self._start_or_resume()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, SaeftyError) and self._holds_no_work():
            # Settings that were refused before any work must not bind the next command.
            self._withdraw()
        elif error is not None:
            # The command line names the folder in the line that resumes the run.
            error.run_folder = self.folder  # type: ignore[attr-defined]
        self._lock.release()

    @property
    def fingerprint(self) -> str:
        """A checksum of everything that the results depend on."""
        return fsio.digest_bytes(fsio.dump_json(_decisive(self._facts)).encode())

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return (self.folder / FINISHED).exists()

    @property
    def figures(self) -> dict[str, Any]:
        """The figures of a complete run."""
        return dict(fsio.read_sealed(self.folder / FINISHED)["figures"])

    def finish(self, figures: Mapping[str, Any]) -> None:
        """Mark the run complete; its figures and ledger are written last."""
        record = {"stage": self.stage, "figures": figures, "ledger": self.ledger.as_record()}
        fsio.commit_sealed(self.folder / FINISHED, record)
        log.info("%s: %s", self.stage, self.ledger)

    def _holds_no_work(self) -> bool:
        return {path.name for path in self.folder.iterdir()} <= {METADATA, JOURNAL, LOCK}

    def _withdraw(self) -> None:
        for name in (METADATA, JOURNAL, LOCK):
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # not empty: another process has just come
            self.folder.rmdir()

    def _start_or_resume(self) -> None:
        path = self.folder / METADATA
        self._refuse_foreign_folder()
        swept = fsio.remove_temporaries(self.folder)
        if path.exists():
            self._check_same(fsio.read_sealed(path))
        else:
            fsio.commit_sealed(path, {**self._facts, **_circumstances()})
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "temporaries_removed": swept,
        }
        fsio.append_line(self.folder / JOURNAL, start)

    def _check_same(self, old: Mapping[str, Any]) -> None:
        changed = differing_keys(_decisive(old), _decisive(self._facts))
        if changed:
            raise MismatchError(
                f"{self.folder} holds a run of other settings (run -> this command):\n  "
                + "\n  ".join(line.removeprefix("config.") for line in changed),
                safe="The run in the folder is unchanged.",
                then="Restore these settings to resume it, or set run.dir to a new folder.",
            )

    def _refuse_foreign_folder(self) -> None:
        held = {path.name for path in self.folder.iterdir()}
        # A run that was killed at once leaves no more than its lock and half of its metadata.
        foreign = sorted(
            name
            for name in held - {LOCK}
            if not (name.startswith(fsio.TEMP_PREFIX) and name.endswith(METADATA))
        )
        if foreign and METADATA not in held:
            raise ConfigError(
                f"{self.folder} is not empty and holds no run: {', '.join(foreign[:5])}.",
                safe="Nothing in it was touched.",
                then="Set run.dir to a new or empty folder.",
            )


class FolderLock:
    """Allow one writing process a folder; a lock left by a dead process is taken over.

    Args:
        folder: The folder; created if missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            LockedError: If another process holds it; the message names that process.
            ConfigError: If the folder cannot be made.
        """
        try:
            handle = self._open()
        except OSError as error:
            raise ConfigError(
                f"the folder {self.folder} cannot be used: {error.strerror or error}.",
                then="Set run.dir (or run.root) to a folder that can be written.",
            ) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 1000, 0).decode("utf-8", "replace").strip()
            os.close(handle)
            raise LockedError(
                f"another process is writing in {self.folder}: {holder or 'unknown'}.",
                safe="Its work goes on undisturbed.",
                then="Wait until it ends, or set run.dir to another folder.",
            ) from None
        if not self._is_current(handle):  # the holder withdrew between our opening and locking
            os.close(handle)
            return self.acquire()
        os.ftruncate(handle, 0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        note = f"pid {os.getpid()} on {socket.gethostname()} since {started}"
        os.pwrite(handle, note.encode(), 0)
        self._handle = handle
        return None

    def _open(self) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        return os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)

    def _is_current(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), (self.folder / LOCK).stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give the lock back; the file stays, empty of meaning."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def run_folder(section: RunSection, kind: str) -> Path:
    """Return the folder of a run: `run.dir`, else `<root>/<kind>/<id>` with a fresh id.

    Ids are unique even when many processes start within one second.

    Raises:
        ConfigError: If the folder cannot be made.
    """
    if section.dir is not None:
        return section.dir
    if section.id is not None:
        return fsio.safe_join(section.root / kind, section.id)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    while True:
        folder = section.root / kind / f"{stamp}-{secrets.token_hex(2)}"
        try:
            folder.mkdir(parents=True, exist_ok=False)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(
                f"the folder {folder} cannot be made: {error.strerror or error}.",
                then="Set run.root or run.dir to a folder that can be written.",
            ) from None


def find_run(given: str | Path, kind: str, root: Path = Path("artifacts")) -> Path:
    """Return the folder of an earlier run: a path, or `latest` for the newest complete one.

    Raises:
        ConfigError: If there is no such run, or it is not complete.
    """
    if str(given) == "latest":
        markers = sorted(
            (root / kind).glob(f"*/{FINISHED}"), key=lambda marker: marker.stat().st_mtime
        )
        if not markers:
            raise ConfigError(
                f"there is no complete run below {root / kind}.",
                then="Run that stage first, or name a run's folder.",
            )
        return markers[-1].parent
    folder = Path(given)
    if not folder.is_dir():
        raise ConfigError(
            f"there is no folder {folder}.", then="Name a run's folder, or write latest."
        )
    if (folder / METADATA).exists() and not (folder / FINISHED).exists():
        raise ConfigError(
            f"the run in {folder} is not complete.",
            then="Run its command again to resume it, then this one.",
        )
    return folder


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return what a run was started with."""
    return fsio.read_sealed(folder / METADATA)


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    versions = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _decisive(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what the results depend on: not where the run lies or how many workers share it."""
    config = {
        section: value
        for section, value in facts["config"].items()
        if not f"{section}.".startswith(RESUME_FREE)
    }
    return {"stage": facts["stage"], "config": config, "inputs": facts["inputs"]}


def _circumstances() -> dict[str, Any]:
    return {
        "git_sha": _git_sha(),
        "versions": package_versions(),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _git_sha() -> str | None:
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],  # noqa: S607 - whichever git the user has
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
