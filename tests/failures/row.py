"""One row of the table of failures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A failure, what is expected, and the tests that hold it."""

    failure: str
    answer: str
    tests: tuple[str, ...] = ()
    """Names of test functions, wherever they stand."""
    open: str = ""
    """What is not proven here, and why."""
