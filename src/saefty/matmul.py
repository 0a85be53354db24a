"""What multiplies float32 matrices on the CPU: torch's own choice, or what is faster there.

On some processors torch's default reaches less than half of what oneDNN does at the same accuracy.
The way there is a setting that *allows* oneDNN to round to tf32 or bfloat16 first: many processors
do not, and those with units for it really do. Processors with tile registers multiply float32 out
of bfloat16 (`kernels/split.py`). So all are tried on one small product at first use: the fastest
whose error against float64 is that of float32 is taken, and only where it is worth it.

The choice holds within `products` alone: oneDNN's setting is one for the whole process and is put
back on leaving, tiles are used by the thread that entered. The last bits of results depend on the
choice: a run notes it and goes on with it. torch is imported by the functions that need it, for
commands that multiply nothing read this file too.
"""

import importlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from saefty.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

log = logging.getLogger(__name__)

DEFAULT, TILES = "default", "amx-bf16x3"
ALLOWED = {DEFAULT: "ieee", TILES: "ieee", "onednn-tf32": "tf32", "onednn-bf16": "bf16"}
"""Each way to multiply, and what oneDNN is allowed in it; `ieee` leaves the product to the default.

None of them is used where it rounds to what it allows. Tiles take what they can, the default the
rest.
"""

VARIABLE = "SAEFTY_MATMUL"
"""The variable of the environment that names the way to multiply, in place of the trial."""

TIMES_DEFAULT = 4.0
"""The largest error that counts as float32's, in errors of torch's default (oneDNN's: 1 to 3)."""

FLOAT32 = 2.0**-20
"""The largest error of a float32 product, relative to |x| |w| (here 1e-7; bfloat16's is 4e-4)."""

WORTH, WORTH_OF = 1.5, {TILES: 1.0}
"""How many times as fast another way must be: two runs must not choose differently by chance.

Tiles gain more with larger products than the trial's (1.5 to 2 times), so they need not be faster
by much there; they are nowhere near a tie.
"""

TIMED, TURNS = ((256, 512), (512, 512)), 3
"""The shapes of the product that is timed, and how often."""

TRIED = (((32, 256), (256, 512)), ((1, 256), (256, 515)), ((67, 300), (300, 129)),
         ((3, 40, 64), (3, 64, 41)))  # fmt: skip
"""Shapes whose error is looked at: a library may do one product otherwise than another."""


@dataclass(frozen=True)
class Measured:
    """How long a way to multiply took for the trial product, and by how much it can be wrong."""

    ms: float
    """On one thread, which has the processor to itself; infinite for a way that is not accurate."""
    error: float
    """The largest error of an entry against float64, relative to the norms of row and column."""


Multiply = Callable[["Tensor", "Tensor"], "Tensor"]


