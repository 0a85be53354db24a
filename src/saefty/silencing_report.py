"""What silencing latents did, in words, tables and pictures: in the forward pass and without it."""

import logging
from pathlib import Path
from typing import Any

from saefty import fsio
from saefty.errors import InputError
from saefty.harm_evaluation import LayerResult
from saefty.harm_tables import gate_table, point_at, stored_at, stored_table, strongest_count
from saefty.judges.coverage import require_coverage
from saefty.latent_gating import LatentGating
from saefty.metrics.intervals import Interval
from saefty.plots.base import save_plot
from saefty.plots.gate_curve import GateCurve
from saefty.plots.safety_curve import SafetyCurve
from saefty.report import Section, Table, plain
from saefty.silencing import GateResult, Silenced, far_from_training
from saefty.stores.features import Key

log = logging.getLogger(__name__)

FOLDER = "intervention"
TALL = (7.2, 5.6)
TALLER = (7.4, 6.6)
PAGE_COLUMNS = ("gated", "arm", "safety", "safety_low", "safety_high", "changed", "auroc",
                "relearnt", "relative_harmful", "relative_harmless", "cosine_harmless")  # fmt: skip
GONE = 0.6
"""Below this AUROC a probe that learns anew finds little of the harm that could be read before."""


def silenced_sentences(silenced: Silenced) -> list[str]:
    """Return what silencing did, in words, the stronger evidence first."""
    words = []
    if silenced.gating is not None:
        words.append(_causal_sentence(silenced.gating))
        fit = silenced.gating.token_fit
        if fit is not None and fit.far:
            words.append(f"**Weak**: {far_from_training(fit)}")
    elif silenced.no_gating:
        words.append(f"**Nothing was silenced in the forward pass**: {silenced.no_gating}.")
    if silenced.stored is not None:
        words.append(_stored_sentence(silenced.stored))
    return words


def silenced_sections(folder: Path, result: LayerResult, prefix: str) -> list[Section]:
    """Return the sections on silencing one SAE's latents, the stronger evidence first.

    Args:
        folder: The run's folder, where pictures and figures go.
        result: The layer.
        prefix: What their titles begin with.
    """
    silenced, found = result.silenced, []
    if silenced is None:
        return []
    if silenced.gating is not None:
        found.append(gate_section(folder, result.layer, silenced.gating, prefix))
    if silenced.stored is not None:
        found.append(_stored_section(folder, result.layer, silenced.stored, prefix))
    elif silenced.no_stored:
        title = titled(prefix, "what silencing leaves in the activations")
        found.append(Section(title, f"Left out: {silenced.no_stored}."))
    return found


def silenced_figures(silenced: Silenced | None) -> dict[str, Any]:
    """Return the figures on silencing, for summary.json."""
    gating = None if silenced is None else silenced.gating
    return {
        "gating": None
        if gating is None
        else {
            "behaviour": gating.behaviour,
            "fluency": gating.fluency,
            "strength": gating.strength,
            "site": gating.site,
            "token_fit": None if gating.token_fit is None else gating.token_fit.record(),
            "targets": gating.targets,
            "controls": gating.controls,
            "points": gating.points,
        },
        "gating_left_out": (silenced.no_gating if silenced else "") or None,
        "latent_space": None if silenced is None else silenced.stored,
        "latent_space_left_out": (silenced.no_stored if silenced else "") or None,
    }


def silenced_tables(result: LayerResult) -> dict[str, Table]:
    """Return the tables on silencing one SAE's latents, by file name without suffix."""
    silenced, name = result.silenced, f"{FOLDER}/layer_{result.layer}"
    tables = {}
    if silenced is not None and silenced.gating is not None:
        tables[name] = gate_table(silenced.gating)
    if silenced is not None and silenced.stored is not None:
        tables[f"{name}_latent_space"] = stored_table(silenced.stored)
    return tables


def titled(prefix: str, title: str) -> str:
    """Return a title behind a prefix, or by itself with a capital."""
    return prefix + title if prefix else title[0].upper() + title[1:]


def percent(share: float) -> str:
    """Return a share as whole percent."""
    return f"{100 * share:.0f} %"


def _first(count: int) -> str:
    return "the first of them" if count == 1 else f"the first {count} of them"


def _times(strength: float) -> str:
    return "" if strength == 1 else f" ({strength:g} times what they contribute)"


