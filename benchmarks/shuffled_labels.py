"""How often `eval` claims a finding when the labels mean nothing.

Usage: python benchmarks/shuffled_labels.py FEATURES [--layer N] [--shuffles 100]

Labels are permuted by prompt group, within source, and the whole procedure runs each time: split,
choice, tests on both halves. At most 5 of 100 may claim a finding.
"""

import argparse

import numpy as np

from saefty.baselines import names_to_codes
from saefty.evaluation import evaluate_latents
from saefty.metrics.significance import permuted_labels
from saefty.stores.features import FeatureStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("features")
    parser.add_argument("--layer", type=int)
    parser.add_argument("--shuffles", type=int, default=100)
    parser.add_argument("--pooling", default="max")
    given = parser.parse_args()
    store = FeatureStore.open(given.features)
    layer = store.layers[0] if given.layer is None else given.layer
    records = store.examples()
    rows = [i for i, r in enumerate(records) if r["status"] == "ok" and r["label"] is not None]
    pooled = store.pooled(layer, given.pooling)[np.array(rows)]
    harmful = np.array([records[i]["label"] for i in rows], dtype=bool)
    clusters = names_to_codes([records[i]["group"] for i in rows])
    labellings = permuted_labels(harmful, clusters, permutations=given.shuffles, seed=1)
    truth = evaluate_latents(pooled, harmful, clusters)
    claimed = sum(
        evaluate_latents(pooled, labels, clusters, seed=i).finding
        for i, labels in enumerate(labellings)
    )
    print(f"true labels: {'a finding' if truth.finding else 'no finding'}")
    print(f"shuffled labels: {claimed} of {given.shuffles} claim a finding (at most 5 % may)")


if __name__ == "__main__":
    main()
