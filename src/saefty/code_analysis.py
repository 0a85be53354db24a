"""One pass over the codes of an SAE: what every latent does, and a closer look at some tokens."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saefty import fsio
from saefty.code_pca import CodePca, project_codes
from saefty.code_sources import CodeSource, Nonfinite, numbered
from saefty.errors import InputError
from saefty.metrics.firing import FiringStats, firing_regions, firing_stats
from saefty.stores.features import Key
from saefty.token_sample import SampleReport, SampleTaker, draw_tokens, report_sample

SCRATCH = f"{fsio.TEMP_PREFIX}sample"
L0_SHARES = (0.5, 0.95, 0.99)


@dataclass(frozen=True)
class CodeAnalysis:
    """What was found of one SAE's codes.

    Attributes:
        key: The SAE.
        place: Where the codes come from.
        stats: Over all tokens.
        report: Over the sample.
        pca: Over the sample.
        left_out: Tokens left out because of NaN or infinity.
    """

    key: Key
    place: str
    stats: FiringStats
    report: SampleReport
    pca: CodePca
    left_out: int

    def as_record(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        stats = self.stats
        regions = firing_regions(stats)
        latents = len(stats.firing_rate)
        return {
            "source": self.place,
            "tokens": stats.token_count,
            "left_out": self.left_out,
            "latents": latents,
            "all_tokens": {
                "L0_mean": stats.mean_l0,
                **{f"L0_p{100 * share:g}": stats.l0_quantile(share) for share in L0_SHARES},
                "L0_max": len(stats.l0_counts) - 1,
                "active_share": stats.mean_l0 / latents,
            },
            "latents_by_firing_rate": {name: int(mask.sum()) for name, mask in regions.items()},
            "L0_share_of_always_on": _share(stats, regions["always on"]),
            "sample": self.report.as_record(),
            "pca": {
                "mean_cosine": self.pca.mean_cosine,
                **{
                    form: {"shares": list(one.shares), "stand_out": list(one.stands_out)}
                    for form, one in self.pca.forms.items()
                },
            },
        }


def analyze_codes(
    source: CodeSource,
    *,
    sample_tokens: int,
    seed: int,
    nonfinite: Nonfinite,
    scratch: Path,
    advance: Callable[[int], None] = lambda _: None,
) -> CodeAnalysis:
    """Walk the codes once and return what was found.

    Args:
        source: The codes.
        sample_tokens: How many tokens to look at closely.
        seed: Of the sample, and of the search for components.
        nonfinite: What to do with NaN and infinity.
        scratch: A folder of ours for the sample, where it is dense.
        advance: Told how many tokens have passed.

    Raises:
        NumericError: If a value is NaN or infinite, and `nonfinite` is `stop`.
        InputError: If there is no token.
    """
    chosen = draw_tokens(source.n_tokens, sample_tokens, seed)
    file = scratch / f"{SCRATCH}-{source.key}"
    file.unlink(missing_ok=True)
    left_out: list[int] = []
    try:
        taker = SampleTaker(chosen, file)

        def passing() -> Any:
            for block in taker.watch(numbered(source, nonfinite, left_out)):
                yield block
                advance(block.shape[0])

        stats = firing_stats(passing())
        sample = taker.sample()
        if sample.n_tokens == 0:
            raise InputError(
                f"{source.place}: none of the {sample_tokens} sampled tokens is free of NaN and "
                "infinity.",
                then="Set analyze.sample_tokens to a larger number.",
            )
        report, pca = report_sample(sample), project_codes(sample, seed)
    finally:
        file.unlink(missing_ok=True)
    return CodeAnalysis(source.key, source.place, stats, report, pca, sum(left_out))


def feature_stats(stats: FiringStats) -> dict[str, np.ndarray]:
    """Return the arrays of `feature_stats.npz`, by their names there."""
    return {
        "firing_rate": stats.firing_rate.astype(np.float64),
        "mean_all": stats.mean_all.astype(np.float64),
        "mean_when_active": stats.mean_when_active.astype(np.float64),
        "max_all": stats.max_all.astype(np.float64),
        "active_count": stats.active_count.astype(np.int64),
        "token_count": np.array([stats.token_count], dtype=np.int64),
        "avg_active_feats_per_token": np.array([stats.mean_l0], dtype=np.float64),
    }


def save_feature_stats(stats: FiringStats, path: Path) -> Path:
    """Write `feature_stats.npz`; return its path."""
    buffer = io.BytesIO()
    np.savez(buffer, **feature_stats(stats))  # type: ignore[arg-type]  # not `allow_pickle`
    fsio.commit_bytes(path, buffer.getvalue())
    return path


def _share(stats: FiringStats, latents: np.ndarray) -> float:
    total = int(stats.active_count.sum())
    return float(stats.active_count[latents].sum() / total) if total else 0.0