def _causal_sentence(gating: GateResult) -> str:
    count = strongest_count(gating.points)
    target, control = (point_at(gating, arm, count) for arm in ("target", "control"))
    base = point_at(gating, "target", 0)
    if target is None or base is None or not count:
        return "No latent leans towards harm, so nothing was silenced."
    change, on_harmless = target.harmful.change, target.harmless.change
    assert change is not None  # only the ungated replies have nothing to be compared with
    assert on_harmless is not None
    sentence = (
        f"Silencing {_first(count)}{_times(gating.strength)} changes {gating.behaviour} of harmful "
        f"prompts from {percent(base.harmful.rate.estimate)} by {_points(change)}"
    )
    other = control.harmful.change if control is not None else None
    if other is not None:
        sentence += (
            f"; silencing {count} equally active other latents changes it by {_points(other)}"
        )
    sentence += (
        f". On harmless prompts {gating.behaviour} changes by {_points(on_harmless)} "
        f"(from {percent(base.harmless.rate.estimate)})"
    )
    fluency = target.harmful.fluency
    sentence += f"; fluency is {fluency.estimate:.2f} [{fluency.low:.2f}, {fluency.high:.2f}]."
    clear = change.high < 0 or change.low > 0
    if clear and other is not None:
        apart = change.high < other.low or change.low > other.high
        sentence += (
            " The intervals are apart: these latents carry the behaviour here."
            if apart
            else " The intervals overlap with the control's: the effect is not specific to them."
        )
    elif not clear:
        sentence += " The interval holds 0: no effect was shown."
    return sentence


def _stored_sentence(stored: LatentGating) -> str:
    """Say what gating left of the evidence in stored activations, and how weak that is."""
    count = strongest_count(stored.points)
    target, control = (stored_at(stored, arm, count) for arm in ("target", "control"))
    base = stored_at(stored, "target", 0)
    assert base is not None  # every curve begins with it
    assert target is not None  # without a latent to gate there is no curve
    sentence = (
        f"In the stored activations, where no model runs, a linear probe catches "
        f"{percent(base.harmful.called.estimate)} of the harmful examples (false alarms "
        f"{percent(base.harmless.called.estimate)}). Without what {_first(count)} contribute"
        f"{'' if count > 1 else 's'}{_times(stored.strength)} it no longer catches "
        f"{_share(target.safety)} of those"
    )
    if control is not None:
        sentence += f" ({count} equally active other latents: {_share(control.safety)})"
    sentence += (
        f", and its AUROC goes from {base.auroc.estimate:.3f} to {target.auroc.estimate:.3f}; "
        f"the call of {_share(target.changed)} of the harmless examples changes, and their "
        f"activations by {percent(target.harmless.relative.estimate)} of their norm."
    )
    left = target.relearnt
    sentence += (
        f" A probe that learns anew tells harm with AUROC {left}: it can still be read there, "
        "along other directions."
        if left.estimate >= GONE
        else f" A probe that learns anew finds little either: AUROC {left}."
    )
    return (
        f"{sentence} This is weaker evidence than the forward pass: a probe reads one place "
        "linearly, and what it no longer sees later layers may still use."
    )


def gate_section(folder: Path, key: Key, gating: GateResult, prefix: str) -> Section:
    """Return the section on the replies of the model with latents silenced."""
    title = titled(prefix, "what silencing latents does")
    text = (
        "Replies of the model with latents silenced in its forward pass, to prompts of the half "
        "that had no part in choosing them. `target` are the chosen latents, `control` equally "
        "active ones that do not track harm; a change is paired with the ungated reply."
    )
    if gating.strength != 1:
        text += f" Taken out is {gating.strength:g} times what the latents contribute."
    text += _where(gating)
    sparse = _too_few_scores(gating)
    if sparse:
        log.warning("layer %s: %s", key, sparse)
        return Section(title, f"{text}\n\n**No picture:** {sparse}", gate_table(gating))
    path = save_plot(
        "gate_curve",
        _curve(gating),
        folder / "figures" / f"layer_{key}_gate_curve.png",
        size=TALL,
    )
    return Section(
        title,
        text,
        gate_table(gating),
        str(path.relative_to(folder)),
        f"{gating.behaviour.capitalize()} and fluency against the number of silenced latents.",
    )


