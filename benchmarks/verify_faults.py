"""Which cause `saefty sae verify` names for each planted fault: the table in docs/verify.md.

Usage: PYTHONPATH=src:tests:benchmarks python benchmarks/verify_faults.py

SAEs of the sandbox's model are trained, each fault is planted in the files of a copy
(tests/planted_faults.py), and the copy is checked twice: on the very texts that its record was
taken on, and on others of the same world. Exits with 1 if a cause is not the planted one.
"""

import sys
import tempfile
from pathlib import Path

import torch

import planted_faults
from page import table
from saefty import fsio
from saefty.config import build_config
from saefty.stages.verify import VerifyConfig, check

PAGE = Path(__file__).parents[1] / "docs" / "verify.md"
COMMAND = "PYTHONPATH=src:tests:benchmarks python benchmarks/verify_faults.py"
COLUMNS = {
    "fault": "planted", "l0": "L0 (record {l0:.2f})", "fvu": "FVU (record {fvu:.4f})",
    "own": "named, own texts", "l0_after": "L0 restored", "fvu_after": "FVU restored",
    "other": "named, other texts", "distance": "distance there", "next": "next nearest there",
}  # fmt: skip


def verified(sae, model, examples=None):
    settings = {"model": {"name": str(model)}, "verify": {"sae": str(sae)}}
    return check(build_config(VerifyConfig, settings), examples=examples).verdict


def named(verdict):
    if verdict.healthy:
        return "healthy"
    return verdict.cause or " or ".join(verdict.possible) or "none"


def row(fault, own, other):
    wanted = "healthy" if fault == "none" else fault
    first = own.results[0].figures
    tried = [one for one in own.results[1:] if not one.trial.evidence]
    best = own.results[0] if own.healthy else tried[0]
    there = [one for one in other.results[1:] if not one.trial.evidence]
    rest = [one for one in there if one.trial.cause != fault and not one.idle]
    rest.sort(key=lambda one: one.distance)  # the report ranks by L0 and FVU
    nearest = other.results[0] if other.healthy else there[0]
    return {
        "fault": fault,
        "l0": f"{first.l0.value:.2f}",
        "fvu": f"{first.fvu.value:.4g}",
        "own": named(own) + ("" if named(own) == wanted else " (WRONG)"),
        "l0_after": f"{best.figures.l0.value:.2f}",
        "fvu_after": f"{best.fvu:.4f}",
        "other": named(other) + ("" if named(other) == wanted else " (WRONG)"),
        "distance": f"{nearest.distance:.2f}",
        "next": f"{rest[0].trial.cause}, {rest[0].distance:.1f}" if rest else "–",
    }


def main():
    torch.set_num_threads(1)
    other = planted_faults.texts(900, 77)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planted_faults.train_all(folder, 1200)
        metrics = fsio.read_json(folder / planted_faults.PLANTED / "layer_1" / "metrics.json")
        for number, fault in enumerate(planted_faults.PLANTS):
            sae, model = planted_faults.plant(fault, folder, folder / f"case_{number}")
            rows.append(row(fault, verified(sae, model), verified(sae, model, other)))
    known = {"l0": metrics["l0_mean"], "fvu": metrics["fvu"]}
    columns = {key: heading.format(**known) for key, heading in COLUMNS.items()}
    begin, end = "<!-- faults: begin -->", "<!-- faults: end -->"
    before, rest = PAGE.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    lines = [begin, f"Made by `{COMMAND}`.", "", table(columns, rows), end]
    fsio.commit_text(PAGE, before + "\n".join(lines) + after)
    sys.stdout.write(table(columns, rows))
    return int(any("WRONG" in cell for one in rows for cell in one.values()))


if __name__ == "__main__":
    sys.exit(main())