class _InForce:
    """The way that holds now in this process, and how many contexts want it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.way: str | None = None
        self.contexts = 0
        self.before = ""


class _Here(threading.local):
    """What holds in one thread alone."""

    in_tiles = False


_in_force, _here = _InForce(), _Here()
_settled: str | None = None


def settle(noted: str | None = None) -> str:
    """Choose what `products` takes from now on in this process; return it.

    Args:
        noted: What a run that goes on was begun with; None for a new one.

    Returns:
        `noted`, if it can be had here with the accuracy of float32 and the environment names no
        other; else the fastest. A caller to whom another one matters compares them.

    Raises:
        ConfigError: If the environment names one that there is not, or that is not accurate here.
    """
    global _settled
    _settled = choose(noted)
    return _settled


def choose(noted: str | None = None) -> str:
    """Return what `settle` would choose, without settling on it."""
    found = measured()  # in any case: once a context is open, another way cannot be tried
    asked = os.environ.get(VARIABLE, "").strip()
    if asked:
        return _checked(asked)
    return noted if noted is not None and _is_accurate(noted) else decide(found)


def chosen() -> str:
    """Return what `products` takes: what was settled, else the fastest."""
    return settle() if _settled is None else _settled


def record() -> dict[str, Any]:
    """Return what a run's metadata says of the choice; empty where none was made.

    With it stand the errors of the ways there are, but no times: a run that is repeated says the
    same.
    """
    return {} if _settled is None else {"matmul": {"chosen": _settled, "errors": errors()}}


def errors() -> dict[str, str]:
    """Return the largest error of each way to multiply, to the digit that does not vary."""
    return {way: f"{one.error:.0e}" for way, one in measured().items()}


def decisive() -> dict[str, str]:
    """Return what a run's results depend on: the choice, or nothing for torch's default.

    What was made before there was a choice says nothing either.
    """
    return {} if chosen() == DEFAULT else {"matmul": chosen()}


@contextmanager
def products(way: str | None = None) -> Iterator[None]:
    """Multiply float32 matrices on the CPU one way, and put torch's setting back on leaving.

    Contexts nest, also across threads; the one that is open decides for those within it.

    Args:
        way: Which; None takes the one that holds already, else what was chosen.

    Raises:
        ConfigError: If another way is open, in another thread or around this one.
    """
    _enter(way)
    try:
        with _tiles():
            yield
    finally:
        _leave()


@contextmanager
def _tiles() -> Iterator[None]:
    """Use tiles in this thread, if they are what holds and it does not yet."""
    if _in_force.way != TILES or _here.in_tiles:
        yield
        return
    _here.in_tiles = True
    try:
        with _split().SplitProducts():
            yield
    finally:
        _here.in_tiles = False


def _split() -> Any:
    # The kernels stand a floor above, and import this file.
    return importlib.import_module("saefty.kernels.split")


def decide(found: Mapping[str, Measured]) -> str:
    """Return the fastest way that is as accurate as float32, and torch's default in a near tie."""
    default = found[DEFAULT]
    if default.error > FLOAT32:
        log.warning(
            "torch's float32 products are wrong by %.0e of the norms, beyond float32 (%.0e)",
            default.error, FLOAT32,
        )  # fmt: skip
    accurate = {way: one for way, one in found.items() if _as_float32(one, default)}
    worth = {way: one.ms * WORTH_OF.get(way, WORTH) for way, one in accurate.items()}
    best = min(worth, key=lambda way: worth[way], default=DEFAULT)
    return best if worth.get(best, default.ms) <= default.ms else DEFAULT


def probe(ways: Mapping[str, Multiply]) -> dict[str, Measured]:
    """Measure ways to multiply on small products.

    They take turns on one thread, and the least of its own time counts, so that what else runs on
    the machine does not decide. A way that was wrong once is not tried on.
    """
    import torch

    draw = torch.Generator().manual_seed(0)
    sizes = [[math.prod(shape) for shape in shapes] for shapes in (*TRIED, TIMED)]
    left, right = (
        torch.randn(max(several), generator=draw, dtype=torch.float32)
        for several in zip(*sizes, strict=True)
    )

    def drawn(shapes: tuple[tuple[int, ...], ...]) -> "list[Float[Tensor, '...']]":
        pools = zip((left, right), shapes, strict=True)
        return [pool[: math.prod(shape)].view(shape) for pool, shape in pools]

    errors, times = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, float("inf"))
    with _one_thread():
        for shapes in TRIED:
            x, w = drawn(shapes)
            x64, w64 = x.double(), w.double()
            true = x64 @ w64
            norms = x64.norm(dim=-1, keepdim=True) * w64.norm(dim=-2, keepdim=True)
            for laid_out in (w, w.mT.contiguous().mT):
                for way, multiply in ways.items():
                    if way == DEFAULT or errors[way] <= FLOAT32:
                        error = float(((multiply(x, laid_out) - true).abs() / norms).max())
                        errors[way] = max(errors[way], error)
        x, w = drawn(TIMED)
        worth_it = {way: multiply for way, multiply in ways.items() if errors[way] <= FLOAT32}
        for turn in range(TURNS + 1):
            for way, multiply in worth_it.items():
                begun = time.thread_time()
                multiply(x, w)
                if turn:  # the first use prepares much
                    times[way] = min(times[way], time.thread_time() - begun)
    return {way: Measured(times[way] * 1e3, errors[way]) for way in ways}


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def measured() -> dict[str, Measured]:
    """Return what the trial found in this process."""
    there = {DEFAULT: True, TILES: _split().ready()}
    found = probe({way: _multiplied(way) for way in ALLOWED if there.get(way, _has_switch())})
    log.debug("float32 products: %s", found)
    return found


