"""What the doctor found, in words, as tables, as JSON and as two pictures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saefty.diagnosis.code_checks import CodeCheck
from saefty.diagnosis.examination import Examination, Repair
from saefty.diagnosis.finding import HYPOTHESES, WEAK_SPARSITY, Finding
from saefty.diagnosis.judgement import POOR, Diagnosis
from saefty.diagnosis.reference import FAR, SAME_FVU, fvu_of
from saefty.diagnosis.report import aligned
from saefty.diagnosis.row_quality import RowQuality
from saefty.metrics.firing import FiringStats
from saefty.plots.base import save_plot
from saefty.plots.repair_plane import RepairPlane, RepairPoint
from saefty.report import Column, Section, Table, markdown_report, plain

PLANE, REGIONS = "01_repairs.png", "02_firing_rate_by_strength.png"
PLANE_SIZE = (9.2, 5.2)
NAMED = 6
"""Repairs that are named in the picture, beside the cause."""
WORTH_A_NAME = -0.25
"""Gain below which a repair is not named there."""
PRINTED = 8
SHARE = "excess removed"
HYPOTHESIS_COLUMNS = (
    Column("hypothesis", "hypothesis"),
    Column("holds", "holds"),
    Column("what", "best experiment"),
    Column("l0", "L0 (latents a token)", ".3f"),
    Column("fvu", "FVU", ".4f"),
    Column("removed", "excess L0 removed (share)", ".3f"),
)
REPAIR_COLUMNS = (
    Column("cause", "cause tried"),
    Column("what", "how the SAE is read"),
    Column("l0", "L0 (latents a token)", ".3f"),
    Column("fvu", "FVU", ".4f"),
    Column("removed", "excess L0 removed (share)", ".3f"),
    Column("gain", "gain (log)", ".2f"),
)
FINDING_COLUMNS = (Column("severity", "how bad"), Column("sentence", "finding"))
CURVE_COLUMNS = (
    Column("kept", "kept of a token's latents"),
    Column("l0", "L0 (latents a token)", ".2f"),
    Column("fvu", "FVU", ".4f"),
)
NOT_TRIED = {
    "wrong tensor": "not tried: no neighbouring block was given",
    "special tokens": "no rows of special tokens",
}


@dataclass(frozen=True)
class DoctorReport:
    """What the doctor found."""

    name: str
    """The SAE, or the codes."""
    findings: tuple[Finding, ...]
    """What the codes look like, most telling first."""
    facts: Mapping[str, Any]
    """What was read: model or store, rows, texts, place."""
    stats: FiringStats
    diagnosis: Diagnosis | None = None
    """None where there were codes alone, so that nothing could be tried."""
    examination: Examination | None = None
    quality: RowQuality | None = None
    check: CodeCheck | None = None
    """What kept codes are, where there are some and activations."""
    missing: str = ""
    """What the experiments would need."""

    def __post_init__(self) -> None:
        """Let no finding of a healthy SAE be worse than a warning, whoever made the report."""
        if self.healthy:
            mild = tuple(
                replace(one, severity="warning") if one.severity == "sick" else one
                for one in self.findings
            )
            object.__setattr__(self, "findings", mild)

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong; of codes alone, whether no finding is sick."""
        if self.diagnosis is not None:
            return self.diagnosis.healthy
        return not any(one.severity == "sick" for one in self.findings)

    @property
    def cause(self) -> str | None:
        """The named cause, if one is."""
        return self.diagnosis.cause if self.diagnosis else None

    @property
    def sentence(self) -> str:
        """The verdict."""
        if self.diagnosis is not None:
            return self.diagnosis.sentence
        sick = [one.sentence for one in self.findings if one.severity == "sick"]
        if sick:
            return f"Sick, by the look of the codes: {' '.join(sick)}"
        return "Nothing in the codes speaks of a sick SAE."

    @property
    def then(self) -> str:
        """What to do."""
        return (self.diagnosis.then if self.diagnosis else "") or self.missing

    def figures(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        found: dict[str, Any] = {
            "sae": self.name,
            "healthy": self.healthy,
            "sentence": self.sentence,
            "cause": self.cause,
            "possible_causes": list(self.diagnosis.possible) if self.diagnosis else [],
            "next": self.then,
            "reasons": list(self.diagnosis.reasons) if self.diagnosis else [],
            "findings": list(self.findings),
            "read": dict(self.facts),
            "kept_codes": self.check,
        }
        if self.examination is not None:
            found |= _examined(self.examination, self.hypotheses())
        if self.quality is not None:
            found["rows"] = {
                "n": self.quality.n_rows,
                "nonfinite": self.quality.nonfinite,
                "cut_off_at_float16": self.quality.cut_off,
                "above_float16": self.quality.above_half,
                "special_tokens": int(self.quality.special.sum()),
                "leading_token": self.quality.bos,
            }
        return dict(plain(found))

    def hypotheses(self) -> list[dict[str, Any]]:
        """Return a row a hypothesis: whether it holds, and its best experiment."""
        return list(self._hypotheses()) if self.examination and self.diagnosis else []

    def _hypotheses(self) -> Iterator[dict[str, Any]]:
        examination, diagnosis = self.examination, self.diagnosis
        assert examination is not None
        assert diagnosis is not None  # `hypotheses` has asked
        for name, causes in HYPOTHESES.items():
            of_it = [
                one
                for one in examination.repairs
                if one.trial.cause in causes and not one.trial.evidence
            ]
            best = max(of_it, key=lambda one: one.gain, default=None)
            if diagnosis.named is not None and diagnosis.cause in causes:
                best = diagnosis.named
            if name.startswith("H1"):
                best = examination.truncated
            holds = "no"
            if diagnosis.cause in causes:
                holds = "yes"
            elif set(diagnosis.possible) & set(causes):
                holds = "perhaps"
            elif best is None:
                holds = NOT_TRIED.get(name, "no" if name.startswith("dead") else "nothing to try")
            yield {"hypothesis": name, "holds": holds, **(_row(best) if best else {})}

    def text(self) -> str:
        """Return what is printed: the verdict, what to do, the findings, the experiments."""
        lines = [self.sentence, *self.then.splitlines()]
        lines += ["", *(f"[{one.severity}] {one.sentence}" for one in self.findings)]
        if self.examination is not None:
            first = self.examination.as_it_is
            as_it_is = {"hypothesis": "as it is", "l0": first.l0.value, "fvu": fvu_of(first)}
            lines += ["", *self.read(), ""]
            lines += [_printed(HEADS, [as_it_is, *self.hypotheses()])]
            rows = [_row(one) for one in self._ranked()[:PRINTED]]
            lines += ["", "Repairs by gain:", _printed(REPAIR_HEADS, rows)]
        return "\n".join(lines)

    def read(self) -> list[str]:
        """Return what was measured, in sentences."""
        facts = self.facts
        where = "rows in memory"
        if "store" in facts:
            where = f"store {facts['store']}"
        elif "model" in facts:
            where = f"model {facts['model']}"
        lines = [
            f"Measured on {facts['rows']:,} rows of {facts['texts']:,} "
            f"text{'s'[: facts['texts'] - 1]}, {where}, {facts['site']}."
        ]
        if "texts_from" in facts:
            lines.append(f"The texts are {facts['texts_from']}.")
        if self.examination is not None:
            reference = self.examination.reference
            lines.append(f"Excess L0 counts from {reference.l0:.4g}: {reference.source}.")
            if reference.recorded_fvu is not None:
                more = f", and {SAME_FVU:g} more" if reference.slack else ""
                lines.append(
                    f"FVU should be {reference.recorded_fvu:.4g} ({reference.fvu_is}); up to "
                    f"{FAR:g} times that{more} passes."
                )
        return [*lines, *facts.get("remarks", ())]

    def markdown(self, pictures: bool) -> str:
        """Return doctor.md.

        Args:
            pictures: Whether the pictures lie beside it.
        """
        lead = "\n\n".join([self.sentence, *self.then.splitlines()])
        table = Table(FINDING_COLUMNS, tuple(vars(one) for one in self.findings))
        sections = [Section("What the codes look like", table=table)]
        if self.examination is not None:
            sections += self._experiments(self.examination, pictures)
        if pictures:
            caption = "Latents by firing rate and mean activation where active."
            sections.append(
                Section("How often and how strongly", figure=REGIONS, caption=caption)
            )  # fmt: skip
        return markdown_report(f"Health of {self.name}", lead, sections)

    def _experiments(self, found: Examination, pictures: bool) -> list[Section]:
        measured = "\n".join(f"- {line}" for line in self.read())
        plane = {"figure": PLANE, "caption": PLANE_CAPTION} if pictures else {}
        curve = tuple(
            {"kept": f"at least {one.value:.4g}" if least else f"the {one.value:.0f} strongest",
             "l0": one.l0, "fvu": one.fvu}
            for least, kept in (
                (False, found.truncation.by_k), (True, found.truncation.by_threshold)
            )
            for one in kept
        )  # fmt: skip
        first = found.as_it_is
        as_it_is = {"cause": "", "what": "as it is", "l0": first.l0.value, "fvu": fvu_of(first)}
        repairs = (as_it_is, *(_row(one) for one in self._ranked()))
        return [
            Section("What was measured", measured),
            Section(
                "Which hypothesis holds",
                table=Table(HYPOTHESIS_COLUMNS, tuple(self.hypotheses())),
            ),
            Section("Every repair", GAIN, table=Table(REPAIR_COLUMNS, repairs), **plane),
            Section(
                f"How few latents give an FVU at most {SAME_FVU:g} higher",
                f"On {found.screened_rows:,} of the rows; nothing is trained again.",
                table=Table(CURVE_COLUMNS, curve),
            ),
        ]

    def _ranked(self) -> list[Repair]:
        assert self.examination is not None
        every = [one for one in self.examination.repairs if not one.idle]
        if self.examination.truncated is not None:
            every.append(self.examination.truncated)
        return sorted(every, key=lambda one: -one.gain)

    def save_pictures(self, folder: Path) -> None:
        """Draw the plane of repairs and the regions of firing rates."""
        if self.examination is not None:
            save_plot("repair_plane", self.plane(), folder / PLANE, size=PLANE_SIZE)
        save_plot("firing_regions", self.stats, folder / REGIONS, tight=True)

    def plane(self) -> RepairPlane:
        """Return what the picture of repairs shows."""
        found = self.examination
        assert found is not None
        first = found.as_it_is
        points = [RepairPoint("as it is", first.l0.value, fvu_of(first), "as it is")]
        named: set[str] = set()
        for one in self._ranked():
            chosen = self.diagnosis.named if self.diagnosis else None
            is_cause = one.trial.cause == self.cause and self.cause not in named
            if chosen is not None:
                is_cause = one is chosen
            new = (
                one.trial.cause not in named and not one.trial.evidence and one.gain > WORTH_A_NAME
            )
            # Of a healthy SAE none is recommended.
            shown = not self.healthy and (is_cause or (new and len(named) < NAMED))
            named |= {one.trial.cause} if shown else set()
            kind = "truncation" if one.trial.cause == WEAK_SPARSITY else "reading"
            name = f"{one.trial.cause}: {one.trial.what}" if shown else ""
            kind = "cause" if is_cause else kind
            points.append(RepairPoint(name, one.figures.l0.value, one.fvu, kind))
        curve = tuple((one.l0, one.fvu) for one in found.truncation.by_k)
        verdict = "healthy" if self.healthy else f"sick: {self.cause or 'no single cause'}"
        return RepairPlane(
            tuple(points), curve, found.reference.limit, POOR, verdict.capitalize(),
            found.reference.recorded_fvu,
        )  # fmt: skip


PLANE_CAPTION = (
    "The SAE as it is (cross) and after each repair; the line is truncation to fewer latents. "
    "The shaded region ends at the limit on L0 and at a poor FVU; an SAE there may still be sick "
    "by its record, or because it is misread. Repairs that make FVU more than "
    "ten times worse are not shown."
)
GAIN = (
    "Gain is the logarithm of how many times better: the factor by which L0 above the reference "
    "falls, times the factor by which FVU + 0.02 falls; a rise of FVU by 0.02 is not counted."
)
HEADS = {
    "hypothesis": "hypothesis", "holds": "holds", "l0": "L0", "fvu": "FVU", "removed": SHARE,
    "what": "best experiment",
}  # fmt: skip
REPAIR_HEADS = {
    "cause": "cause tried", "gain": "gain", "l0": "L0", "fvu": "FVU", "removed": SHARE,
    "what": "how the SAE is read",
}  # fmt: skip
FORMS = {"l0": ".4g", "fvu": ".4g", "removed": ".0%", "gain": "+.2f"}


def _row(one: Repair) -> dict[str, Any]:
    return {
        "cause": one.trial.cause,
        "what": one.trial.what,
        "l0": one.figures.l0.value,
        "fvu": one.fvu,
        "removed": None if one.removed is None else round(one.removed, 6) + 0.0,
        "gain": one.gain,
    }


def _printed(heads: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    def cell(row: Mapping[str, Any], key: str) -> str:
        value = row.get(key)
        if value is None:
            return "–"
        if key not in FORMS:
            return str(value)
        said = format(value, FORMS[key])
        return said if said.strip("+-0.%") else format(0.0, FORMS[key])

    cells = [tuple(heads.values()), *(tuple(cell(row, key) for key in heads) for row in rows)]
    words = [i for i, key in enumerate(heads) if key not in FORMS]
    return aligned(cells, words)


def _examined(found: Examination, hypotheses: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    reference, silence = found.reference, found.silence
    every = [*found.repairs, *([found.truncated] if found.truncated else [])]
    return {
        "reference": reference,
        "measured": found.as_it_is,
        "silence": {
            "silent": silence.silent,
            "in_one_text": silence.once,
            "in_two_texts": silence.twice,
            "would_wake": silence.unseen,
            "dead_share": silence.dead_share,
            "dead_share_error": silence.error,
        },
        "hypotheses": list(hypotheses),
        "experiments": [
            {
                **_row(one),
                "swept": one.trial.swept,
                "evidence_only": one.trial.evidence,
                "changes_nothing": one.idle,
                "figures": one.figures,
                "next": one.trial.then,
            }
            for one in every
        ],
        "screened_rows": found.screened_rows,
        "sweeps": {name: list(points) for name, points in found.swept.items()},
        "truncation": {
            "by_k": list(found.truncation.by_k),
            "by_threshold": list(found.truncation.by_threshold),
        },
    }
