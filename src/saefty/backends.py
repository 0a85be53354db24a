"""What carries out a training's arithmetic: chosen once a run, reused when the run goes on.

Sums come out with other last bits on another device, with other kernels, by another way to multiply
matrices, in another precision, and on another number of threads. So a run notes them in
`backend.json`: a resumed run takes the number of threads and the way to multiply from there, and is
refused on another device, or where that way is less accurate than float32.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from saefty import fsio, matmul
from saefty.config import differing_keys
from saefty.errors import MismatchError
from saefty.kernels import compiled, triton_sparse
from saefty.kernels.base import choose_kernels
from saefty.kernels.rough import in_bfloat16

log = logging.getLogger(__name__)

BACKEND = "backend.json"
MATMUL, REASON, ERRORS = "matmul", "reason", "matmul_errors"
PRECISION, FLOAT32, BFLOAT16 = "precision", "float32", "bfloat16"


@dataclass(frozen=True)
class Backend:
    """A device, kernels, how many threads torch uses within one operation, what multiplies."""

    device: str
    kernels: str
    threads: int
    matmul: str = matmul.DEFAULT
    precision: str = FLOAT32
    """Of the product by which the encoder proposes latents."""

    @classmethod
    def choose(
        cls, folder: Path, device: str, threads: int | None = None, precision: str = FLOAT32
    ) -> "Backend":
        """Return the backend of a run: the one it was begun with, or a new one.

        Args:
            folder: The run's folder.
            device: `auto` (cuda, else cpu) or a device of torch.
            threads: How many threads; None takes what the run was begun with, else torch's number.
            precision: That of the encoder's product, where the device gains by it.

        Raises:
            MismatchError: If the run was begun with another device, with another number of
                threads than the one that is asked for, or with a way to multiply that is not
                accurate here or not the one that the environment names.
            ConfigError: If the environment names a way to multiply that cannot be had here.
            IntegrityError: If the note of it is damaged.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        path = folder / BACKEND
        begun: dict[str, Any] = fsio.read_json(path) if path.is_file() else {}
        if begun:  # a note that says nothing of it is of a run by torch's default
            begun = {MATMUL: matmul.DEFAULT, PRECISION: FLOAT32, **begun}
        exact = choose_kernels(device, begun.get("kernels"))
        kernels = type(exact).__name__
        if precision != FLOAT32:  # a run that could not have it when it began goes on without
            precision = begun.get(PRECISION, precision)
        if precision != FLOAT32 and in_bfloat16(exact) is None:
            if not begun:
                log.warning("%s gains nothing by %s: float32 is used", device, precision)
            precision = FLOAT32
        on_cpu = torch.device(device).type == "cpu"
        way = matmul.choose(begun.get(MATMUL)) if on_cpu else matmul.DEFAULT
        chosen = cls(device, kernels, threads or torch.get_num_threads(), way, precision)
        if not begun:
            return chosen
        if threads is None:
            chosen = replace(chosen, threads=int(begun["threads"]))
        begun = {key: value for key, value in begun.items() if key not in (REASON, ERRORS)}
        differing = differing_keys({"backend": begun}, {"backend": asdict(chosen)})
        if differing:
            raise MismatchError(
                "\n".join(["the interrupted training was begun with another backend:", *differing]),
                safe=f"What was trained in {folder} is kept.",
                then="Use the same to continue it, or set run.dir to a new folder.",
            )
        return chosen

    def note(self, folder: Path) -> None:
        """Write the backend into a run's folder, and why it has these kernels.

        With it stand the errors of the ways to multiply, but not how long each took: what is
        written twice is the same.
        """
        reason = compiled.library().reason if self.device == "cpu" else "the device is no CPU"
        if torch.device(self.device).type == "cuda":
            reason = triton_sparse.programs().reason
        facts = {**asdict(self), REASON: reason, ERRORS: matmul.errors()}
        fsio.commit_json(folder / BACKEND, facts)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Give torch these threads and this way to multiply, and back its own on leaving."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with matmul.products(self.matmul):
                yield
        finally:
            torch.set_num_threads(before)
