"""A verdict in words, as a table and as JSON."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saefty.diagnosis.record import SAMPLING, Record
from saefty.diagnosis.verdict import Result, Verdict
from saefty.report import Column, Section, Table, markdown_report, plain

COLUMNS = (
    Column("cause", "cause tried"),
    Column("what", "how the SAE is read"),
    Column("l0", "L0 (latents a token)", ".3f"),
    Column("fvu", "FVU", ".4f"),
    Column("silent", "silent latents (share)", ".3f"),
    Column("always", "always on (share)", ".3f"),
    Column("distance", "distance (tolerances)", ".2f"),
    Column("restores", "restores"),
)


DISTANCE = (
    "A distance counts tolerances. They are wider where an experiment estimates something from the "
    "rows, so compare experiments by L0 and FVU."
)


@dataclass(frozen=True)
class Report:
    """What `verify` found."""

    name: str
    """The SAE."""
    record: Record
    verdict: Verdict
    facts: Mapping[str, Any]
    """What was read: model or store, rows, texts, place."""

    def figures(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        verdict, first = self.verdict, self.verdict.results[0]
        found = {
            "sae": self.name,
            "healthy": verdict.healthy,
            "checked_against": verdict.checked,
            "sentence": verdict.sentence,
            "cause": verdict.cause,
            "possible_causes": list(verdict.possible),
            "next": verdict.then,
            "remarks": list(verdict.remarks),
            "read": dict(self.facts),
            "recorded": {
                name: {
                    "value": one.value,
                    "source": one.source,
                    "n_rows": one.n_rows,
                    "by_construction": one.fixed,
                    "margin_share": one.margin.share,
                    "margin_least": one.margin.least,
                    "margin_reason": one.margin.why,
                }
                for name, one in self.record.figures.items()
            },
            "dead_share_in_training": self.record.dead_share,
            "sampling_errors_allowed": SAMPLING,
            "measured": first.as_record(),
            "experiments": [one.as_record() for one in verdict.results[1:]],
        }
        return dict(plain(found))

    def text(self) -> str:
        """Return what is printed: the verdict in a sentence, what to do, then the figures."""
        verdict = self.verdict
        lines = [verdict.sentence]
        if verdict.then:
            lines += [verdict.then]
        lines += [f"Note: {remark}" for remark in verdict.remarks]
        lines += ["", _read(self.facts), *_recorded(self.record), "", _table(self._rows())]
        if any(one.deviations for one in verdict.results[1:]):
            lines += ["", DISTANCE]
        return "\n".join(lines)

    def markdown(self) -> str:
        """Return verify.md."""
        verdict = self.verdict
        lead = "\n\n".join([verdict.sentence, *verdict.then.splitlines()])
        notes = "\n".join(f"- {remark}" for remark in verdict.remarks)
        compared = "\n".join(f"- {line}" for line in [_read(self.facts), *_recorded(self.record)])
        return markdown_report(
            f"Check of {self.name}",
            lead,
            [
                Section("What was compared", compared),
                Section("Figures", DISTANCE, table=Table(COLUMNS, tuple(self._rows()))),
                *([Section("Notes", notes)] if notes else []),
            ],
        )

    def _rows(self) -> list[dict[str, Any]]:
        """Return a row for the SAE as it is and the nearest experiment of each cause."""
        first, *rest = self.verdict.results
        nearest: dict[str, Result] = {}
        for one in rest:
            nearest.setdefault(one.trial.cause, one)
        return [_row(one, one is first) for one in (first, *nearest.values())]


def _row(one: Result, is_first: bool) -> dict[str, Any]:
    figures, distance = one.figures, one.distance
    restores = "yes" if one.restores else "no"
    if one.trial.evidence:
        restores = "evidence only"
    elif one.idle:
        restores = "changes nothing"
    if is_first:
        restores = "–"
    known = bool(one.deviations)
    return {
        "cause": "" if is_first else one.trial.cause,
        "what": one.trial.what,
        "l0": figures.l0.value,
        "fvu": figures.fvu and figures.fvu.value,
        "silent": figures.silent_share.value,
        "always": figures.always_on_share.value,
        "distance": distance if known and distance < float("inf") else None,
        "restores": restores if known else "–",
    }


def _read(facts: Mapping[str, Any]) -> str:
    where = f"store {facts['store']}" if "store" in facts else f"model {facts['model']}"
    return (
        f"Measured on {facts['rows']:,} rows of {facts['texts']:,} texts, {where} "
        f"({facts['dtype']}), {facts['site']}; special tokens left out."
    )


def _recorded(record: Record) -> list[str]:
    found: dict[str, list[str]] = {}
    for name, one in record.figures.items():
        fixed = ", by construction" if one.fixed else ""
        unit = " latents a token" if name == "l0" else ""
        where = f"{one.source}; margin {one.margin.share:.1%} ({one.margin.why})"
        found.setdefault(where, []).append(f"{_SHORT[name]} {one.value:.4g}{unit}{fixed}")
    return [f"Recorded: {', '.join(parts)}. From {where}." for where, parts in found.items()]


_SHORT = {"l0": "L0", "fvu": "FVU", "silent_share": "silent", "always_on_share": "always on"}


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows under short headings, aligned for a terminal."""
    heads = ("cause tried", "L0", "FVU", "silent", "always on", "distance", "restores")
    return aligned([heads, *(_cells(row) for row in rows)], (0, len(heads) - 1))


def aligned(cells: Sequence[Sequence[str]], words: Collection[int]) -> str:
    """Return lines of cells under each other for a terminal.

    Args:
        cells: The lines, the headings first.
        words: Which columns hold words and stand to the left; the others hold numbers.
    """
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    return (
        row["cause"] or row["what"],
        number(row["l0"], ".3f"),
        number(row["fvu"], ".4g"),
        number(row["silent"], ".3f"),
        number(row["always"], ".3f"),
        number(row["distance"], ".2f" if (row["distance"] or 0) < 1000 else ".1e"),
        str(row["restores"]),
    )
