"""Work for worker processes, which import this file by its name: light, so that they start fast."""

import logging
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from saefty import matmul
from saefty.errors import MismatchError

log = logging.getLogger("saefty.jobs")


@dataclass(frozen=True)
class Squares:
    """Squares numbers, or does to its process what the number says."""

    folder: Path
    fatal: frozenset[int] = frozenset()
    """Numbers that kill the process each time."""
    fatal_once: frozenset[int] = frozenset()
    refused: frozenset[int] = frozenset()
    broken: frozenset[int] = frozenset()

    def __call__(self):
        return self.square

    def square(self, number, report):
        report.begin(number)
        mark = self.folder / f"killed_{number}"
        if number in self.fatal or (number in self.fatal_once and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if number in self.refused:
            raise MismatchError("3 is not 4.", safe="All is safe.", then="Use 4.")
        if number in self.broken:
            raise KeyError("a bug")
        log.warning("number %d", number)
        report.advance(number)
        return number, number**2, os.getpid()


@dataclass(frozen=True)
class NeverOpens:
    """Dies before its first task."""

    def __call__(self):
        os._exit(3)


@dataclass(frozen=True)
class Multiplying:
    """Tells how its process multiplies matrices."""

    def __call__(self):
        return lambda task, report: matmul.chosen()
