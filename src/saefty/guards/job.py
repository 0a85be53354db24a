"""Scoring a file: its texts, one line out for each, and what they come to."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from saefty import fsio
from saefty.errors import ConfigError
from saefty.guards.card import CHANCE, no_better_than_chance
from saefty.guards.place import RECORD
from saefty.guards.report import is_score_row, listed, measure, score_row, summary
from saefty.guards.scoring import Guard, Verdicts, load_guard
from saefty.guards.spec import has_response, plain_text, reading_of, text_hash
from saefty.guards.texts import MOSTLY, STDIN, data_section, files_read, read_examples
from saefty.log import progress
from saefty.records import Example

log = logging.getLogger(__name__)

AT_ONCE = 1024
"""Texts between two reports of progress; a multiple of what is sorted by length together."""
LISTED = 50
"""Most texts that are shown one by one."""


@dataclass(frozen=True)
class ScoreRequest:
    """What `saefty guard score` was asked for.

    Attributes:
        guard: The guard's folder.
        file: A file of any form that `data.path` reads; `-` reads lines from standard input.
        columns: Keys of `data.` and what they are set to.
        words: Further KEY=VALUE words.
        threshold: A probability, or the name of a threshold.
        out: Where the lines go.
        model: Where the model lies, if not where the guard's record says.
        device: Where it runs.
        truncate: What is done with texts longer than its context, if not as in training.
    """

    guard: Path
    file: str
    columns: Mapping[str, str]
    words: tuple[str, ...] = ()
    threshold: str | None = None
    out: Path | None = None
    model: str | None = None
    device: str = "auto"
    truncate: str | None = None


@dataclass(frozen=True)
class ScoreOutcome:
    """The scores of a file.

    Attributes:
        request: What was asked for.
        figures: As `measure`.
        rows: The line of each text.
        texts: What was written in each.
    """

    request: ScoreRequest
    figures: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    texts: Sequence[str]

    def record(self) -> dict[str, Any]:
        """Return what `--json` prints; the rows are in it where no file holds them."""
        out = self.request.out
        rows = {} if out else {"scores": list(self.rows)}
        return {
            "stage": "guard score",
            "run": None,
            "out": out and str(out),
            "figures": dict(self.figures),
            **rows,
        }

    def text(self) -> str:
        """Return what is printed: the texts themselves where they are few and no file has them."""
        lines = [summary(self.figures)]
        if self.request.out is not None:
            lines.append(str(self.request.out))
        elif len(self.rows) <= LISTED:
            lines.insert(0, listed(self.rows, self.texts))
        else:
            lines.append("The score of each text: --out scores.jsonl")
        return "\n".join(lines)


def score_file(request: ScoreRequest) -> ScoreOutcome:
    """Score the texts of a file.

    Args:
        request: What to score, and how.

    Raises:
        ConfigError: If a setting cannot be used, or there is no guard.
        InputError: If the file cannot be read.
        SaeftyError: As `load_guard` and `Guard.score`.
    """
    section = data_section(request.file, request.columns, request.words)
    _check_out(request.out, files_read(section))
    guard = load_guard(
        request.guard, request.model, device=request.device, truncate=request.truncate
    )
    if request.model is not None and guard.spec.reads == "words":
        log.warning("this guard reads words and no model: --model %s is not used", request.model)
    least = guard.spec.threshold_of(request.threshold)
    examples = read_examples(section, raw=guard.spec.raw)
    _warn(examples, guard)
    parts: list[Verdicts] = []
    rows: list[dict[str, Any]] = []
    with _writing(request.out) as file, progress("scoring", len(examples), "texts") as bar:
        for start in range(0, len(examples), AT_ONCE):
            part = examples[start : start + AT_ONCE]
            parts.append(guard.judge(part))
            lines = [score_row(one, parts[-1], i, least) for i, one in enumerate(part)]
            if file is not None:
                file.writelines(map(fsio.dump_json_line, lines))
            rows += lines
            bar.advance(len(part))
    verdicts = _joined(parts)
    _warn_of_unread(verdicts, request, "words" if guard.spec.reads == "words" else "tokens")
    texts = [plain_text(example) for example in examples]
    return ScoreOutcome(request, _figures(examples, verdicts, least, guard), rows, texts)


def _figures(
    examples: Sequence[Example], verdicts: Verdicts, least: float, guard: Guard
) -> dict[str, Any]:
    """Measure all texts and, where some are known, those that the guard was not fitted on."""
    figures = measure(examples, verdicts, least)
    known = [text_hash(example) in guard.files.fitted_on for example in examples]
    new = [i for i, old in enumerate(known) if not old]
    if figures["labelled"] and new and len(new) < len(examples):
        statuses = tuple(verdicts.statuses[i] for i in new)
        others = replace(
            verdicts,
            log_odds=verdicts.log_odds[new],
            statuses=statuses,
            reasons={},
            unknown=verdicts.unknown[new],
        )
        figures["unseen"] = measure([examples[i] for i in new], others, least)
    auroc = figures.get("unseen", figures)["auroc"] or figures["auroc"]
    if auroc and auroc["high"] is not None and auroc["high"] < CHANCE:
        log.warning(
            "AUROC %.3f lies below 0.5, with its whole interval: the labels may be inverted; "
            "--harmful names the values that mean harmful",
            auroc["estimate"],
        )
    return figures


def _check_out(out: Path | None, read: Sequence[str]) -> None:
    """Refuse an output that is no place for scores, or holds something else, before any work.

    Args:
        out: Where the scores are to go.
        read: The files that are read.

    Raises:
        ConfigError: If it is no .jsonl file, a file that is read or lies in a guard's folder, or
            holds anything but scores of this command.
    """
    if out is None:
        return
    if str(out) == STDIN:
        raise ConfigError(
            "--out names a file, and - is none.",
            then="To have the scores on standard output leave out --out and give --json.",
        )
    if out.suffix != ".jsonl":
        raise ConfigError(
            f"--out: {out} is not a .jsonl file, and scores are written as lines of JSON.",
            then=f"Write for example --out {out.with_suffix('.jsonl')}.",
        )
    if out.is_dir():
        raise ConfigError(f"--out: {out} is a folder.", then=f"Name a file: {out}/scores.jsonl.")
    guards = [folder for folder in out.absolute().parents if (folder / RECORD).is_file()]
    if guards:
        raise ConfigError(
            f"--out: {out} lies in the folder of a guard, {guards[0]}, which holds its own files "
            "alone.",
            safe="Nothing was written.",
            then="Name a file in another folder.",
        )
    if not out.exists():
        return
    if any(Path(name).exists() and out.samefile(name) for name in read):
        raise ConfigError(
            f"--out and the file to read are both {out}.",
            safe="Nothing was written.",
            then="Give --out another name.",
        )
    if not _holds_scores(out):
        raise ConfigError(
            f"--out: {out} exists already ({out.stat().st_size:,} bytes), and it does not hold "
            "scores that this command wrote.",
            safe="Nothing in it was touched.",
            then="Name another file with --out, or delete this one.",
        )
    log.info("the scores in %s will be written over", out)


def _holds_scores(path: Path) -> bool:
    """Return whether each line of a file is one that this command writes; true of no line."""
    try:
        with open(path, encoding="utf-8") as file:
            return all(is_score_row(json.loads(line)) for line in file)
    except (OSError, ValueError, RecursionError):
        return False


def _warn(examples: Sequence[Example], guard: Guard) -> None:
    """Say where the texts are read otherwise than those that the guard was fitted on."""
    spec, facts = guard.spec, guard.files.facts
    if no_better_than_chance(facts):
        log.warning(
            "that this guard does better than chance has not been shown: its AUROC was %s",
            facts.auroc,
        )
    known = sum(text_hash(example) in guard.files.fitted_on for example in examples)
    if known:
        log.warning(
            "the guard was fitted on %d of these %d texts: %s",
            known, len(examples),
            "figures of all texts flatter it, those of the others are told apart"
            if any(example.label is not None for example in examples)
            else "their scores say nothing of how it does on others",
        )  # fmt: skip
    here = reading_of(examples)
    if spec.reads != "words" and here["raw"] != spec.raw:
        log.warning(
            "these texts are read %s, but the guard was fitted on texts read %s: %s",
            *(("as they stand", "in the chat template", "give the column as --prompt")
              if here["raw"] else
              ("in the chat template", "as they stand", "give the column as --text")),
        )  # fmt: skip
    without = sum(not has_response(example) for example in examples)
    if spec.with_response and without:
        log.warning(
            "%d of %d texts have no response, but the guard was fitted on prompts with responses",
            without, len(examples),
        )  # fmt: skip
    elif not spec.with_response and without < len(examples):
        log.warning(
            "%d of %d texts have a response, but the guard was fitted on texts without",
            len(examples) - without, len(examples),
        )  # fmt: skip


def _warn_of_unread(verdicts: Verdicts, request: ScoreRequest, what: str) -> None:
    too_long = verdicts.statuses.count("too_long")
    if too_long:
        log.warning(
            "texts longer than the model's context have no score: %d; --truncate right reads their "
            "beginning, --truncate left their end",
            too_long,
        )
    unknown = verdicts.unknown[verdicts.read]
    strange = unknown > MOSTLY
    if strange.any():
        log.warning(
            "%d of %d texts are mostly of %s that the guard does not know (%.0f %% of all): their "
            "scores rest on little",
            strange.sum(), len(unknown), what, 100 * float(unknown.mean()),
        )  # fmt: skip
    for place, why in list(verdicts.reasons.items())[:3]:
        log.warning("text %d (from 0) has no score: %s", place, why)
    if not verdicts.read.any():
        log.warning("no text of %s has a score", request.file)


@contextmanager
def _writing(out: Path | None) -> Iterator[TextIO | None]:
    """Yield a file of lines that appears when all of them are written; None without a name."""
    if out is None:
        yield None
        return
    with fsio.staged(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        yield file


def _joined(parts: Sequence[Verdicts]) -> Verdicts:
    reasons = {
        number * AT_ONCE + place: why
        for number, part in enumerate(parts)
        for place, why in part.reasons.items()
    }
    return Verdicts(
        np.concatenate([part.log_odds for part in parts]),
        tuple(status for part in parts for status in part.statuses),
        reasons,
        np.concatenate([part.unknown for part in parts]),
    )
