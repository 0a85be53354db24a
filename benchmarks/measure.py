"""What every timed process needs, whichever environment it runs in: torch and the standard library.

A process times one float32 matrix product before and after its work. Two figures that were taken
beside different products cannot be compared; and the ratio of a time to a product's carries over to
other machines better than the time does.
"""

import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

SIZE = 2048


def calibrate(rounds: int = 5, size: int = SIZE) -> float:
    """Return the rate of a float32 product of two size x size matrices, in GFLOP/s: the best."""
    import torch  # which a process that times nothing with it does without

    a, out = torch.randn(size, size), torch.empty(size, size)
    times = timed(lambda: torch.mm(a, a, out=out), rounds + 1)[1:]
    return 2 * size**3 / min(times) / 1e6


def timed(function, rounds: int) -> list[float]:
    """Return how long each of several calls took, in ms."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        function()
        times.append((time.perf_counter() - began) * 1e3)
    return times


def peak_mb() -> float:
    """Return the largest resident memory of this process so far, mapped files included, in MB.

    Linux's VmHWM begins anew with each program; ru_maxrss would count the parent's memory too.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def summary(times: list[float]) -> str:
    """Return the median and the least of some times."""
    return f"{statistics.median(times):.0f} ({min(times):.0f})"


def take_turns(
    ways: dict[str, Callable[[], object]], rounds: int, quiet: float
) -> tuple[list[dict[str, float]], float]:
    """Time several ways to the same result, one after the other, in several rounds.

    Args:
        ways: What to time, by name.
        rounds: How often.
        quiet: A round beside whose product ran slower than this share of the best is left out.

    Returns:
        For each round that is kept the ms of each way, and the best rate of the product, GFLOP/s.
    """
    measured: list[tuple[float, dict[str, float]]] = []
    for _ in range(rounds):
        before = calibrate()
        times = {name: timed(way, 1)[0] for name, way in ways.items()}
        measured.append((min(before, calibrate()), times))
        print({name: round(ms) for name, ms in times.items()}, round(measured[-1][0]), flush=True)
    best = max(rate for rate, _ in measured)
    return [times for rate, times in measured if rate >= quiet * best], best
