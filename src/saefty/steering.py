"""Replies under a vector at many strengths: a plan, its pieces, and what is on disk already.

The plan is fixed by the prompts, the alphas and the batch size before the first forward pass: which
replies are generated together decides the last bits of their activations. A piece is one batch, and
its file appears whole or not at all; an interrupted job meets the same batches again and ends with
the same bytes. A batch carries another alpha in each row, so a grid costs no more passes than as
many prompts.

A strength that turns logits to NaN is broken: it has no replies, and why is kept. The others go on.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saefty import fsio
from saefty.errors import ConfigError, InputError, IntegrityError, NumericError
from saefty.interventions.base import Where
from saefty.interventions.steer import Method, Unit, steer
from saefty.interventions.vectors import SteeringVector
from saefty.log import progress
from saefty.models.base import ModelAdapter
from saefty.records import Example

log = logging.getLogger(__name__)

UNSTEERED = "unsteered"
BROKEN = "broken"
"""The key of a reply's line that says why there is none."""
NAME = re.compile(r"(?!\.)[\w .,-]+")
LONGEST_NAME = 150
"""Bytes of an arm's name: its scores' files carry alpha too, and a file's name has 255."""


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to steer, at whatever strength.

    Attributes:
        name: A file's name; see `check_names`.
        vector: What is added, and at which site.
        method: 1 adds; 2 adds and keeps the norm.
        unit: What alpha = 1 means.
        where: At which tokens to act.
        skip_special: Leave special tokens alone.
    """

    name: str
    vector: SteeringVector
    method: Method = 1
    unit: Unit = "activation"
    where: Where = "both"
    skip_special: bool = True


@dataclass(frozen=True, order=True)
class Dose:
    """An arm at one strength; alpha 0 is the model as it is, whatever the arm."""

    arm: str
    alpha: float

    @property
    def name(self) -> str:
        """A file's name."""
        return UNSTEERED if self.alpha == 0 else f"{self.arm}_{self.alpha!r}"


PLAIN = Dose(UNSTEERED, 0.0)
Replies = Mapping[Dose, Sequence[str]]
"""The replies to all prompts, in order, under each dose."""


@dataclass(frozen=True)
class Steered:
    """What a model replied.

    Attributes:
        replies: To all prompts, in order, under each dose that did not break.
        broken: Why a dose has no replies: the first message that names alpha and step.
    """

    replies: dict[Dose, list[str]]
    broken: dict[Dose, str]


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn, the same under every dose.

    Attributes:
        max_new_tokens: Longest reply.
        temperature: 0 takes the likeliest token.
        seed: Of the streams, one for each prompt.
        batch_size: Replies that are generated together.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 32


def check_names(names: Sequence[str]) -> None:
    """Refuse names of arms whose replies would lie outside the run, or on top of others.

    Raises:
        ConfigError: If a name cannot be a file's, is that of the unsteered replies, or two are the
            same but for upper and lower case.
    """
    taken = {UNSTEERED: f"that of the replies of the model as it is ({UNSTEERED})"}
    for name in names:
        if not NAME.fullmatch(name) or len(name.encode()) > LONGEST_NAME:
            raise ConfigError(
                f"{name!r} cannot name a way to steer: its replies are kept in files of that name.",
                then=f"Take letters, digits, spaces and any of _ . , - (at most {LONGEST_NAME} "
                "bytes), and no dot in front.",
            )
        if name.casefold() in taken:
            raise ConfigError(
                f"the name {name!r} of a way to steer is the same as "
                f"{taken[name.casefold()]}, and both keep replies under it.",
                then="Give it another name.",
            )
        taken[name.casefold()] = f"that of another ({name})"


def check_prompts(prompts: Sequence[Example]) -> None:
    """Refuse prompts to which there is nothing to reply.

    Raises:
        InputError: If there are none, or one holds nothing but spaces.
    """
    empty = [one.id for one in prompts if not one.messages and not one.prompt.strip()]
    if empty or not prompts:
        raise InputError(
            f"{len(empty)} of {len(prompts)} prompts are empty: {', '.join(empty[:10])}."
            if empty
            else "there are no prompts.",
            then="Give prompts that hold text.",
        )


