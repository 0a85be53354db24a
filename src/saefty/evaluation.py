"""The whole question of which latents track harm: choose on one half, report on the other.

`evaluate_latents` is the procedure of a careful paper, in one call: examples are split by prompt
group; every latent is scored and tested on the selection half; the few that stand out are measured
again on the report half, which had no part in choosing them. A *finding* has to pass three gates,
see `Evaluation.finding`. Source of the corrections: `saefty.metrics.significance`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from saefty.metrics.base import (
    LATENT_SCORES,
    Columns,
    Pooled,
    as_columns,
    check_labels,
    firing,
    group_codes,
)
from saefty.metrics.intervals import Bootstrap, Interval
from saefty.metrics.significance import (
    benjamini_hochberg,
    holm,
    log10_arrangements,
    mann_whitney,
    maximum_statistic,
    permutation_p,
    permuted_labels,
)
from saefty.metrics.splits import split_clusters

ALPHA = 0.05
# Holm multiplies the smallest p by the number of latents: enough labellings that 0.005 is in reach.
LABELLINGS_A_LATENT = 200


@dataclass(frozen=True)
class ReportedLatent:
    """One chosen latent as the report half sees it.

    Attributes:
        latent: Index in range(d_sae).
        direction: 1 if it is larger on harmful examples of the selection half, -1 if smaller.
        selection: Its scores on the selection half, by name, and its `q` and `max_p` there.
        auroc: On the report half.
        dfreq: On the report half.
        p: Two-sided p on the report half.
        p_holm: The same, adjusted for all latents that are reported.
        found: Whether it passes the three gates of a finding.
    """

    latent: int
    direction: int
    selection: dict[str, float]
    auroc: Interval
    dfreq: Interval
    p: float
    p_holm: float
    found: bool


@dataclass(frozen=True)
class LatentEvaluation:
    """What is known about every latent, and what holds of the few that were chosen.

    Attributes:
        scores: On the selection half, an array [d_sae] each: every registered latent score, and
            `fires` (share of examples), `p`, `q` (false-discovery rate over firing latents) and
            `max_p` (against the best of all latents under permuted labels).
        selection: Which examples chose.
        report: Which examples reported.
        latents: The chosen latents, best first.
        ranked_by: The score that chose them.
        null_maximum: max |AUROC - ½| over latents, under each permuted labelling.
        test: What gave `ReportedLatent.p`: "Mann-Whitney" or "cluster permutation".
        counts: Examples, harmful examples, clusters and firing latents, in all and by half.
        log10_arrangements: How many labellings the permutations of the selection half draw from.
    """

    scores: dict[str, Float[np.ndarray, "d_sae"]]
    selection: Bool[np.ndarray, "examples"]
    report: Bool[np.ndarray, "examples"]
    latents: tuple[ReportedLatent, ...]
    ranked_by: str
    null_maximum: Float[np.ndarray, "permutations"]
    test: str
    counts: dict[str, int]
    log10_arrangements: float

    @property
    def finding(self) -> bool:
        """Whether some latent tracks harm beyond what luck explains.

        It has q ≤ 0.05 and a maximum-statistic p ≤ 0.05 on the selection half, and a Holm-adjusted
        p ≤ 0.05 on the report half.
        """
        return any(latent.found for latent in self.latents)

    @property
    def best(self) -> ReportedLatent | None:
        """The reported latent that told the groups apart best on the selection half, if any."""
        return max(self.latents, key=lambda one: abs(one.selection["auroc"] - 0.5), default=None)

    def top(self, n: int) -> list[int]:
        """Return the n latents most aligned with harm on the selection half, for gating.

        Only latents that fire and are larger on harmful examples; fewer than n if there are fewer.
        """
        return ranked(self.scores, self.ranked_by, "harmful")[:n].tolist()

    def qualified(self, n: int) -> list[int]:
        """Return those of `top` that pass both tests of the selection half: q and max_p ≤ 0.05.

        A latent that does not may be what any token needs, and silencing it says nothing of harm.
        """
        order = ranked(self.scores, self.ranked_by, "harmful")
        passed = (self.scores["q"][order] <= ALPHA) & (self.scores["max_p"][order] <= ALPHA)
        return order[passed][:n].tolist()


def evaluate_latents(
    pooled: Pooled,
    harmful: Bool[np.ndarray, "examples"],
    clusters: Int[np.ndarray, "examples"] | None = None,
    sources: Int[np.ndarray, "examples"] | None = None,
    *,
    top: int = 50,
    ranked_by: str = "consensus",
    side: Literal["harmful", "both"] = "harmful",
    seed: int = 0,
    permutations: int = 1000,
    boots: int = 1000,
    eps: float = 0.0,
) -> LatentEvaluation:
    """Choose latents on one half of the examples and report them on the other.

    Args:
        pooled: One row an example: its latents pooled over its tokens.
        harmful: The labels; both kinds must be present.
        clusters: A code an example, equal for examples that belong together (a prompt and its
            variants); None if every example stands alone.
        sources: A code an example for the dataset it came from; None if there is one.
        top: How many latents to report.
        ranked_by: The latent score that chooses them.
        side: "harmful" reports latents that are larger on harmful examples, the ones to gate;
            "both" also those that are larger on harmless ones.
        seed: Fixes the split, the permutations and the bootstrap.
        permutations: Labellings for the maximum statistic; fewer than 1,000 is for tests.
        boots: Draws of each bootstrap.
        eps: A latent fires where it exceeds this.

    Returns:
        The evaluation.
    """
    columns = as_columns(pooled)
    check_labels(harmful, columns.shape[0])
    selection, report = split_clusters(harmful, clusters, sources, seed=seed)
    rows = csr_array(columns)
    chosen_from = as_columns(rows[selection])
    groups = {
        part: (
            harmful[mask],
            None if clusters is None else clusters[mask],
            None if sources is None else sources[mask],
        )
        for part, mask in (("selection", selection), ("report", report))
    }
    scores, null = _score(chosen_from, groups["selection"], permutations, seed, eps)
    chosen = ranked(scores, ranked_by, side)[:top]
    latents, test = _report(
        as_columns(rows[report][:, chosen]), groups["report"], chosen, scores, boots, seed, eps
    )
    codes = group_codes(clusters, len(harmful))
    counts = {"d_sae": columns.shape[1], "firing_latents": int(firing(columns, eps).sum())}
    for part, mask in (("", np.ones_like(harmful)), ("selection_", selection), ("report_", report)):
        counts[f"{part}examples"] = int(mask.sum())
        counts[f"{part}harmful"] = int((mask & harmful).sum())
        counts[f"{part}clusters"] = len(np.unique(codes[mask]))
    return LatentEvaluation(
        scores=scores,
        selection=selection,
        report=report,
        latents=latents,
        ranked_by=ranked_by,
        null_maximum=null,
        test=test,
        counts=counts,
        log10_arrangements=log10_arrangements(*groups["selection"]),
    )


def ranked(
    scores: dict[str, Float[np.ndarray, "d_sae"]], ranked_by: str, side: str
) -> Int[np.ndarray, "chosen"]:
    """Return the latents that fire and lean to the wanted side, by a score, the highest first.

    The side is read off the AUROC: a consensus is centred on the mean latent, so that of a latent
    which is larger on harmful examples can be negative.
    """
    lean = scores["auroc"] - 0.5
    score = scores[ranked_by] - (0.5 if ranked_by == "auroc" else 0.0)
    strength = np.abs(score) if side == "both" else score
    wanted = (scores["fires"] > 0) & ((lean > 0) if side == "harmful" else (lean != 0))
    order = np.argsort(-strength, kind="stable")
    return order[wanted[order]]


def shuffled_control(
    pooled: Pooled,
    harmful: Bool[np.ndarray, "examples"],
    clusters: Int[np.ndarray, "examples"] | None = None,
    sources: Int[np.ndarray, "examples"] | None = None,
    *,
    ranked_by: str = "consensus",
    shuffles: int = 20,
    seed: int = 0,
) -> Float[np.ndarray, "shuffles"]:
    """Return the report-half AUROC of the best latent when the labels mean nothing.

    Each time the labels are permuted (whole clusters, within sources) and the procedure is run:
    best latent of the selection half, measured on the report half. Around 0.5, as it should be; its
    spread is how far luck carries a single latent.

    Args:
        pooled: One row an example.
        harmful: The labels as given.
        clusters: As for `evaluate_latents`.
        sources: As for `evaluate_latents`.
        ranked_by: The latent score that chooses.
        shuffles: How many labellings to try.
        seed: Fixes splits and labellings.

    Returns:
        One AUROC a labelling; 0.5 where no latent leans to harm.
    """
    rows = csr_array(as_columns(pooled))
    areas = np.full(shuffles, 0.5)
    labellings = permuted_labels(harmful, clusters, sources, permutations=shuffles, seed=seed + 1)
    for i, labels in enumerate(labellings):
        selection, report = split_clusters(labels, clusters, sources, seed=seed)
        half = as_columns(rows[selection])
        wanted = {ranked_by, "auroc"}
        scores = {name: LATENT_SCORES[name](half, labels[selection]) for name in wanted}
        scores["fires"] = firing(half).astype(float)
        best = ranked(scores, ranked_by, "harmful")[:1]
        if len(best):
            held_out = as_columns(rows[report][:, best])
            areas[i] = LATENT_SCORES["auroc"](held_out, labels[report])[0]
    return areas


_Groups = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]


def _score(
    columns: Columns, groups: _Groups, permutations: int, seed: int, eps: float
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Score and test every latent on the selection half."""
    harmful = groups[0]
    scores = {name: LATENT_SCORES[name](columns, harmful, eps=eps) for name in LATENT_SCORES}
    fires = firing(columns, eps)
    scores["fires"] = np.asarray((columns > eps).sum(axis=0)).ravel() / len(harmful)
    scores["p"] = mann_whitney(columns, harmful)
    scores["q"] = np.ones(len(fires))
    scores["q"][fires] = benjamini_hochberg(scores["p"][fires])
    labellings = permuted_labels(*groups, permutations=permutations, seed=seed)
    scores["max_p"], null = maximum_statistic(columns, harmful, labellings)
    return scores, null