def _multiplied(way: str) -> Multiply:
    import torch

    def multiply(
        x: "Float[Tensor, '*batch rows inner']", w: "Float[Tensor, '*batch inner columns']"
    ) -> "Float[Tensor, '*batch rows columns']":
        with torch.no_grad(), products(way):
            return x @ w

    def by_tiles(
        x: "Float[Tensor, '*batch rows inner']", w: "Float[Tensor, '*batch inner columns']"
    ) -> "Float[Tensor, '*batch rows columns']":
        found = _split().multiply(x, w) if x.dim() == 2 else None
        return x @ w if found is None else found

    return by_tiles if way == TILES else multiply


def _as_float32(one: Measured, default: Measured) -> bool:
    return one.error <= min(TIMES_DEFAULT * default.error, FLOAT32)


def _is_accurate(way: str) -> bool:
    found = measured()
    return way == DEFAULT or (way in found and _as_float32(found[way], found[DEFAULT]))


def _checked(asked: str) -> str:
    """Return a way that the environment names."""
    if asked not in ALLOWED:
        raise ConfigError(
            f"{VARIABLE} is {asked}, which is no way to multiply matrices.",
            then=f"Set it to one of {', '.join(ALLOWED)}, or unset it: the fastest is taken then.",
        )
    if not _is_accurate(asked):
        found = measured()
        error = f"{found[asked].error:.0e}" if asked in found else "not known: torch has no switch"
        raise ConfigError(
            f"{VARIABLE} is {asked}, whose products are less accurate than float32 here: their "
            f"error is {error}, and that of torch's default {found[DEFAULT].error:.0e}.",
            then=f"Unset {VARIABLE}, or set it to {DEFAULT}.",
        )
    return asked


def _enter(way: str | None) -> None:
    # Choosing may measure, which enters by itself, so it cannot wait for the lock.
    wanted = chosen() if way is None and _in_force.way is None else way
    with _in_force.lock:
        held = _in_force.way
        if held is None and wanted is not None:
            _in_force.before = _allow(ALLOWED[wanted])
            _in_force.way = held = wanted
        if held is not None and way in (None, held):
            _in_force.contexts += 1
            return
    if held is None:  # another thread has just left it
        _enter(chosen())
        return
    raise ConfigError(
        f"this process multiplies matrices by {held} now, and by {way} is asked for.",
        then="Do one after the other, or in processes of their own.",
    )


def _leave() -> None:
    with _in_force.lock:
        _in_force.contexts -= 1
        if not _in_force.contexts:
            _in_force.way = None
            _allow(_in_force.before)


def _has_switch() -> bool:
    """Return whether torch can be told what oneDNN may do in matrix products alone (2.9 can)."""
    import torch

    return torch.backends.mkldnn.is_available() and hasattr(torch.backends.mkldnn, "matmul")


def _allow(precision: str) -> str:
    """Tell torch what oneDNN may round float32 products to; return what it was told before."""
    import torch

    if not _has_switch():
        return precision
    backend: Any = torch.backends.mkldnn
    before = str(backend.matmul.fp32_precision)
    # What is not set does the same, and stays not set.
    if before != precision and {before, precision} != {"none", "ieee"}:
        backend.matmul.fp32_precision = precision
    return before