def check_places(
    where: Where, model: ModelAdapter, prompts: Sequence[Example], tokens: int, *, skip: bool = True
) -> None:
    """Refuse places at which nothing could be steered.

    Args:
        where: At which tokens to act; words are always somewhere.
        model: Whose tokens are counted.
        prompts: What is replied to.
        tokens: Longest reply.
        skip: Special tokens are left alone.

    Raises:
        ConfigError: If a place lies behind the end of every reply, or all are special tokens.
    """
    if isinstance(where, str):
        return
    items = model.tokenize(prompts)
    longest = max(len(item.ids) for item in items)
    last = longest + tokens - 2  # the last token of a reply is not read again
    if max(where) > last:
        raise ConfigError(
            f"no token lies at place {max(where)}: the longest of {len(prompts)} prompts has "
            f"{longest} tokens and a reply up to {tokens}, of which the last is not read again, so "
            f"places run 0..{last}.",
            then="Name places in that range, or one of the words prefill, decode, last, both.",
        )
    inside = [[place for place in where if place < len(item.ids)] for item in items]
    if skip and all(
        len(own) == len(where) and item.special[own].all()
        for own, item in zip(inside, items, strict=True)
    ):
        raise ConfigError(
            f"all tokens at places {', '.join(map(str, where))} are special ones of the template "
            "or the tokenizer, which are left alone.",
            then="Name other places, such as last.",
        )


def replies_under(
    model: ModelAdapter,
    prompts: Sequence[Example],
    arms: Sequence[Arm],
    alphas: Sequence[float],
    sampling: Sampling,
    folder: Path,
) -> Steered:
    """Return the replies under every arm and alpha, the unsteered ones first.

    A dose that turns logits to NaN on one prompt is broken on all: nothing more is generated under
    it, and it has no replies.

    Args:
        model: The model.
        prompts: What to reply to; the same for all doses.
        arms: The ways to steer; see `check_names`.
        alphas: The strengths; 0 is the unsteered model, generated once for all arms.
        sampling: How replies are drawn.
        folder: Where they are kept, one file a batch; those on disk are not generated again.

    Raises:
        ConfigError: If the arms' names do not do, or places at which to act do not exist.
        InputError: If a prompt is empty or longer than the context.
        IntegrityError: If a file holds other replies than the plan has there.
        NumericError: If the unsteered model or every dose turns the logits to NaN; it names alpha
            and step.
        SaeftyError: If a vector does not fit the model, or the model cannot generate.
    """
    check_prompts(prompts)
    check_names([arm.name for arm in arms])
    for arm in arms:
        arm.vector.check_model(model)
        check_places(arm.where, model, prompts, sampling.max_new_tokens, skip=arm.skip_special)
    strong = [alpha for alpha in alphas if alpha != 0]
    order = _longest_first(model, prompts)
    found: dict[Dose, list[str]] = {PLAIN: [""] * len(prompts)}
    broken: dict[Dose, str] = {}
    total = len(prompts) * (1 + len(arms) * len(strong))
    with progress("generating", total, "replies") as bar:
        every: list[Arm | None] = [None, *arms]
        for way in every:
            doses = [PLAIN] if way is None else [Dose(way.name, alpha) for alpha in strong]
            found |= {dose: [""] * len(prompts) for dose in doses}
            samples = [(dose, n) for n in order for dose in doses]
            for piece in _pieces(samples, sampling.batch_size):
                path = folder / (way.name if way else UNSTEERED) / f"{piece.number:05d}.jsonl"
                texts = _piece(model, prompts, piece, way, sampling, path, broken)
                for (dose, n), text in zip(piece.samples, texts, strict=True):
                    found[dose][n] = text or ""
                bar.advance(len(piece.samples))
    for dose, why in broken.items():
        log.warning("%s breaks the model and gets no score: %s", dose.name, why)
        del found[dose]
    if broken and len(found) == 1:
        raise NumericError(
            f"every strength breaks the model; the first: {next(iter(broken.values()))}",
            safe="The replies without steering are kept.",
            then="Set smaller alphas; where that does not help, set model.dtype=bfloat16 or "
            "float32.",
        )
    return Steered(found, broken)


def gather(path: Path, prompts: Sequence[Example], steered: Steered) -> None:
    """Write all replies into one file, a line each: dose by dose, prompts in order."""
    lines = [
        _record(dose, prompt, reply)
        for dose, texts in steered.replies.items()
        for prompt, reply in zip(prompts, texts, strict=True)
    ]
    lines += [_record(dose, prompt, None, why) for dose, why in steered.broken.items()
              for prompt in prompts]  # fmt: skip
    fsio.commit_text(path, "".join(map(fsio.dump_json_line, lines)))