def _report(
    columns: Columns,
    groups: _Groups,
    chosen: np.ndarray,
    scores: dict[str, np.ndarray],
    boots: int,
    seed: int,
    eps: float,
) -> tuple[tuple[ReportedLatent, ...], str]:
    """Measure the chosen latents on the report half."""
    harmful, clusters, sources = groups
    alone = clusters is None or len(np.unique(clusters)) == len(clusters)
    if alone and (sources is None or len(np.unique(sources)) == 1):
        test, p = "Mann-Whitney", mann_whitney(columns, harmful)
    else:
        test, n = "cluster permutation", max(1000, LABELLINGS_A_LATENT * len(chosen))
        labellings = permuted_labels(*groups, permutations=n, seed=seed + 1)
        p = permutation_p(columns, harmful, labellings)
    adjusted = holm(p)
    bootstrap = Bootstrap(len(harmful), clusters, boots=boots, seed=seed)
    latents = []
    for i, latent in enumerate(chosen.tolist()):
        values = columns[:, [i]].toarray().ravel()
        selection = {name: float(score[latent]) for name, score in scores.items()}
        gates = (selection["q"], selection["max_p"], adjusted[i])
        latents.append(
            ReportedLatent(
                latent=latent,
                direction=1 if selection["auroc"] >= 0.5 else -1,
                selection=selection,
                auroc=bootstrap.ranking(values, harmful)["auroc"],
                dfreq=bootstrap.difference((values > eps).astype(float), harmful),
                p=float(p[i]),
                p_holm=float(adjusted[i]),
                found=bool(max(gates) <= ALPHA),
            )
        )
    return tuple(latents), test
