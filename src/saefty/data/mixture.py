"""A mixture of datasets by share of examples or of length, drawn without replacement.

Exact counts come from the largest remainder: every part gets the whole examples of its share, and
what is left goes, one each, to the parts with the largest fractions. With shares of tokens (or
words, or characters) examples are drawn until one more would lead further from the part's share
than it stands, so that a part is off by at most half of one example.

What is drawn of a part depends on the seed and on the part's name and examples alone, so that
another part may join or leave. The order is drawn too: a mixture can be cut off anywhere.

Source: Hamilton's method of apportionment (largest remainder), Balinski and Young 1982, "Fair
Representation".
"""

import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from saefty.data.base import (
    DATASETS,
    DataSection,
    MixtureSection,
    PartSection,
    Record,
    Row,
    SourceSection,
    load_examples,
)
from saefty.data.lengths import UNITS, lengths
from saefty.data.overview import by_source, composition
from saefty.errors import ConfigError, InputError
from saefty.records import Example

log = logging.getLogger(__name__)

TOLERANCE = Fraction(1, 1_000_000)
"""How far shares may be from 1 together: three thirds of 0.333333 are."""


@DATASETS.register("mixture")
def mixture(section: DataSection) -> Iterator[Record]:
    """Yield examples of several datasets, in shares (`data.mixture`)."""
    settings = _checked(section)
    pools = _pools(settings)
    drawn, amounts = draw(pools, settings)
    log.info("%s", "\n".join(tables(drawn, settings, amounts)))
    for example in drawn:
        yield _row(example)


def draw(
    pools: Mapping[str, Sequence[Example]], settings: MixtureSection
) -> tuple[list[Example], Int[np.ndarray, "examples"]]:
    """Draw a mixture.

    Args:
        pools: Part -> its examples, whose source is the part's name.
        settings: Shares, total and seed.

    Returns:
        The examples in a drawn order, and what each counts towards the shares: 1, or its length.

    Raises:
        ConfigError: If the shares are not those of the parts, or are not 1 together.
        InputError: If a part holds less than its share.
    """
    unit = None if settings.by == "examples" else settings.by
    amounts = {
        part: np.ones(len(pool), dtype=np.int64)
        if unit is None
        else lengths(pool, unit, settings.tokenizer)
        for part, pool in pools.items()
    }
    held = {part: int(amount.sum()) for part, amount in amounts.items()}
    shares = _shares(settings, held)
    if settings.shares is None and settings.total is None:
        wanted = held
    else:
        total = settings.total or floor(min(held[part] / shares[part] for part in shares))
        wanted = largest_remainder(shares, total)
        _check_held(wanted, held, shares, settings, total)
    chosen: list[Example] = []
    counted: list[Int[np.ndarray, "examples"]] = []
    for part, pool in pools.items():
        order = np.random.default_rng([settings.seed, zlib.crc32(part.encode())])
        places = order.permutation(len(pool))
        is_all = wanted[part] >= held[part]
        taken = len(pool) if is_all else nearest_sum(amounts[part][places], wanted[part])
        chosen += [pool[i] for i in places[:taken]]
        counted.append(amounts[part][places[:taken]])
    if not chosen:
        raise InputError(
            f"the mixture is empty: its parts hold {_amounts(held)} {settings.by}, and "
            f"{_amounts(wanted)} are wanted.",
            then="Raise data.mixture.total.",
        )
    shuffled = np.random.default_rng(settings.seed).permutation(len(chosen))
    return [chosen[i] for i in shuffled], np.concatenate(counted)[shuffled]


