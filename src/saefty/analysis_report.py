"""What an analysis writes and prints: a table, nine pictures, a summary."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saefty.code_analysis import CodeAnalysis, save_feature_stats
from saefty.metrics.firing import FiringStats
from saefty.plots.base import save_plot
from saefty.report import Column, Section, Table, plain, write_report

STATS_FILE, PICTURES = "feature_stats.npz", "activation_report"
DPI = 200
WIDE = (11.0, 4.2)
NAMES = {
    "01_firing_rate_hist.png": (
        "rate_histogram",
        "Firing rates",
        "A peak at 0 is sparse; one at 1 are latents that are always on.",
    ),
    "02_log10_firing_rate_hist.png": (
        "log_rate_histogram",
        "Firing rates, logarithmic",
        "Without latents that never fire.",
    ),
    "03_top30_firing_rate.png": (
        "top_firing_rate",
        "The most frequent latents",
        "Those that are always on are hatched.",
    ),
    "04_top30_max_activation.png": (
        "top_max_activation",
        "The largest activations",
        "Large ones of latents that are always on speak of a scale or an offset.",
    ),
    "05_top30_mean_when_active.png": (
        "top_mean_when_active",
        "The strongest latents where they fire",
        "Mean over the tokens on which a latent fires.",
    ),
    "06_active_features_per_token_hist.png": (
        "active_per_token",
        "Active latents a token",
        "Over all tokens.",
    ),
    "07_pca_scatter.png": (
        "code_pca",
        "Principal components",
        "Sampled tokens: raw, with the mean taken off, and each latent divided by its deviation.",
    ),
    "08_firing_rate_by_strength.png": (
        "firing_regions",
        "How often and how strongly",
        "Latents by firing rate and mean activation where active.",
    ),
    "09_cumulative_l0.png": (
        "l0_share",
        "How few latents make up the code",
        "Latents in the order of their firing rate.",
    ),
}
"""The pictures by file name: plot, heading and caption."""

SEED_EPS = {0.0: "0.0", 1e-4: "1e-4", 1e-3: "1e-3", 1e-2: "1e-2", 0.1: "0.1"}


def seed_table(record: dict[str, Any]) -> str:
    """Return the report on the sample.

    Args:
        record: `SampleReport.as_record()`.
    """
    l0, negative = record["L0"], record["negative_share"]
    shares = ", ".join(f"{name}={_short(value)}" for name, value in record["percentiles"].items())
    name = "X" if negative == 0 else "|X|"
    lines = [
        f"X.shape = {record['X_shape']}",
        f"min = {_exact(record['min'])}",
        f"median = {_exact(record['median'])}",
        f"mean = {record['mean']:.4f}",
        f"max = {_exact(record['max'])}",
        shares,
        "",
        f"| eps | frac({name} > eps) | active_per_token_mean |",
        "|-----|---------------|----------------------|",
        *(
            f"| {SEED_EPS[row['eps']]:<5} | {row['frac']:.4f} | {row['per_token']:.1f} |"
            for row in record["active"]
        ),
        "",
        *(f"L0 {statistic} = {value:.1f}" for statistic, value in l0.items()),
    ]
    if negative:
        lines.append(f"frac(X < 0) = {negative:.4f}: codes with a sign, active where |X| > eps")
    return "\n".join(lines)


def printed(figures: dict[str, Any]) -> str:
    """Return what the command prints: the report on each layer."""
    layers = figures["layers"]
    parts = []
    for key, record in layers.items():
        heading = [f"layer {key}"] if len(layers) > 1 else []
        parts.append("\n".join([*heading, seed_table(record["sample"])]))
    return "\n\n".join(parts)


def write_layer(folder: Path, found: CodeAnalysis) -> None:
    """Write the statistics and the pictures of one SAE into the run's folder."""
    place = folder / f"layer_{found.key}"
    save_feature_stats(found.stats, place / STATS_FILE)
    for file, (plot, _, _) in NAMES.items():
        wide = {"size": WIDE} if plot == "code_pca" else {}
        data: Any = found.pca if plot == "code_pca" else found.stats
        save_plot(plot, data, place / PICTURES / file, dpi=DPI, tight=True, **wide)


def write_summary(folder: Path, found: Sequence[CodeAnalysis], settings: Any) -> dict[str, Any]:
    """Write summary.md and summary.json; return the figures."""
    figures = {
        "sample_tokens": settings.sample_tokens,
        "seed": settings.seed,
        "layers": {str(one.key): one.as_record() for one in found},
    }
    sections: list[Section] = []
    for one in found:
        sections += _sections(one, several=len(found) > 1)
    write_report(
        folder,
        title="Activity of SAE features",
        lead="\n\n".join(_lead(one) for one in found),
        sections=sections,
        figures=figures,
    )
    values = plain(figures)
    assert isinstance(values, dict)
    return values


def _lead(found: CodeAnalysis) -> str:
    stats = found.stats
    latents = len(stats.firing_rate)
    text = (
        f"**Layer {found.key}**: on a token {stats.mean_l0:,.1f} of {latents:,} latents are active "
        f"on average ({stats.mean_l0 / latents:.2%}); {stats.dead_share:.1%} of the latents never "
        f"fire on these {stats.token_count:,} tokens and {stats.always_on_share:.1%} are always on "
        "(99 % of tokens or more)."
    )
    if found.left_out:
        text += f" {found.left_out:,} tokens hold NaN or infinity and were left out."
    return text


def _sections(found: CodeAnalysis, several: bool) -> list[Section]:
    of = f"Layer {found.key}: " if several else ""
    tokens = f"{found.report.shape[0]:,} of {found.stats.token_count:,} tokens"
    sections = [
        Section(f"{of}The sample", f"{tokens}, drawn uniformly.\n\n{_quoted(found)}"),
        Section(f"{of}Latents by firing rate", table=_regions(found.stats, found.as_record())),
    ]
    for file, (_, title, caption) in NAMES.items():
        path = f"layer_{found.key}/{PICTURES}/{file}"
        sections.append(Section(f"{of}{title}", figure=path, caption=caption))
    return sections


def _quoted(found: CodeAnalysis) -> str:
    head, table, l0 = seed_table(found.report.as_record()).split("\n\n")
    return f"```text\n{head}\n```\n\n{table}\n\n```text\n{l0}\n```"


def _regions(stats: FiringStats, record: dict[str, Any]) -> Table:
    meaning = {
        "dead": "never, on these tokens",
        "rare": "fewer than 1 token in 10,000",
        "healthy": "0.01 % to 10 % of tokens",
        "frequent": "10 % to 99 % of tokens",
        "always on": "99 % of tokens or more",
    }
    counts = record["latents_by_firing_rate"]
    columns = (
        Column("kind", "latents are"),
        Column("fires", "if they fire on"),
        Column("latents", "latents", "d"),
        Column("share", "share of the latents", ".4f"),
    )
    latents = len(stats.firing_rate)
    rows = tuple(
        {"kind": name, "fires": meaning[name], "latents": count, "share": count / latents}
        for name, count in counts.items()
    )
    return Table(columns, rows)


def _exact(value: float) -> str:
    """Return a value of the codes in its shortest form, such as 780.0 or 0.234375."""
    single = np.float32(value)
    return str(single) if float(single) == value else f"{value:.7g}"


def _short(value: float) -> str:
    return _exact(value).removesuffix(".0")
