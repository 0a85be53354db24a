"""The page that the benchmarks write: each has one place in docs/performance.md."""

import os
import platform
import shlex
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from saefty import fsio
from saefty.report import Column, Table

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def put(name: str, command: str, columns: dict[str, str], rows: list[dict], note: str = "") -> None:
    """Put a table between the marks of its name, with the command, the machine and the versions."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = page.split(begin)
    _, after = rest.split(end)
    parts = [begin, f"`{command}` on {machine()}.{note}", "", table(columns, rows), end]
    fsio.commit_text(PAGE, before + "\n".join(parts) + after)


def given_command() -> str:
    """Return the command that is running, as it was typed."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def table(columns: dict[str, str], rows: list[dict]) -> str:
    """Return rows in Markdown, under the headings of `columns`; cells are text already."""
    return Table(tuple(Column(key, text) for key, text in columns.items()), tuple(rows)).markdown()


def rates(
    kept: list[dict[str, float]],
    amount: int,
    slow: str,
    gaps: dict[str, float],
    digits: int = 0,
) -> list[dict]:
    """Return one row of text for each way that was timed.

    Args:
        kept: The ms of each way, round by round.
        amount: What a way does, in the unit of the rate.
        slow: The way that the others are compared with.
        gaps: How far each way's result is from the true one.
        digits: Decimals of the rates.
    """
    found = {name: [amount / times[name] * 1e3 for times in kept] for name in gaps}
    base = statistics.median(found[slow])
    return [
        {
            "way": name,
            "median": f"{statistics.median(values):,.{digits}f}",
            "best": f"{max(values):,.{digits}f}",
            "ratio": f"{statistics.median(values) / base:.2f}",
            "gap": f"{gaps[name]:.0e}",
        }
        for name, values in found.items()
    ]


def machine() -> str:
    """Return what the figures depend on besides the code."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numpy"))
    return (
        f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; "
        f"Python {platform.python_version()}, {versions}"
    )


def processor() -> str:
    """Return the processor's name and the matrix units that torch can use."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    units = {"AMX": "_is_amx_tile_supported", "AVX-512": "_is_avx512_supported"}
    found = [unit for unit, name in units.items() if getattr(torch.cpu, name, bool)()]
    return " with ".join([(names or [platform.machine()])[0], *filter(None, [" and ".join(found)])])