def largest_remainder(shares: Mapping[str, Fraction], total: int) -> dict[str, int]:
    """Return whole numbers in proportion to shares, whose sum is the total.

    Args:
        shares: Name -> share; together they are 1. Of equal fractions the first name's goes first.
        total: The sum.
    """
    exact = {name: share * total for name, share in shares.items()}
    counts = {name: floor(value) for name, value in exact.items()}
    by_fraction = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_fraction[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def nearest_sum(amounts: Int[np.ndarray, "examples"], wanted: int) -> int:
    """Return how many of the first amounts come nearest to what is wanted; of two, fewer."""
    sums = np.concatenate([[0], np.cumsum(amounts)])
    return int(np.abs(sums - wanted).argmin())


def tables(
    examples: Sequence[Example],
    settings: MixtureSection,
    amounts: Int[np.ndarray, "examples"],
) -> list[str]:
    """Return the composition by example, and by token or, without a tokenizer, by character.

    Args:
        examples: The mixture.
        settings: What it was drawn by.
        amounts: What each example counts towards the shares.
    """
    unit: str = settings.by
    if unit == "examples":
        unit = "characters" if settings.tokenizer is None else "tokens"
        amounts = lengths(examples, unit, settings.tokenizer)
    counted = by_source(examples, amounts)
    return [
        "by example",
        *composition(by_source(examples)),
        f"by {UNITS[unit]}",
        *composition(counted),
    ]


def _checked(section: DataSection) -> MixtureSection:
    """Return the section's mixture, after refusing keys that belong to its parts.

    Raises:
        ConfigError: If there are no parts, or a key that a mixture does not read is set.
    """
    if section.mixture is None or not section.mixture.parts:
        raise ConfigError(
            "data.mixture.parts: required with data.name=mixture, but not given.",
            then="List the datasets, for example data.mixture.parts='[{name: sharegpt}, "
            "{path: mine.jsonl, text: text, part: mine}]'.",
        )
    fields = SourceSection.model_fields
    others = [
        name
        for name in fields
        if name != "name" and getattr(section, name) != fields[name].get_default()
    ]
    if others:
        raise ConfigError(
            f"data.{others[0]} is set to {getattr(section, others[0])!r}, but a mixture reads "
            "only its parts.",
            then="Set data.mixture.total."
            if others == ["limit"]
            else f"Set {others[0]} in the parts it belongs to.",
        )
    return section.mixture


def _pools(settings: MixtureSection) -> dict[str, list[Example]]:
    """Read the parts; ids and groups get the part's name, so that those of two never meet."""
    pools: dict[str, list[Example]] = {}
    named = [_name(part) for part in settings.parts]
    for i, (name, part) in enumerate(zip(named, settings.parts, strict=True)):
        if part.name == "mixture":
            raise ConfigError(f"part {i} of the mixture is a mixture; list its parts instead.")
        # The place among parts of one name, which keeps equal ids of two datasets apart.
        prefix = f"{name}/{named[:i].count(name)}" if named.count(name) > 1 else name
        keys = part.model_dump(exclude={"part"})
        pools.setdefault(name, []).extend(
            replace(
                example,
                id=f"{prefix}/{example.id}",
                group=None if example.group is None else f"{prefix}/{example.group}",
                source=name,
            )
            for example in load_examples(DataSection(**keys))
        )
    return pools


def _name(part: PartSection) -> str:
    if part.part is not None:
        return part.part
    is_own = part.name not in ("local", "hub", "lines") or part.path is None
    return part.name if is_own else Path(str(part.path)).name


def _shares(settings: MixtureSection, held: Mapping[str, int]) -> dict[str, Fraction]:
    """Return every part's share, exactly as it is written.

    Raises:
        ConfigError: If they are not the parts', not positive, or not 1 together.
        InputError: If a part holds nothing.
    """
    empty = [part for part, amount in held.items() if amount == 0]
    if empty:
        raise InputError(f"the part {empty[0]} holds 0 {settings.by}.", then="Leave it out.")
    if settings.shares is None:
        return {part: Fraction(amount, sum(held.values())) for part, amount in held.items()}
    if settings.shares.keys() != held.keys():
        raise ConfigError(
            f"data.mixture.shares names {', '.join(settings.shares)}, but the parts are "
            f"{', '.join(held)}.",
            then="Give every part its share; data.mixture.parts names them with part=NAME.",
        )
    shares = {part: Fraction(str(settings.shares[part])) for part in held}
    low = [part for part, share in shares.items() if share <= 0]
    if low:
        raise ConfigError(
            f"data.mixture.shares.{low[0]} is {settings.shares[low[0]]}, but a share is above 0.",
            then="Leave the part out.",
        )
    total = sum(shares.values(), Fraction(0))
    if abs(total - 1) > TOLERANCE:
        fitted = ", ".join(f"{part}: {float(share / total):.6g}" for part, share in shares.items())
        raise ConfigError(
            f"data.mixture.shares are {float(total):.6g} together, not 1.",
            then=f"In the same proportion they are {{{fitted}}}.",
        )
    return {part: share / total for part, share in shares.items()}


def _check_held(
    wanted: Mapping[str, int],
    held: Mapping[str, int],
    shares: Mapping[str, Fraction],
    settings: MixtureSection,
    total: int,
) -> None:
    """Refuse, or say, that a part holds less than its share.

    Raises:
        InputError: If one does, unless the settings take what there is.
    """
    short = [part for part in wanted if wanted[part] > held[part]]
    if not short:
        return
    said = "; ".join(
        f"{part} holds {held[part]} {settings.by}, but its share {float(shares[part]):.6g} of "
        f"{total} is {wanted[part]}"
        for part in short
    )
    if settings.when_short == "take":
        log.warning("%s: all of it is taken, and the shares of the others grow", said)
        return
    most = floor(min(held[part] / shares[part] for part in shares))
    raise InputError(
        f"a part of the mixture runs out: {said}.",
        then=f"Set data.mixture.total={most}, which keeps the shares, or "
        "data.mixture.when_short=take to take what there is, or lower the share.",
    )


def _amounts(amounts: Mapping[str, int]) -> str:
    return ", ".join(f"{part} {amount}" for part, amount in amounts.items())


def _row(example: Example) -> Row:
    """Return an example as a row, which is read like any other dataset's."""
    row: dict[str, Any] = {
        "id": example.id,
        "response": example.response,
        "image": example.image,
        "label": example.label,
        "group": example.group,
        "category": example.category,
        "source": example.source,
    }
    if example.messages is not None:
        turns = [{"role": turn.role, "content": turn.content} for turn in example.messages]
        row["messages"] = turns
    else:
        row["text" if example.raw else "prompt"] = example.prompt
    return Row({key: value for key, value in row.items() if value is not None})
