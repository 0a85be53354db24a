"""Which cause `saefty doctor` names for each patient of the zoo: the tables in docs/healthy-sae.md.

Usage: PYTHONPATH=src:tests:benchmarks python benchmarks/doctor_zoo.py [--seeds 0,1,2] [--write]

SAEs of the sandbox's model are trained and one fault is planted in each (tests/zoo.py), without a
record of their figures; healthy ones stand beside them. Texts and trainings differ from seed to
seed. Three dense SAEs follow, of whose latents 58 % fire on a token (tests/dense_saes.py). With
--write the tables go into the page. Exits with 1 if a cause is not the planted one, or a healthy
SAE is called sick.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import dense_saes
import zoo
from page import machine, table
from saefty import fsio
from saefty.config import build_config
from saefty.diagnosis.finding import WEAK_SPARSITY
from saefty.stages.doctor import DoctorConfig, check

PAGE = Path(__file__).parents[1] / "docs" / "healthy-sae.md"
COMMAND = "PYTHONPATH=src:tests:benchmarks python benchmarks/doctor_zoo.py --write"
COLUMNS = {
    "patient": "patient", "planted": "planted", "named": "named", "l0": "L0 before → after",
    "fvu": "FVU before → after", "right": "right",
}  # fmt: skip
DENSE_COLUMNS = {
    "built": "built by", "share": "active share", "l0": "L0 mean, median, p95, p99",
    "eps": "L0 at eps 0.1", "always": "always on", "ends": "rate below 0.1, above 0.9",
    "named": "named", "after": "L0 before → after", "fvu": "FVU before → after",
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    with tempfile.TemporaryDirectory() as name:
        rows, right = examined(Path(name), seeds)
        dense, dense_right = dense_examined(Path(name), seeds[0])
    sys.stdout.write(f"{table(COLUMNS, rows)}\n{table(DENSE_COLUMNS, dense)}")
    asked = len(rows) * len(seeds)
    sys.stdout.write(
        f"{right} of {asked} patients and {dense_right} of {len(dense)} dense SAEs right "
        f"({len(seeds)} seeds).\n"
    )
    if options.write:
        where = f"Made by `{COMMAND}` on {machine()}; {len(seeds)} seeds: {right} of {asked} right."
        put("zoo", [where, "", table(COLUMNS, rows)])
        width = f"Seed {seeds[0]}, {zoo.WIDTH} latents, all tokens."
        put("dense", [width, "", table(DENSE_COLUMNS, dense)])
    return int(right < asked or dense_right < len(dense))


def put(name, lines):
    """Put lines between the marks of a name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = PAGE.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    fsio.commit_text(PAGE, before + "\n".join([begin, *lines, end]) + after)


def examined(folder, seeds):
    """Return a row a patient, over all seeds, and how many answers were right."""
    rows, total = [], 0
    for name in (*zoo.SICK, *zoo.HEALTHY):
        reports = []
        for seed in seeds:
            patient = zoo.build(name, folder, seed)
            report = diagnosed(patient)
            reports.append((report, right(report, patient)))
        planted = " or ".join(patient.accepted) or "nothing"
        total += sum(good for _, good in reports)
        rows.append(row(name, planted, reports))
    return rows, total


def dense_examined(folder, seed):
    """Return a row a way in which an SAE became dense, and how many answers were right."""
    rows, total = [], 0
    for kind in dense_saes.KINDS:
        patient = dense_saes.build(kind, folder, seed)
        report = diagnosed(patient)
        total += right(report, patient)
        x = zoo.rows_of(zoo.ActivationStore(patient.store), patient.layer)
        z = zoo.read_by(patient.sae, x)[0]
        l0, rate = (z > 0).sum(axis=1), (z > 0).mean(axis=0)
        shown = (l0.mean(), np.median(l0), *np.percentile(l0, [95, 99]))
        figures = before_and_after(report)
        rows.append({
            "built": kind,
            "share": f"{rate.mean():.4f}",
            "l0": ", ".join(f"{value:.1f}" for value in shown),
            "eps": f"{(z > 0.1).sum(axis=1).mean():.1f}",
            "always": f"{(rate >= 0.99).mean():.3f}",
            "ends": f"{(rate < 0.1).mean():.3f}, {(rate > 0.9).mean():.3f}",
            "named": report.cause or "none",
            "after": between([figures[0]], ".1f"),
            "fvu": between([figures[1]], ".3f"),
        })  # fmt: skip
    return rows, total


def diagnosed(patient):
    keys = {"sae": str(patient.sae), "store": str(patient.store), "dump": patient.dump}
    return check(build_config(DoctorConfig, {"doctor": keys}))


def right(report, patient):
    return report.cause in patient.accepted if patient.accepted else report.healthy


def row(name, planted, reports):
    named = [report.cause or "healthy" * report.healthy or "none" for report, _ in reports]
    figures = [before_and_after(report) for report, _ in reports]
    return {
        "patient": name,
        "planted": planted,
        "named": " / ".join(dict.fromkeys(named)),
        "right": f"{sum(good for _, good in reports)} of {len(reports)}",
        "l0": between([one[0] for one in figures], ".1f"),
        "fvu": between([one[1] for one in figures], ".3f"),
    }


def before_and_after(report):
    """Return L0 and FVU, each before and after the named cause's best repair, if it has one."""
    found = report.examination
    tried = [one for one in found.repairs if one.trial.cause == report.cause]
    best = max(tried, key=lambda one: one.gain, default=None)
    if report.cause == WEAK_SPARSITY:
        best = found.truncated
    after = (best.figures.l0.value, best.fvu) if best else (None, None)
    return (found.as_it_is.l0.value, after[0]), (found.as_it_is.fvu.value, after[1])


def between(pairs, form):
    """Return the least and the largest of both sides, over seeds."""
    sides = []
    for side in zip(*pairs, strict=True):
        known = [value for value in side if value is not None]
        ends = [f"{value:{form}}" for value in (min(known), max(known))] if known else []
        sides.append("–".join(dict.fromkeys(ends)))
    return " → ".join(filter(None, sides))


if __name__ == "__main__":
    sys.exit(main())
