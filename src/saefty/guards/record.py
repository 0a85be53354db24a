"""Spec and facts as JSON, and back from JSON that nobody vouches for.

A guard's folder may have been made by a stranger: every key is looked for and every value checked
for what it is before anything is built from it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from saefty.errors import ConfigError, IntegrityError
from saefty.guards.spec import POOLINGS, READS, GuardFacts, GuardModel, GuardSpec
from saefty.metrics.intervals import Interval
from saefty.reading import ReadingSection
from saefty.records import Site

T = TypeVar("T")


class Fields:
    """The keys of a JSON object that came from a file.

    Args:
        values: The object.
        where: The file and, of an object in it, the key.

    Raises:
        IntegrityError: If it is no object.
    """

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise IntegrityError(f"{where} is {_kind(values)}, and an object is wanted.")
        self.values, self.where = values, where

    def get(self, key: str, kind: type[T]) -> T:
        """Return the value of a key.

        Raises:
            IntegrityError: If it is missing or of another kind.
        """
        if key not in self.values:
            raise IntegrityError(f"{self.where} lacks the key {key!r}; it has {_few(self.values)}.")
        value = self.values[key]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = _as_float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise IntegrityError(
                f"{self.where}: {key} is {_kind(value)}, and {_WANTED[kind]} is wanted."
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise IntegrityError(f"{self.where}: {key} is {value}.")
        return value

    def maybe(self, key: str, kind: type[T]) -> T | None:
        """Return the value of a key; None where it is null."""
        return None if key in self.values and self.values[key] is None else self.get(key, kind)

    def one_of(self, key: str, choices: tuple[str, ...]) -> Any:
        """Return the value of a key that is one of some words."""
        value = self.get(key, str)
        if value not in choices:
            raise IntegrityError(
                f"{self.where}: {key} is {value!r:.80}, and one of {', '.join(choices)} is wanted."
            )
        return value

    def section(self, key: str) -> "Fields":
        """Return the object under a key."""
        return Fields(self.get(key, dict), f"{self.where}, {key}")

    def maybe_section(self, key: str) -> "Fields | None":
        """Return the object under a key; None where it is null."""
        return None if self.maybe(key, dict) is None else self.section(key)

    def each(self, kind: type[T]) -> dict[str, T]:
        """Return all values, which are of one kind."""
        return {key: self.get(key, kind) for key in self.values}


@dataclass(frozen=True)
class SaeSource:
    """Where a guard's SAE is.

    Attributes:
        checksum: Of its weights.
        source: A release or repository of the hub; None where it lies in the guard's folder.
        sae_id: The SAE in it.
        revision: Its commit.
    """

    checksum: str
    source: str | None = None
    sae_id: str | None = None
    revision: str | None = None


_WANTED: Mapping[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def spec_record(spec: GuardSpec) -> dict[str, Any]:
    """Return a spec as JSON values, without its vocabulary and its model."""
    return {
        "kind": spec.reads,
        "site": spec.site.name if spec.site else None,
        "pooling": spec.pooling,
        "signed": spec.signed,
        "tokens": spec.tokens,
        "truncate": spec.truncate,
        "raw": spec.raw,
        "with_response": spec.with_response,
    }


def model_record(model: GuardModel | None) -> dict[str, Any] | None:
    """Return a model as JSON values."""
    if model is None:
        return None
    return {
        "name": model.name,
        "revision": model.revision,
        "d_model": model.d_model,
        "family": model.family,
        "dtype": model.dtype,
        "files": dict(model.files),
    }


def facts_record(facts: GuardFacts) -> dict[str, Any]:
    """Return facts as JSON values."""
    return {
        "probe": facts.probe,
        "examples": facts.examples,
        "harmful": facts.harmful,
        "tested": facts.tested,
        "tested_harmful": facts.tested_harmful,
        "auroc": interval_record(facts.auroc),
        "recall_at_1pct_fpr": interval_record(facts.recall_at_1pct_fpr),
        "rates": {
            name: {key: interval_record(one) for key, one in rates.items()}
            for name, rates in facts.rates.items()
        },
        "sources": dict(facts.sources),
        "left_out": {name: interval_record(one) for name, one in facts.left_out.items()},
        "left_out_by": list(facts.left_out_by),
        "data": dict(facts.data),
        "run": facts.run,
    }


def interval_record(interval: Interval | None) -> dict[str, Any] | None:
    """Return an interval as JSON values, in which NaN is null."""
    if interval is None or math.isnan(interval.estimate):
        return None
    return {
        "estimate": interval.estimate,
        "low": None if math.isnan(interval.low) else interval.low,
        "high": None if math.isnan(interval.high) else interval.high,
        "method": interval.method,
        "clusters": interval.clusters,
        "level": interval.level,
    }


def read_spec(record: Fields, vocabulary: tuple[str, ...]) -> GuardSpec:
    """Return the spec that a guard's record holds.

    Args:
        record: The whole of `guard.json`.
        vocabulary: The words, of a guard of words.

    Raises:
        IntegrityError: If a key is missing, or a value is not what it should be.
    """
    reads, thresholds = record.section("reads"), record.section("thresholds")
    kinds = {key: field.annotation for key, field in ReadingSection.model_fields.items()}
    site, pooling = reads.maybe("site", str), ("pooling", POOLINGS)
    try:
        return GuardSpec(
            reads=reads.one_of("kind", READS),
            threshold=thresholds.get("default", float),
            threshold_1pct=thresholds.maybe("fpr_1pct", float),
            vocabulary=vocabulary,
            model=_read_model(record.maybe_section("model")),
            site=None if site is None else Site.parse(site),
            pooling=None if reads.maybe("pooling", str) is None else reads.one_of(*pooling),
            signed=reads.get("signed", bool),
            tokens=reads.one_of("tokens", get_args(kinds["tokens"])),
            truncate=reads.one_of("truncate", get_args(kinds["truncate"])),
            raw=reads.get("raw", bool),
            with_response=reads.get("with_response", bool),
        )
    except (ValueError, ConfigError) as error:
        raise IntegrityError(f"{record.where} describes no guard: {error}.") from None


def read_facts(record: Fields) -> GuardFacts:
    """Return the facts that a guard's record holds.

    Raises:
        IntegrityError: If a key is missing, or a value is not what it should be.
    """
    left_out = _read_intervals(record.section("left_out"))
    rates, by = record.section("rates"), record.get("left_out_by", list)
    counts = {key: record.get(key, int) for key in ("examples", "harmful", "tested")}
    return GuardFacts(
        probe=record.get("probe", str),
        **counts,
        tested_harmful=record.get("tested_harmful", int),
        auroc=_read_interval(record.maybe_section("auroc")),
        recall_at_1pct_fpr=_read_interval(record.maybe_section("recall_at_1pct_fpr")),
        sources=record.section("sources").each(int),
        rates={name: _read_intervals(rates.section(name)) for name in rates.values},
        left_out=left_out,
        left_out_by=tuple(str(name) for name in by),
        data=record.get("data", dict),
        run=record.maybe("run", str),
    )


def read_sae(record: Fields | None) -> SaeSource | None:
    """Return where a guard's SAE is; None if it reads none.

    Raises:
        IntegrityError: If a key is missing, or a value is not what it should be.
    """
    if record is None:
        return None
    told = {key: record.maybe(key, str) for key in ("source", "sae_id", "revision")}
    return SaeSource(record.get("checksum", str), **told)


def _read_model(record: Fields | None) -> GuardModel | None:
    if record is None:
        return None
    return GuardModel(
        name=record.get("name", str),
        d_model=record.get("d_model", int),
        revision=record.maybe("revision", str),
        files=record.section("files").each(str),
        family=record.maybe("family", str),
        dtype=record.one_of("dtype", ("float32", "bfloat16", "float16", "float64")),
    )


def _read_intervals(record: Fields) -> dict[str, Interval]:
    found = {name: _read_interval(record.maybe_section(name)) for name in record.values}
    return {name: one for name, one in found.items() if one is not None}


def _read_interval(record: Fields | None) -> Interval | None:
    if record is None:
        return None
    ends = (record.maybe("low", float), record.maybe("high", float))
    low, high = (float("nan") if end is None else end for end in ends)
    return Interval(
        record.get("estimate", float),
        low,
        high,
        record.get("method", str),
        record.get("clusters", int),
        record.get("level", float),
    )


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _kind(value: Any) -> str:
    kinds = {**_WANTED, type(None): "null"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _few(keys: Mapping[str, Any]) -> str:
    return ", ".join(f"{key!r:.40}" for key in list(keys)[:8]) or "none"
