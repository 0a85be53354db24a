"""What carries out a training's arithmetic: chosen once a run, reused when the run goes on.

Sums come out with other last bits on another device, with other kernels, and on another number of
threads. So a run notes them in `backend.json`: a resumed run takes the number of threads from
there, wherever it is resumed, and is refused on another device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from saefty import fsio
from saefty.config import differing_keys
from saefty.errors import MismatchError
from saefty.kernels import compiled
from saefty.kernels.base import choose_kernels

BACKEND, REASON = "backend.json", "reason"


@dataclass(frozen=True)
class Backend:
    """A device, a set of kernels, and how many threads torch uses within one operation."""

    device: str
    kernels: str
    threads: int

    @classmethod
    def choose(cls, folder: Path, device: str, threads: int | None = None) -> "Backend":
        """Return the backend of a run: the one it was begun with, or a new one.

        Args:
            folder: The run's folder.
            device: `auto` (cuda, else cpu) or a device of torch.
            threads: How many threads; None takes what the run was begun with, else torch's number.

        Raises:
            MismatchError: If the run was begun with another device, or with another number of
                threads than the one that is asked for.
            IntegrityError: If the note of it is damaged.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        path = folder / BACKEND
        begun = fsio.read_json(path) if path.is_file() else None
        kernels = type(choose_kernels(device, begun and begun["kernels"])).__name__
        chosen = cls(device, kernels, threads or torch.get_num_threads())
        if begun is None:
            return chosen
        if threads is None:
            chosen = replace(chosen, threads=int(begun["threads"]))
        begun = {key: value for key, value in begun.items() if key != REASON}
        differing = differing_keys({"backend": begun}, {"backend": asdict(chosen)})
        if differing:
            raise MismatchError(
                "\n".join(["the interrupted training was begun with another backend:", *differing]),
                safe=f"What was trained in {folder} is kept.",
                then="Use the same to continue it, or set run.dir to a new folder.",
            )
        return chosen

    def note(self, folder: Path) -> None:
        """Write the backend into a run's folder, and why it has these kernels."""
        reason = compiled.library().reason if self.device == "cpu" else "the device is no CPU"
        fsio.commit_json(folder / BACKEND, {**asdict(self), REASON: reason})

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Give torch this number of threads, and back its own on leaving."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
