"""A dataset made ready for a model: its tokens, and a fixed plan of what is read with what.

The plan is made from token lengths alone, before the first forward pass. It cuts the dataset into
*pieces* of consecutive examples, each small enough to hold in memory and to do again, and fixes
which examples share a forward pass inside each piece (sorted by length, within a token budget).
A row's bytes therefore depend on the plan and never on where an earlier run stopped.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from saefty import fsio
from saefty.errors import InputError
from saefty.image_checks import MEND_TEXT, check_bad_images, check_reads_images, tell_of_texts
from saefty.images import digest_or_none
from saefty.models.base import OF_TEXT, ModelAdapter, TokenizedExample
from saefty.models.batching import plan_batches
from saefty.reading_settings import PoolingSection, ReadingSection, SaveSection
from saefty.records import ROLES, Example, example_record
from saefty.runs import Ledger
from saefty.stores.base import piece_ranges

__all__ = [
    "PLAN",
    "Plan",
    "PoolingSection",
    "Reading",
    "ReadingSection",
    "SaveSection",
    "computed_part",
    "kept_tokens",
    "prepare",
    "write_tables",
]

log = logging.getLogger(__name__)

PIECE_BYTES = 64 << 20  # activations of one layer in a piece: checksums and flushes cost little
TOKEN_BYTES = 2048  # as a token weighs in a piece: 131,072 of them are enough to do again
TOKENISED_AT_ONCE = 256  # examples; the tokenizer answers in lists, ten times the size of arrays
PLAN, SHOWN_IDS = "plan.json", 5
OF_IMAGES = ("knockout", "cross_attention")
"""Contrasts of what an image does."""
IMAGE_LAST = "its image is last: no text stands behind it"


@dataclass(frozen=True)
class Plan:
    """Which examples make up each piece, and which of them share a forward pass."""

    pieces: tuple[tuple[tuple[int, ...], ...], ...]
    """For each piece its batches, each a tuple of indices of examples."""

    def as_record(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {"pieces": [[list(batch) for batch in piece] for piece in self.pieces]}


@dataclass(frozen=True)
class Reading:
    """A dataset made ready for a model: its plan, what was left out, and what makes its tokens.

    Tokens are not kept, because those of a large dataset would fill the memory; they are made again
    piece by piece, which takes little beside a forward pass.
    """

    examples: Sequence[Example]
    texts: list[str] | None
    """What was tokenised of each example, chat template included; None where the examples are read
    from a file when they are asked for, so that they need not fit in memory."""
    lengths: Int[np.ndarray, "examples"]
    """Tokens of each example."""
    kept: Int[np.ndarray, "examples"]
    """Tokens of each example that are kept, or averaged."""
    spans: Int[np.ndarray, "examples 2"] | None
    """With a pooling: the first of the tokens that are averaged, and the one behind the last."""
    computed: Int[np.ndarray, "examples"]
    """Tokens of each example that go through the model."""
    response_starts: list[int | None]
    straddles: Bool[np.ndarray, "examples"]
    """Where the response's first token also holds the prompt's last characters."""
    truncated: Bool[np.ndarray, "examples"]
    statuses: list[str]
    """`ok`, or why the example is left out: `too_long`, `empty`, `bad_image`, `no_image`,
    `no_tokens`, `no_span`, `failed`."""
    reasons: dict[int, str]
    """Why an example is left out, where its status does not say enough, by its index."""
    plan: Plan
    ledger: Ledger
    tokenize: Callable[[Sequence[Example]], list[TokenizedExample]]

    def items(self, indices: Sequence[int]) -> dict[int, TokenizedExample]:
        """Return the tokens of some examples."""
        return dict(zip(indices, self.tokenize([self.examples[i] for i in indices]), strict=True))

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the example table: one record an example that came in, in order."""
        for i, (example, text) in enumerate(self._with_texts()):
            yield {
                **example_record(example),
                "text": text,
                "status": self.statuses[i],
                "n_tokens": int(self.lengths[i]),
                "response_start": self.response_starts[i],
                **({} if self.spans is None else {"pooled_tokens": self.spans[i].tolist()}),
                **({"reason": self.reasons[i]} if i in self.reasons else {}),
                **_checksums(example, text),
            }

    def _with_texts(self) -> Iterator[tuple[Example, str]]:
        if self.texts is not None:
            yield from zip(self.examples, self.texts, strict=True)
            return
        for start in range(0, len(self.examples), TOKENISED_AT_ONCE):
            part = list(self.examples[start : start + TOKENISED_AT_ONCE])
            yield from ((item.example, item.text) for item in self.tokenize(part))


