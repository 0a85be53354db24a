"""The vision demo's figures over several worlds, each with a model trained from scratch on it.

Usage: python benchmarks/vision_seeds.py --worlds 0 1 2 --out artifacts/vision_seeds [--short]

A world's seed chooses the colour x noun pairs that are held out of training; the questions of the
evaluation are about held-out pairs only. Prints one row a world and whether every claim holds.
"""

import argparse
from pathlib import Path
from typing import Any

from saefty import fsio
from saefty.report import Column, Table
from saefty.sandbox import vision_demo
from saefty.sandbox.vision_measures import DELTAS, LATENTS
from saefty.sandbox.vision_model import VISION_REFERENCE


def row_of(figures: dict[str, Any]) -> dict[str, Any]:
    rows = figures["rows"]

    def found(kind: str, words: str = "", group: str = "", how: str = "auroc") -> list[float]:
        return [
            row[how]["estimate"]
            for row in rows
            if row["kind"] == kind and words in row["name"] and group in row["group"] and row[how]
        ]

    measured: dict[str, Any] = {
        "world": figures["world"],
        "accuracy": figures["accuracy"]["all"],
        "words": max(found("alone", "words") + found("alone", "words", how="last")),
        "picture": max(found("alone", "picture")),
        "off": max(found("off") + found("off", how="last")),
        "on": found("on")[0],
    }
    for method, name in DELTAS.items():
        low = [row["auroc"]["low"] for row in rows if (row["kind"], row["name"]) == ("delta", name)]
        measured |= {
            f"delta_{method}": found("delta", name)[0],
            f"delta_{method}_low": low[0],
            f"delta_{method}_last": found("delta", name, how="last")[0],
            **{f"latents_{method}_{k}": found("latents", f"{k} latent", name)[0] for k in LATENTS},
            f"fvu_{method}": figures["sae"][method]["fvu"],
        }
    measured["holds"] = all(figures["holds"].values())
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("artifacts/vision_seeds"))
    parser.add_argument("--models", type=Path, help="Folder of trained models, one a world.")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--write", action="store_true", help="Ship the figures as reference.")
    given = parser.parse_args()
    rows = []
    for world in given.worlds:
        model = (given.models or given.out) / f"model_{world}"
        outcome = vision_demo.run(
            given.out / f"world_{world}", short=given.short, retrain=model, world_seed=world
        )
        rows.append(row_of(dict(outcome.figures)))
        print(Table(tuple(Column(key, key, ".3f") for key in rows[0]), tuple(rows)).markdown())
    if given.write:
        site = outcome.figures["site"]
        fsio.commit_json(VISION_REFERENCE, {"site": site, "scope": "per_layer", "worlds": rows})


if __name__ == "__main__":
    main()
