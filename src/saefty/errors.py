"""What a user can mend: every error that saefty raises on purpose, each with its exit code.

A message says what is wrong, with both values; `safe` says what is already on disk and stays valid;
`then` is the next step in the user's own words (a key, a flag, a command). The command line prints
the three without a traceback. A caller's mistake in Python is a `ValueError` instead, and what only
a bug of ours could break is an `assert`.
"""

from typing import ClassVar


class SaeftyError(Exception):
    """Report something a user can mend.

    Args:
        message: What is wrong, with both values.
        safe: What is already written and stays valid.
        then: The next step, as a command or a key to set.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, safe: str = "", then: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.safe = safe
        self.then = then

    def __str__(self) -> str:
        return "\n".join(part for part in (self.message, self.safe, self.then) if part)

    def as_record(self) -> dict[str, str | int]:
        """Return the error as one JSON object, for programs that read standard error."""
        return {
            "error": type(self).__name__,
            "exit_code": self.exit_code,
            "message": self.message,
            "safe": self.safe,
            "then": self.then,
        }


class ConfigError(SaeftyError):
    """A key, a value or a flag that cannot be used."""

    exit_code = 2


class UnknownNameError(ConfigError):
    """A name that no registry, folder or table holds."""


class MissingExtraError(ConfigError):
    """A feature whose optional packages are not installed."""


class InputError(SaeftyError):
    """Data that cannot be used: empty, unreadable, without labels."""

    exit_code = 3


class IntegrityError(SaeftyError):
    """A file whose bytes are not the ones that were written."""

    exit_code = 4


class ResourceError(SaeftyError):
    """The machine ran out of something."""

    exit_code = 5


class DiskError(ResourceError):
    """A file could not be written: the disk is full, read-only or failing."""


class LockedError(ResourceError):
    """Another process is writing in the same folder."""


class MismatchError(SaeftyError):
    """Two things that do not belong together: a layer, a width, a tokenizer, a configuration."""

    exit_code = 6


class ExternalError(SaeftyError):
    """A service outside the machine failed: a hub, a judge."""

    exit_code = 7


class UnsafeArtifactError(SaeftyError):
    """A file that could run code if it were loaded."""

    exit_code = 8


class NumericError(SaeftyError):
    """Numbers that must not be used: NaN, infinity, a diverged loss."""

    exit_code = 9