def prepare(
    model: ModelAdapter,
    examples: Sequence[Example],
    section: ReadingSection,
    n_sites: int = 1,
    *,
    tell: bool = True,
) -> Reading:
    """Tokenise a dataset and fix the plan.

    Args:
        model: The model that will read it.
        examples: The dataset.
        section: How to read it.
        n_sites: Sites read at once, for the estimate of memory.
        tell: Warn of examples that are left out; False where the caller says why itself.

    Raises:
        InputError: If no example can be read, or too many images are bad.
        MismatchError: If examples have images and the model reads none.
    """
    chosen = examples[: section.limit_examples]
    lazy = not isinstance(chosen, list | tuple)
    tokenize = partial(model.tokenize, truncate=section.truncate)
    lengths = np.zeros(len(chosen), dtype=np.int32)
    kept = np.zeros(len(chosen), dtype=np.int32)
    pooled = section.pooling.name != "none"
    spans = np.zeros((len(chosen), 2), dtype=np.int32) if pooled else None
    computed = np.zeros(len(chosen), dtype=np.int32)
    patches = np.zeros(len(chosen), dtype=np.int32)
    straddles = np.zeros(len(chosen), dtype=bool)
    truncated = np.zeros(len(chosen), dtype=bool)
    texts: list[str] = []
    response_starts: list[int | None] = []
    statuses: list[str] = []
    reasons: dict[int, str] = {}
    bad_images: dict[str, str] = {}
    images, of_text = 0, 0
    for start in range(0, len(chosen), TOKENISED_AT_ONCE):
        part = list(chosen[start : start + TOKENISED_AT_ONCE])
        check_reads_images(model, part)
        images += sum(example.image is not None for example in part)
        for item in tokenize(part):
            i = len(statuses)
            places = np.flatnonzero(kept_tokens(item, section))
            lengths[i], kept[i] = len(item.ids), len(places)
            if spans is not None and len(places):
                spans[i] = places[0], places[-1] + 1
            computed[i] = len(computed_part(item, section, model).ids)
            patches[i] = item.patches
            straddles[i], truncated[i] = item.straddles, item.truncated
            if not lazy:
                texts.append(item.text)
            response_starts.append(item.response_start)
            statuses.append(_status(item, bool(kept[i]), section))
            of_text += statuses[i] == "ok" and item.example.image is None
            if item.reason is not None:
                reasons[i] = item.reason
            elif statuses[i] == "no_tokens" and _image_is_last(item, section):
                reasons[i] = IMAGE_LAST
            if item.status == "bad_image" and item.example.image is not None:
                bad_images[item.example.id] = item.reason or "no reason given"
    check_bad_images(bad_images, images, section)
    counts = Counter(statuses)
    ledger = Ledger(ok=counts.pop("ok", 0), skipped=counts)
    if not ledger.ok:
        raise InputError(
            f"none of the {len(chosen)} examples can be read by {model.name}: {ledger}.",
            then=_how_to_read_more(
                ledger, set(reasons.values()), int(lengths.max()), model.max_length, section
            ),
        )
    if ledger.skipped and tell:
        log.warning("%d of %d examples are left out: %s", counts.total(), len(chosen), ledger)
    tell_of_texts(of_text, ledger.ok, section)
    usable = [i for i, status in enumerate(statuses) if status == "ok"]
    plan = _plan(lengths, computed, patches, usable, kept, section, model.d_model, n_sites)
    return Reading(
        chosen,
        None if lazy else texts,
        lengths,
        kept,
        spans,
        computed,
        response_starts,
        straddles,
        truncated,
        statuses,
        reasons,
        plan,
        ledger,
        tokenize,
    )


