"""Replies under a vector at many strengths: a plan, its pieces, and what is on disk already.

The plan is fixed by the prompts, the alphas and the batch size before the first forward pass: which
replies are generated together decides the last bits of their activations. A piece is one batch, and
its file appears whole or not at all; an interrupted job meets the same batches again and ends with
the same bytes. A batch carries another alpha in each row, so a grid costs no more passes than as
many prompts.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saefty import fsio
from saefty.errors import ConfigError, InputError, IntegrityError
from saefty.interventions.base import Where
from saefty.interventions.steer import Method, Unit, steer
from saefty.interventions.vectors import SteeringVector
from saefty.log import progress
from saefty.models.base import ModelAdapter
from saefty.records import Example

UNSTEERED = "unsteered"
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


def replies_under(
    model: ModelAdapter,
    prompts: Sequence[Example],
    arms: Sequence[Arm],
    alphas: Sequence[float],
    sampling: Sampling,
    folder: Path,
) -> dict[Dose, list[str]]:
    """Return the replies under every arm and alpha, the unsteered ones first.

    Args:
        model: The model.
        prompts: What to reply to; the same for all doses.
        arms: The ways to steer; see `check_names`.
        alphas: The strengths; 0 is the unsteered model, generated once for all arms.
        sampling: How replies are drawn.
        folder: Where they are kept, one file a batch; those on disk are not generated again.

    Raises:
        ConfigError: If the arms' names do not do.
        InputError: If a prompt is empty or longer than the context.
        IntegrityError: If a file holds other replies than the plan has there.
        NumericError: If a dose turns the logits to NaN; it names alpha and step.
        SaeftyError: If a vector does not fit the model, or the model cannot generate.
    """
    check_prompts(prompts)
    check_names([arm.name for arm in arms])
    for arm in arms:
        arm.vector.check_model(model)
    strong = [alpha for alpha in alphas if alpha != 0]
    order = _longest_first(model, prompts)
    found: dict[Dose, list[str]] = {PLAIN: [""] * len(prompts)}
    total = len(prompts) * (1 + len(arms) * len(strong))
    with progress("generating", total, "replies") as bar:
        for piece in _pieces([(PLAIN, n) for n in order], sampling.batch_size):
            path = folder / UNSTEERED / f"{piece.number:05d}.jsonl"
            _fill(found, piece, _piece(model, prompts, piece, None, sampling, path))
            bar.advance(len(piece.samples))
        for arm in arms:
            doses = [Dose(arm.name, alpha) for alpha in strong]
            found |= {dose: [""] * len(prompts) for dose in doses}
            samples = [(dose, n) for n in order for dose in doses]
            for piece in _pieces(samples, sampling.batch_size):
                path = folder / arm.name / f"{piece.number:05d}.jsonl"
                _fill(found, piece, _piece(model, prompts, piece, arm, sampling, path))
                bar.advance(len(piece.samples))
    return found


def gather(path: Path, prompts: Sequence[Example], replies: Replies) -> None:
    """Write all replies into one file, a line each: dose by dose, prompts in order."""
    fsio.commit_text(
        path,
        "".join(
            fsio.dump_json_line(_record(dose, prompt, reply))
            for dose, texts in replies.items()
            for prompt, reply in zip(prompts, texts, strict=True)
        ),
    )


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


def _fill(found: dict[Dose, list[str]], piece: _Piece, replies: Sequence[str]) -> None:
    for (dose, n), reply in zip(piece.samples, replies, strict=True):
        found[dose][n] = reply


def _piece(
    model: ModelAdapter,
    prompts: Sequence[Example],
    piece: _Piece,
    arm: Arm | None,
    sampling: Sampling,
    path: Path,
) -> list[str]:
    """Return a batch's replies, from the disk if they are there."""
    asked = [prompts[n] for _, n in piece.samples]
    if path.exists():
        return _kept(path, piece, prompts)
    settings: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "seed": sampling.seed,
        "temperature": sampling.temperature,
        "batch_size": len(asked),
    }
    if arm is None:
        replies = model.generate(asked, **settings)
    else:
        edit = steer(
            arm.vector,
            [dose.alpha for dose, _ in piece.samples],
            method=arm.method,
            unit=arm.unit,
            where=arm.where,
            skip_special=arm.skip_special,
        )
        with model.intervene(arm.vector.site, edit):
            replies = model.generate(asked, **settings)
    fsio.commit_text(
        path,
        "".join(
            fsio.dump_json_line(_record(dose, prompts[n], reply))
            for (dose, n), reply in zip(piece.samples, replies, strict=True)
        ),
    )
    return replies


def _kept(path: Path, piece: _Piece, prompts: Sequence[Example]) -> list[str]:
    """Return the replies of a batch's file.

    Raises:
        IntegrityError: If they are not those of the batch's samples, one for each, in order.
    """
    records = list(fsio.read_lines(path))
    planned = [(dose.arm, dose.alpha, prompts[n].id) for dose, n in piece.samples]
    found = [tuple(one.get(key) for key in ("arm", "alpha", "example_id")) for one in records]
    texts = [one.get("reply") for one in records]
    replies = [text for text in texts if isinstance(text, str)]
    if found != planned or len(replies) < len(texts):
        raise IntegrityError(
            f"{path} does not hold the {len(planned)} replies that belong there: it has "
            f"{len(found)} lines, of arm, alpha and example {found[:1]} on, but the plan has "
            f"{planned[:1]} on.",
            safe="No other file was touched.",
            then="Remove it and run the same command again; it generates these replies anew.",
        )
    return replies


def _record(dose: Dose, prompt: Example, reply: str) -> dict[str, Any]:
    return {"arm": dose.arm, "alpha": dose.alpha, "example_id": prompt.id, "reply": reply}
