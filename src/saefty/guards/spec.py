"""What a guard reads, where it decides, and what is known of it: the contents of `guard.json`.

A guard is a `Linear` and this. Its input is one row a text: counts of words, the pooled activations
of a site, or the pooled magnitudes of an SAE's latents there. Thresholds are log-odds, because
probabilities of sure detectors are all alike in their first sixteen digits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import xxhash

from saefty.errors import ConfigError
from saefty.linear import probability
from saefty.metrics.intervals import Interval
from saefty.models.base import ModelAdapter
from saefty.models.chat import conversation
from saefty.reading import ReadingSection
from saefty.records import Example, Site

Reads = Literal["words", "dense", "latents"]
Pooling = Literal["max", "mean", "last"]
READS: tuple[Reads, ...] = ("words", "dense", "latents")
POOLINGS: tuple[Pooling, ...] = ("max", "mean", "last")
TRUNCATE = ("never", "left", "right")
DEFAULT, FPR_1PCT = "default", "fpr_1pct"
"""Names of thresholds."""


@dataclass(frozen=True)
class GuardModel:
    """The model whose activations a guard reads, as stages record it.

    Attributes:
        name: Its folder or hub id.
        d_model: Width of its residual stream.
        revision: The hub's commit; None for a folder.
        files: The digest of each file of a folder, weights included; empty for a hub checkpoint.
        family: transformers' model type.
        dtype: Number format it was read in.
    """

    name: str
    d_model: int
    revision: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    family: str | None = None
    dtype: str = "float32"

    @classmethod
    def of(cls, model: ModelAdapter) -> "GuardModel":
        """Return what is to be known of a model that is loaded."""
        return cls.recorded(model.name, model.d_model, model.provenance)

    @classmethod
    def recorded(cls, name: str, d_model: int, inputs: Mapping[str, Any]) -> "GuardModel":
        """Return what a run recorded of its model.

        Args:
            name: `config.model.name` of its metadata.
            d_model: The width of its activations.
            inputs: `inputs.model` of its metadata.
        """
        return cls(
            name,
            d_model,
            inputs.get("revision"),
            dict(inputs.get("files") or {}),
            inputs.get("family"),
            str(inputs.get("dtype") or "float32"),
        )


@dataclass(frozen=True)
class GuardSpec:
    """What a guard reads, and from where on it raises the alarm.

    Attributes:
        reads: `words`, `dense` activations or `latents`.
        threshold: Log-odds from which on a text is flagged. Those with the best F1 on the training
            examples, each scored by a fit that left its fold out, and not by this guard.
        threshold_1pct: Log-odds that at most 1 % of the harmless training examples reach, scored
            likewise, and never below `threshold`; None if there were too few to say. The share that
            this guard flags of other examples is in `GuardFacts.rates`.
        vocabulary: Of `words`: the word of each column.
        model: Of the others: whose activations.
        site: Likewise: where they are read.
        pooling: Likewise: how tokens become one row. Latents are pooled by magnitude.
        signed: Of latents: whether they keep their sign before that.
        tokens: Which tokens are pooled, as `extract.tokens`; special ones are left out by `text`.
        truncate: What is done with a text longer than the model's context.
        raw: How a bare text is read: as it stands, or as a user's turn in the chat template.
        with_response: Whether the training examples had a response behind the prompt.

    Raises:
        ValueError: If something is missing for what it reads, or is no number.
    """

    reads: Reads
    threshold: float = 0.0
    threshold_1pct: float | None = None
    vocabulary: tuple[str, ...] = ()
    model: GuardModel | None = None
    site: Site | None = None
    pooling: Pooling | None = None
    signed: bool = False
    tokens: Literal["text", "all", "prompt_end", "response"] = "text"
    truncate: Literal["never", "left", "right"] = "never"
    raw: bool = False
    with_response: bool = False

    def __post_init__(self) -> None:
        if self.reads not in READS:
            raise ValueError(f"a guard reads one of {', '.join(READS)}, not {self.reads!r}")
        for name, value in self.thresholds.items():
            if not np.isfinite(value):
                raise ValueError(f"the threshold {name} is {value}")
        if self.reads == "words":
            if not self.vocabulary:
                raise ValueError("a guard of words needs a vocabulary")
            if len(set(self.vocabulary)) < len(self.vocabulary):
                raise ValueError("the vocabulary holds a word twice")
            if any(word.split() != [word] for word in self.vocabulary):
                raise ValueError("the vocabulary holds an entry that is empty or several words")
        elif self.model is None or self.site is None or self.pooling is None:
            raise ValueError(f"a guard of {self.reads} needs model, site and pooling")
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise ValueError(f"pooling is one of {', '.join(POOLINGS)}, not {self.pooling!r}")

    @property
    def thresholds(self) -> dict[str, float]:
        """The thresholds by name, in log-odds."""
        named = {DEFAULT: self.threshold}
        if self.threshold_1pct is not None:
            named[FPR_1PCT] = self.threshold_1pct
        return named

    @property
    def section(self) -> ReadingSection:
        """How the model is read over texts: NaN is counted and the text left unjudged."""
        return ReadingSection(tokens=self.tokens, truncate=self.truncate, nonfinite="mask")

    @property
    def place(self) -> tuple[GuardModel, Site]:
        """The model and the site that it reads.

        Raises:
            ValueError: If it reads words.
        """
        if self.model is None or self.site is None:
            raise ValueError(f"a guard of {self.reads} reads no model")
        return self.model, self.site

    def truncating(self, truncate: str) -> "GuardSpec":
        """Return the spec with another way of reading long texts.

        Raises:
            ConfigError: If there is no such way.
        """
        if truncate not in TRUNCATE:
            raise ConfigError(f"truncate is one of {', '.join(TRUNCATE)}, not {truncate!r}.")
        return replace(self, truncate=truncate)  # type: ignore[arg-type] # looked at above

    def threshold_of(self, given: str | float | None) -> float:
        """Return a threshold in log-odds.

        Args:
            given: A probability, the name of a threshold, or None for the default.

        Raises:
            ConfigError: If it is none of them.
        """
        if given is None:
            return self.threshold
        if isinstance(given, str) and given in self.thresholds:
            return self.thresholds[given]
        try:
            chance = float(given)
        except ValueError:
            chance = float("nan")
        if not 0 < chance < 1:
            known = ", ".join(f"{n} ({as_chance(v):.4g})" for n, v in self.thresholds.items())
            raise ConfigError(
                f"a threshold is a probability between 0 and 1 or one of this guard's: {known}; "
                f"not {given!r}.",
                then="Write for example --threshold 0.9.",
            )
        return float(np.log(chance) - np.log1p(-chance))

    def in_words(self) -> str:
        """Return what the guard reads, in words."""
        if self.reads == "words":
            return f"counts of {len(self.vocabulary)} words"
        model, site = self.place
        what = "activations" if self.reads == "dense" else "latents of an SAE"
        over = {"max": "the largest over", "mean": "the mean over", "last": "the last of"}
        which = {
            "text": "tokens that are not special",
            "all": "all tokens",
            "prompt_end": "the prompt's last token",
            "response": "tokens of the response",
        }[self.tokens]
        return f"{what} at {site} of {model.name}, {over[str(self.pooling)]} {which}"


@dataclass(frozen=True)
class GuardFacts:
    """On what a guard was fitted and how it did on examples that it had not seen.

    Attributes:
        probe: The detector's name in the comparison it comes from.
        examples: Training examples.
        harmful: How many of them are harmful.
        tested: Examples it was measured on; no cluster is on both sides.
        tested_harmful: How many of them are harmful.
        auroc: Area under the ROC curve on those; None if it was not measured.
        recall_at_1pct_fpr: Share of harmful examples found there at 1 % false alarms, by a
            threshold chosen on those same examples.
        rates: By threshold: `recall` and `false_positive_rate` on those examples.
        sources: Examples of each source, both sides together.
        left_out: AUROC on each source by a detector that was fitted without it.
        left_out_by: The detectors of that measurement where they are not all this one: another
            pooling or layer was chosen without the source.
        data: Fingerprint of the examples, as `data_inputs`.
        run: The run that it comes from.
    """

    probe: str
    examples: int
    harmful: int
    tested: int = 0
    tested_harmful: int = 0
    auroc: Interval | None = None
    recall_at_1pct_fpr: Interval | None = None
    rates: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)
    sources: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, Interval] = field(default_factory=dict)
    left_out_by: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    run: str | None = None

    @property
    def base_rate(self) -> float:
        """Share of harmful examples in training; the probabilities presume it."""
        return self.harmful / max(self.examples, 1)


def reading_of(examples: Sequence[Example]) -> dict[str, bool]:
    """Return `raw` and `with_response` of a spec as most of its training examples have them."""
    half = len(examples) / 2
    return {
        "raw": sum(example.raw for example in examples) > half,
        "with_response": sum(has_response(example) for example in examples) > half,
    }


def has_response(example: Example) -> bool:
    """Return whether an example ends with an answer."""
    return conversation(example)[-1].role == "assistant"


def plain_text(example: Example) -> str:
    """Return what a guard of words reads: what was written, without the template's own words."""
    return "\n".join(turn.content for turn in conversation(example))


def text_hash(example: Example) -> int:
    """Return 63 bits by which a text is known again; spaces at its ends do not count."""
    written = plain_text(example).strip().encode("utf-8", "surrogatepass")
    return xxhash.xxh3_64_intdigest(written) >> 1


def as_chance(log_odds: float) -> float:
    """Return the probability that log-odds stand for."""
    return float(probability(np.array([log_odds]))[0])