def write_tables(folder: Path, reading: Reading, name: str) -> None:
    """Write the example table and the plan; doing so again on a resume changes nothing."""
    with fsio.staged(folder / name) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(map(fsio.dump_json_line, reading.records()))
    fsio.commit_json(folder / PLAN, reading.plan.as_record())


def kept_tokens(item: TokenizedExample, section: ReadingSection) -> Bool[np.ndarray, "tokens"]:
    """Return which tokens of an example are kept, or averaged."""
    pooling, positions = section.pooling, np.arange(len(item.ids))
    text = ~item.special & (item.roles != ROLES.index("image"))
    if pooling.name == "eos":
        return positions == len(item.ids) - 1
    if pooling.name == "span_mean":
        start, end = pooling.span or item.example.span or (0, 0)
        return (positions >= start) & (positions < end)
    if pooling.name == "last_k_mean":
        chosen = np.zeros(len(item.ids), dtype=bool)
        chosen[np.flatnonzero(text)[-pooling.last_k :]] = True
        return chosen
    if pooling.name == "text_only_mean":
        image = np.flatnonzero(item.roles == ROLES.index("image"))
        return text & (positions > (image[-1] if len(image) else -1))
    border = len(positions) if item.response_start is None else item.response_start
    if section.tokens == "prompt_end":
        of_prompt = section.BOS_ENDS_PROMPT or bool(item.offsets[:border, 1].any())
        return (positions == border - 1) & of_prompt
    if section.tokens == "response":
        return positions >= border
    return ~item.special if section.tokens == "text" else np.ones(len(positions), dtype=bool)


def computed_part(
    item: TokenizedExample, section: ReadingSection, model: ModelAdapter
) -> TokenizedExample:
    """Return what of an example goes through the model: nothing behind the last kept token.

    A causal model's activations do not depend on what follows. `text` is left whole, where the cut
    would save a closing special token at most. Nor is anything cut before the last token of an
    image: its pixels come as a whole, and in some families its tokens read each other. A response
    that is cut off still begins at `response_start`, one behind the last token.

    Args:
        item: The whole example.
        section: How it is read.
        model: What reads it.
    """
    if section.tokens == "text" or not model.causal:
        return item
    of_image = item.roles == ROLES.index("image")
    kept = kept_tokens(item, section)
    needed = np.flatnonzero(kept | of_image)
    if not kept.any() or needed[-1] + 1 == len(item.ids):
        return item
    head = slice(int(needed[-1]) + 1)
    return replace(
        item,
        ids=item.ids[head],
        offsets=item.offsets[head],
        roles=item.roles[head],
        special=item.special[head],
    )


def _checksums(example: Example, text: str) -> dict[str, str | None]:
    """Return checksums of an example's text and image, where it has an image."""
    if example.image is None:
        return {}
    return {
        "prompt_hash": fsio.digest_bytes(text.encode("utf-8")),
        "image_hash": digest_or_none(example.image),
    }


def _status(item: TokenizedExample, any_kept: bool, section: ReadingSection) -> str:
    """Return what becomes of an example: its own status, or why nothing of it can be kept."""
    if item.status != "ok":
        return str(item.status)
    if section.contrast.method in OF_IMAGES and not (item.roles == ROLES.index("image")).any():
        return "no_image"  # with and without its image it is the same
    if any_kept:
        return "ok"
    pooling = section.pooling
    without = pooling.name == "span_mean" and (pooling.span or item.example.span) is None
    return "no_span" if without else "no_tokens"