@dataclass(frozen=True)
class _Piece:
    number: int
    samples: tuple[tuple[Dose, int], ...]


def _pieces(samples: Sequence[tuple[Dose, int]], size: int) -> Iterator[_Piece]:
    for number, start in enumerate(range(0, len(samples), size)):
        yield _Piece(number, tuple(samples[start : start + size]))


def _longest_first(model: ModelAdapter, prompts: Sequence[Example]) -> list[int]:
    """Return the prompts' places, so that those generated together are of like length."""
    lengths = [len(item.ids) for item in model.tokenize(prompts)]
    return sorted(range(len(prompts)), key=lambda n: (-lengths[n], n))


def _piece(
    model: ModelAdapter,
    prompts: Sequence[Example],
    piece: _Piece,
    arm: Arm | None,
    sampling: Sampling,
    path: Path,
    broken: dict[Dose, str],
) -> list[str | None]:
    """Return a batch's replies, from the disk if they are there; None under a broken dose.

    What a batch finds broken is added to `broken`, be it generated or read.

    Raises:
        NumericError: If the unsteered model's logits are NaN.
    """
    if path.exists():
        return _kept(path, piece, prompts, broken)
    asked = [sample for sample in piece.samples if sample[0] not in broken]
    texts: dict[tuple[Dose, int], str] = {}
    try:
        texts = _generated(model, prompts, asked, arm, sampling)
    except NumericError:
        if arm is None:
            raise
        # One of the batch's doses at least; each alone tells which, and what the others reply.
        for dose in dict.fromkeys(dose for dose, _ in asked):
            own = [sample for sample in asked if sample[0] == dose]
            try:
                texts |= _generated(model, prompts, own, arm, sampling)
            except NumericError as error:
                broken[dose] = error.message
    records = [
        _record(dose, prompts[n], texts.get((dose, n)), broken.get(dose))
        for dose, n in piece.samples
    ]
    fsio.commit_text(path, "".join(map(fsio.dump_json_line, records)))
    return [texts.get(sample) for sample in piece.samples]


def _generated(
    model: ModelAdapter,
    prompts: Sequence[Example],
    samples: Sequence[tuple[Dose, int]],
    arm: Arm | None,
    sampling: Sampling,
) -> dict[tuple[Dose, int], str]:
    """Return the replies of samples that are generated together."""
    asked = [prompts[n] for _, n in samples]
    settings: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "seed": sampling.seed,
        "temperature": sampling.temperature,
        "batch_size": len(asked),
    }
    if not asked:
        return {}
    if arm is None:
        return dict(zip(samples, model.generate(asked, **settings), strict=True))
    edit = steer(
        arm.vector,
        [dose.alpha for dose, _ in samples],
        method=arm.method,
        unit=arm.unit,
        where=arm.where,
        skip_special=arm.skip_special,
    )
    with model.intervene(arm.vector.site, edit):
        return dict(zip(samples, model.generate(asked, **settings), strict=True))


def _kept(
    path: Path, piece: _Piece, prompts: Sequence[Example], broken: dict[Dose, str]
) -> list[str | None]:
    """Return the replies of a batch's file.

    Raises:
        IntegrityError: If they are not those of the batch's samples, one for each, in order.
    """
    records = list(fsio.read_lines(path))
    planned = [(dose.arm, dose.alpha, prompts[n].id) for dose, n in piece.samples]
    found = [tuple(one.get(key) for key in ("arm", "alpha", "example_id")) for one in records]
    sound = all(isinstance(one.get("reply"), str) or one.get(BROKEN) for one in records)
    if found != planned or not sound:
        raise IntegrityError(
            f"{path} does not hold the {len(planned)} replies that belong there: it has "
            f"{len(found)} lines, of arm, alpha and example {found[:1]} on, but the plan has "
            f"{planned[:1]} on.",
            safe="No other file was touched.",
            then="Remove it and run the same command again; it generates these replies anew.",
        )
    for (dose, _), one in zip(piece.samples, records, strict=True):
        if one.get(BROKEN):
            broken.setdefault(dose, str(one[BROKEN]))
    return [one.get("reply") for one in records]


def _record(
    dose: Dose, prompt: Example, reply: str | None, why: str | None = None
) -> dict[str, Any]:
    """Return a line of a file; of a reply that there is not, why."""
    line = {"arm": dose.arm, "alpha": dose.alpha, "example_id": prompt.id, "reply": reply}
    return line | ({BROKEN: why} if why else {})
