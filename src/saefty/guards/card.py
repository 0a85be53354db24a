"""A guard's card: what it detects, on what that was measured, and where it stops being known."""

from collections.abc import Mapping
from typing import Any

from saefty.guards.spec import DEFAULT, FPR_1PCT, GuardFacts, GuardSpec, as_chance
from saefty.linear import Linear
from saefty.metrics.intervals import Interval

WEAKEST = 3
"""Sources that are named among those on which a detector fitted without them did worst."""

CHANCE = 0.5
RATES = {
    "recall": "harmful examples that are flagged",
    "false_positive_rate": "harmless examples that are flagged",
}
THRESHOLDS = {
    DEFAULT: "used unless another is asked for; the best F1 on training examples, each scored by a "
    "fit that left its fold out, and not by this guard",
    FPR_1PCT: "at most 1 % of the harmless training examples reach it, scored likewise; never "
    "below the default",
}


def card(
    name: str,
    spec: GuardSpec,
    linear: Linear,
    facts: GuardFacts,
    sae: Mapping[str, Any] | None,
) -> str:
    """Return the card, as Markdown."""
    lines = [
        f"# {name}",
        "",
        f"A detector of harmful texts: {facts.probe}. For each text it gives a probability from 0 "
        "to 1, by logistic regression.",
    ]
    for title, content in sections(spec, linear, facts, sae).items():
        lines += ["", f"## {title}", "", *(f"- {line}" for line in content)]
    lines += [
        "",
        "## Use",
        "",
        "```",
        f"saefty guard score texts.jsonl --guard {name}",
        f"saefty guard info {name}",
        "```",
        "",
    ]
    return "\n".join(lines)


def sections(
    spec: GuardSpec, linear: Linear, facts: GuardFacts, sae: Mapping[str, Any] | None
) -> dict[str, list[str]]:
    """Return what is to be said of a guard, by title."""
    return {
        "What it reads": _what_it_reads(spec, linear, sae),
        "Where it decides": [
            f"`{key}`: {as_chance(value):.4g} (log-odds {value:.4g}; {THRESHOLDS[key]})"
            for key, value in spec.thresholds.items()
        ],
        "On what it was measured": _facts_in_words(facts),
        "Limits": _limits(spec, facts),
    }


def _what_it_reads(spec: GuardSpec, linear: Linear, sae: Mapping[str, Any] | None) -> list[str]:
    lines = [
        f"{_capital(spec.in_words())}.",
        _how_texts_are_read(spec),
        f"{len(linear.columns)} of {linear.width} columns have a weight.",
    ]
    if spec.model is not None:
        model = spec.model
        lines.append(
            f"The model is not in this folder: {model.name}"
            + (f", commit {model.revision}" if model.revision else "")
            + f", {model.d_model} wide, read in {model.dtype}."
        )
    if sae is not None:
        where = (
            "in this folder, under `sae/`"
            if sae["source"] is None
            else f"fetched from the hub: {sae['source']}, {sae['sae_id'] or 'its root'}, commit "
            f"{sae['revision']}"
        )
        lines.append(f"The SAE is {where}; the checksum of its weights is {sae['checksum']}.")
    return lines


def _facts_in_words(facts: GuardFacts) -> list[str]:
    """Return what is known of a guard, a sentence a line."""
    lines = [
        f"Fitted on {facts.examples} examples, {facts.harmful} of them harmful "
        f"({facts.base_rate:.1%})."
    ]
    if facts.auroc is None:
        lines.append("It was not measured on examples that it had not seen.")
    else:
        lines.append(
            f"On {facts.tested} examples that it had not seen, {facts.tested_harmful} of them "
            f"harmful: AUROC {_shown(facts.auroc)}."
        )
    if no_better_than_chance(facts):
        lines.append("That it does better than chance has not been shown: do not rely on it.")
    for name, rates in facts.rates.items():
        told = [f"{words} {_shown(rates[key])}" for key, words in RATES.items() if rates.get(key)]
        lines.append(f"There, from `{name}` on: {'; '.join(told)}.")
    if facts.sources:
        named = ", ".join(f"{source} ({n})" for source, n in facts.sources.items())
        lines.append(f"Sources of the examples: {named}.")
    if facts.left_out:
        worst = sorted(facts.left_out.items(), key=lambda item: item[1].estimate)[:WEAKEST]
        named = "; ".join(f"{source} {_shown(one)}" for source, one in worst)
        by = f" (measured with {', '.join(facts.left_out_by)})" if facts.left_out_by else ""
        lines.append(
            f"AUROC on sources that were left out of the fit{by}, the worst first: {named}."
        )
    return lines


def no_better_than_chance(facts: GuardFacts) -> bool:
    """Return whether chance lies in the interval of the AUROC, or above it."""
    return facts.auroc is not None and not facts.auroc.low > CHANCE


def _limits(spec: GuardSpec, facts: GuardFacts) -> list[str]:
    lines = [
        "It knows what its training examples showed. On other sources, languages or topics its "
        "figures are not known; measure them: `saefty guard score` with labels does.",
        f"Its probabilities presume that {facts.base_rate:.1%} of the texts are harmful, as in "
        "training, and they were not calibrated on examples the weights had not seen.",
        "Whoever knows it can write around it: it is a filter beside others, and no proof that a "
        "text is harmless.",
    ]
    if spec.reads == "words":
        lines.insert(1, "It sees words without their order, and no word that training lacked.")
    if not facts.left_out and len(facts.sources) > 1:
        lines.append("How it does on a source that was left out of the fit was not measured.")
    if spec.truncate == "never" and spec.reads != "words":
        lines.append("What calls it must decide about texts that get no score.")
    return lines


def _how_texts_are_read(spec: GuardSpec) -> str:
    response = ", each with a response behind it" if spec.with_response else ""
    if spec.reads == "words":
        return "Texts are read as they were written, without a chat template."
    form = "as they stand" if spec.raw else "as users' turns in the model's chat template"
    long = {"never": "gets no score", "left": "loses its beginning", "right": "loses its end"}
    return (
        f"Training texts were read {form}{response}; a bare text is read so too. A text longer "
        f"than the model's context {long[spec.truncate]}."
    )


def _shown(interval: Interval) -> str:
    return f"{interval} ({interval.level:.0%} interval, {interval.method})"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