def _image_is_last(item: TokenizedExample, section: ReadingSection) -> bool:
    """Return whether a mean over the text behind an image has none, though there is text."""
    of_image = item.roles == ROLES.index("image")
    averaged = section.pooling.name == "text_only_mean"
    return averaged and bool(of_image.any() and (~item.special & ~of_image).any())


def _how_to_read_more(
    ledger: Ledger, reasons: Set[str], longest: int, max_length: int, section: ReadingSection
) -> str:
    steps = []
    if ledger.skipped["too_long"]:
        steps.append(
            f"The model reads up to {max_length} tokens, and the longest text has {longest}: set "
            f"{section.SECTION}.truncate=right to drop the ends of long texts."
        )
    of_text = sorted(reason for reason in reasons if reason.startswith(OF_TEXT))
    if of_text:
        steps.append(f"An example is left out because {of_text[0]}. {MEND_TEXT}")
    elif ledger.skipped["bad_image"]:
        steps.append("saefty data show says what is wrong with the images.")
    if ledger.skipped["empty"]:
        steps.append(
            "Check that data.text (or data.prompt, data.response) names a column with text."
        )
    if ledger.skipped["no_image"]:
        steps.append(
            f"{section.SECTION}.contrast.method={section.contrast.method} is about what an image "
            "does, and these examples have none that the model reads: set data.image to the column "
            "of images, and model.name to a vision-language model; zero_attention needs no image."
        )
    if ledger.skipped["no_span"]:
        steps.append(
            f"{section.SECTION}.pooling.name=span_mean needs tokens [start, end): set data.span to "
            f"a column of them, or {section.SECTION}.pooling.span=[start,end] for all alike."
        )
    if ledger.skipped["no_tokens"]:
        span = f" (span {section.pooling.span})" if section.pooling.span else ""
        if IMAGE_LAST in reasons:
            steps.append(
                f"The image is last in these texts, and {section.SECTION}.pooling.name="
                "text_only_mean averages the text behind it, of which there is none: write the "
                "image's marker before the text or leave it out of the prompt, or set "
                f"{section.SECTION}.pooling.name=eos to read the last token."
            )
        elif section.tokens == "text":
            steps.append(
                f"Check {section.SECTION}.pooling: it keeps no token of these texts{span}."
            )
        else:
            steps.append(
                f"Check {section.SECTION}.tokens={section.tokens}, which keeps no token of these "
                "texts, and that data.response names a column with text."
            )
    return " ".join(steps)


def _plan(
    lengths: Int[np.ndarray, "examples"],
    computed: Int[np.ndarray, "examples"],
    patches: Int[np.ndarray, "examples"],
    usable: Sequence[int],
    kept: Int[np.ndarray, "examples"],
    section: ReadingSection,
    width: int,
    n_sites: int,
) -> Plan:
    if section.save.shard_size is not None:
        pooled = section.pooling.name != "none"
        sizes, limit = [1 if pooled else int(kept[i]) for i in usable], section.save.shard_size
    else:
        # All tokens of a piece are held before they are pooled and written, in four bytes at most.
        sizes = [int(kept[i]) * width * 4 for i in usable]
        if section.tokens != "text":  # few rows of many tokens, which are held as well
            sizes = [
                max(size, int(lengths[i]) * TOKEN_BYTES)
                for size, i in zip(sizes, usable, strict=True)
            ]
        limit = PIECE_BYTES * 4 // max(n_sites, 4)
    pieces = []
    for start, end in piece_ranges(sizes, limit):
        members = usable[start:end]
        batches = plan_batches(
            [int(computed[i]) for i in members],
            section.token_budget,
            window=len(members),
            patches=[int(patches[i]) for i in members],
        )
        pieces.append(tuple(tuple(members[i] for i in batch) for batch in batches))
    return Plan(tuple(pieces))