def _where(gating: GateResult) -> str:
    """Say where an SAE of a contrast acted, and how well it fits there."""
    fit = gating.token_fit
    if fit is None:
        return ""
    fvu = "not known, as they do not vary" if fit.fvu is None else f"{fit.fvu:.3f}"
    before = "not known" if fit.training_fvu is None else f"{fit.training_fvu:.3f}"
    return (
        f" The SAE was trained on δ; it is applied to the δ of each text token, {gating.reads}, at "
        f"`{gating.site}`; tokens of an image and special ones are left alone. Of the δ of these "
        f"{fit.tokens:,} tokens it leaves a share of the variance unexplained of {fvu} (in "
        f"training: {before})."
    )


def _stored_section(folder: Path, key: Key, stored: LatentGating, prefix: str) -> Section:
    name = f"layer_{key}_latent_space"
    fsio.commit_json(folder / FOLDER / f"{name}.json", plain(stored))
    path = save_plot(
        "safety_curve",
        _safety_curve(stored),
        folder / FOLDER / f"layer_{key}_safety_curve.png",
        size=TALLER,
    )
    whole = stored_table(stored)
    shown = tuple(column for column in whole.columns if column.key in PAGE_COLUMNS)
    text = (
        "Latents taken out of the stored activations (an example's: the mean over its tokens), "
        "before and after, on the half that had no part in choosing them; no model runs. The "
        "probe learnt on the ungated activations of the selection half and calls harmful what lies "
        f"above the threshold of {percent(stored.false_alarms)} false alarms there (set on "
        f"{stored.threshold_from}). *No longer caught* is the share of the harmful examples it "
        "called harmful that it calls so no more; *learnt anew* is a probe that learnt on "
        f"activations gated likewise. All columns and intervals are in `{FOLDER}/{name}.csv`."
    )
    if stored.strength == 1:
        text += " Subtracting with strength 1 is gating: the two give the same."
    if not stored.converged:
        text += " **A probe did not come to rest within its steps**; its AUROC may be too low."
    return Section(
        titled(prefix, "what silencing leaves in the activations"),
        text,
        Table(shown, whole.rows),
        str(path.relative_to(folder)),
        "What a probe no longer catches, and what AUROC is left, against the number of gated "
        "latents.",
    )


def _safety_curve(stored: LatentGating) -> SafetyCurve:
    arms = {
        arm: [one for one in stored.points if not one.count or one.condition.arm == arm]
        for arm in ("target", "control")
    }
    target, control = arms["target"], arms["control"]

    def both(what: str) -> tuple[tuple[Interval, ...], tuple[Interval, ...]]:
        return (
            tuple(getattr(one, what) for one in target),
            tuple(getattr(one, what) for one in control),
        )

    return SafetyCurve(
        counts=tuple(one.count for one in target),
        control_counts=tuple(one.count for one in control),
        safety=both("safety"),
        changed=both("changed"),
        auroc=both("auroc"),
        relearnt=tuple(one.relearnt for one in target),
        strength=stored.strength,
    )


def _too_few_scores(gating: GateResult) -> str:
    """Return why the curve is not drawn, or nothing."""
    for point in gating.points:
        for label in ("harmful", "harmless"):
            group = getattr(point, label)
            for what, found in (
                (gating.behaviour, group.coverage),
                ("fluency", group.fluency_coverage),
            ):
                try:
                    where = f"the curve ({what} on {label} prompts, {point.count} latents silenced)"
                    require_coverage(found.judged, found.total, what=where)
                except InputError as error:
                    return error.message
    return ""


def _curve(gating: GateResult) -> GateCurve:
    counts = [0, *sorted({point.count for point in gating.points if point.count})]

    def series(arm: str, label: str, what: str) -> tuple[Interval, ...]:
        points = [point_at(gating, arm, count) for count in counts]
        return tuple(getattr(getattr(p, label), what) for p in points if p is not None)

    return GateCurve(
        counts=tuple(counts),
        target_harmful=series("target", "harmful", "rate"),
        target_harmless=series("target", "harmless", "rate"),
        control_harmful=series("control", "harmful", "rate"),
        control_harmless=series("control", "harmless", "rate"),
        target_fluency=series("target", "harmful", "fluency"),
        control_fluency=series("control", "harmful", "fluency"),
        behaviour=gating.behaviour,
    )


def _points(change: Interval) -> str:
    """Return a change of a share in percentage points, with its interval."""
    ends = (change.estimate, change.low, change.high)
    middle, low, high = (f"{100 * end:+.0f}".replace("-", "−") for end in ends)
    return f"{middle} points [{low}, {high}]"


def _share(one: Interval) -> str:
    """Return a share in percent, with its interval."""
    return f"{percent(one.estimate)} [{100 * one.low:.0f}, {100 * one.high:.0f}]"
