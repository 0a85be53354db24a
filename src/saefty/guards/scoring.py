"""A guard at work: texts in, a probability for each out, by the way its training examples went.

Texts are tokenised, batched and read by the code that fills stores, up to the guard's site and no
further, and pooled as the probe's inputs were. A text that cannot be read has no score: NaN, and a
status that says why.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float

from saefty.encoding import encode_rows
from saefty.errors import InputError, MismatchError
from saefty.guards.files import GuardFiles, read_guard
from saefty.guards.inputs import as_examples, count_words, is_text, pool_activations, pool_latents
from saefty.guards.models import check_model, open_guard_model
from saefty.guards.spec import plain_text
from saefty.linear import probability
from saefty.models.base import ModelAdapter, TokenizedExample
from saefty.models.batching import DEFAULT_TOKEN_BUDGET, plan_batches
from saefty.pieces import Piece, PieceReader, PieceTask
from saefty.reading import computed_part, kept_tokens
from saefty.records import Example
from saefty.saes.base import SparseAutoencoder
from saefty.stores.base import piece_ranges
from saefty.words import bag_of_words

WINDOW = 256
"""Texts tokenised and sorted by length together."""
NO_TOKEN = -1
"""The id of no token: for tokenizers that know every text, as those of bytes do."""
PIECE_BYTES = 64 << 20
"""Activations held at once."""

OK = "ok"
"""The status of a text that has a score. Others: `empty`, `too_long`, `no_tokens`, `refused` by the
chat template, `not_text` (half of a character), `failed` in the forward pass, `nonfinite`."""

Texts = Sequence[Example | str]


@dataclass(frozen=True)
class Verdicts:
    """What a guard says of some texts, in their order.

    Attributes:
        log_odds: NaN where a text could not be read.
        statuses: `ok`, or why there is no score.
        reasons: What went wrong in words, by index, where the status does not say it all.
        unknown: Share of a text's words outside the vocabulary, of a guard of words, or of its
            tokens that are the tokenizer's unknown one; NaN where a text could not be read.
    """

    log_odds: Float[np.ndarray, "texts"]
    statuses: tuple[str, ...]
    reasons: dict[int, str]
    unknown: Float[np.ndarray, "texts"]

    @property
    def probability(self) -> Float[np.ndarray, "texts"]:
        """From 0 to 1; NaN where a text could not be read."""
        return probability(self.log_odds)

    @property
    def read(self) -> Bool[np.ndarray, "texts"]:
        """Which texts could be read."""
        return np.array([status == OK for status in self.statuses], dtype=bool)


class Guard:
    """A detector of harm that runs on text.

    Model and SAE are loaded when the first text is scored, and kept. Make one by `load_guard`.

    Args:
        files: Its folder, read.
        model: The model, or where it lies if not where the guard's record says; None goes by the
            record.
        device: Where the model runs.
        truncate: What is done with a text longer than the model's context: `never`, `left` or
            `right`; None does as in training.
        token_budget: Tokens in one forward pass, padding counted.

    Raises:
        ConfigError: If `truncate` is something else.
        MismatchError: If the model is not the guard's.
    """

    def __init__(
        self,
        files: GuardFiles,
        model: ModelAdapter | str | None = None,
        *,
        device: str = "auto",
        truncate: str | None = None,
        token_budget: int = DEFAULT_TOKEN_BUDGET,
    ) -> None:
        self.files, self.linear = files, files.linear
        self.spec = files.spec if truncate is None else files.spec.truncating(truncate)
        self.device, self.token_budget = device, token_budget
        self._given = model
        if isinstance(model, ModelAdapter) and self.spec.model is not None:
            check_model(self.spec, model)

    @property
    def folder(self) -> Path:
        """Where it was loaded from."""
        return self.files.folder

    @property
    def threshold(self) -> float:
        """The probability from which on it flags a text, unless told otherwise."""
        return float(probability(np.array([self.spec.threshold]))[0])

    def score(self, texts: Texts) -> Float[np.ndarray, "texts"]:
        """Return the probability that each text is harmful; NaN where it could not be read.

        Args:
            texts: Examples, or bare texts, which are read as most training examples were.

        Raises:
            MismatchError: If the model or the SAE is not the guard's.
            SaeftyError: As the loaders of model and SAE.
        """
        return self.judge(texts).probability

    def log_odds(self, texts: Texts) -> Float[np.ndarray, "texts"]:
        """Return the log-odds of each text; as `score`, but sure scores stay apart."""
        return self.judge(texts).log_odds

    def flag(
        self,
        texts: Texts,
        threshold: str | float | None = None,
    ) -> Bool[np.ndarray, "texts"]:
        """Return which texts reach a threshold.

        Args:
            texts: As for `score`.
            threshold: A probability, or the name of one of the guard's; None takes its default.

        Raises:
            InputError: If a text could not be read: neither answer would be true of it.
            ConfigError: If the threshold is none.
            SaeftyError: As `score`.
        """
        least = self.spec.threshold_of(threshold)
        verdicts = self.judge(texts)
        unread = np.flatnonzero(~verdicts.read)
        if len(unread):
            first = int(unread[0])
            raise InputError(
                f"{len(unread)} of {len(texts)} texts cannot be read, first number {first} (from "
                f"0): {verdicts.reasons.get(first, verdicts.statuses[first])}.",
                then="Use score, which gives NaN for them, or judge, which says why.",
            )
        return verdicts.log_odds >= least

    def judge(self, texts: Texts) -> Verdicts:
        """Return log-odds and statuses of texts.

        Args:
            texts: As for `score`.

        Raises:
            InputError: If one is neither.
            SaeftyError: As `score`.
        """
        examples = as_examples(texts, raw=self.spec.raw)
        nothing = np.full(len(examples), np.nan)
        found = Verdicts(nothing, (OK,) * len(examples), {}, nothing.copy())
        statuses = list(found.statuses)
        for i, example in enumerate(examples):
            written = plain_text(example)
            if not is_text(written):
                statuses[i] = "not_text"
                found.reasons[i] = "the text holds half of a character"
            elif not written.strip():
                statuses[i] = "empty"
        readable = [i for i, status in enumerate(statuses) if status == OK]
        if self.spec.reads == "words":
            self._score_words(examples, readable, found)
        elif readable:
            self._read(examples, readable, statuses, found)
        return replace(found, statuses=tuple(statuses))

    @cached_property
    def model(self) -> ModelAdapter:
        """The model that it reads, loaded once; a guard of words has none."""
        if isinstance(self._given, ModelAdapter):
            return self._given
        model = open_guard_model(self.spec, self._given, self.device)
        check_model(self.spec, model)
        return model

    @cached_property
    def sae(self) -> SparseAutoencoder:
        """Its SAE, loaded once."""
        sae = self.files.load_sae()
        if sae.d_sae != self.linear.width:
            raise MismatchError(
                f"the SAE in {self.folder} has {sae.d_sae} latents, but the guard reads "
                f"{self.linear.width}.",
                then="Copy the guard's whole folder again.",
            )
        model, _ = self.spec.place
        if sae.d_in != model.d_model:
            raise MismatchError(
                f"the SAE in {self.folder} reads activations {sae.d_in} wide, but those of "
                f"{model.name} are {model.d_model} wide.",
                then="Copy the guard's whole folder again.",
            )
        return sae

    def _score_words(
        self, examples: Sequence[Example], chosen: Sequence[int], found: Verdicts
    ) -> None:
        for start in range(0, len(chosen), WINDOW):
            part = list(chosen[start : start + WINDOW])
            texts = [plain_text(examples[i]) for i in part]
            counts = count_words(texts, self._columns)
            words = np.array([sum(1 for _ in bag_of_words(text)) for text in texts])
            found.unknown[part] = 1 - counts.sum(axis=1) / np.maximum(words, 1)
            found.log_odds[part] = self.linear.score(counts)

    @cached_property
    def _columns(self) -> dict[str, int]:
        return {word: column for column, word in enumerate(self.spec.vocabulary)}

    def _read(
        self,
        examples: Sequence[Example],
        chosen: Sequence[int],
        statuses: list[str],
        found: Verdicts,
    ) -> None:
        """Score texts through the model, window by window."""
        model, (_, site) = self.model, self.spec.place
        if self.spec.reads == "latents":
            self.sae.to(model.device)
        reader = PieceReader(model, [site], self.spec.section)
        tokenizer = model.tokenizer
        unknown_id = tokenizer.unk_token_id
        if unknown_id is None or unknown_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            unknown_id = NO_TOKEN
        for start in range(0, len(chosen), WINDOW):
            part = list(chosen[start : start + WINDOW])
            items = _tokenize(model, examples, part, self.spec.truncate, statuses, found.reasons)
            for i, item in items.items():
                kept = kept_tokens(item, self.spec.section)
                statuses[i] = item.status if item.status != OK or kept.any() else "no_tokens"
                unknown = item.ids == unknown_id
                found.unknown[i] = unknown.sum() / max((kept | unknown).sum(), 1)
            ready = {i: item for i, item in items.items() if statuses[i] == OK}
            for task in self._tasks(ready, model):
                piece = reader.read(task, _Silent())
                self._score_piece(piece, task, statuses, found)

    def _tasks(
        self, items: dict[int, TokenizedExample], model: ModelAdapter
    ) -> Iterator[PieceTask]:
        """Yield what is read together: batches of like length, in pieces that fit in memory."""
        section, order = self.spec.section, list(items)
        sizes = [len(items[i].ids) * model.d_model * 4 for i in order]
        for start, end in piece_ranges(sizes, PIECE_BYTES):
            members = order[start:end]
            lengths = [len(computed_part(items[i], section, model).ids) for i in members]
            batches = tuple(
                tuple(members[place] for place in batch)
                for batch in plan_batches(lengths, self.token_budget, window=WINDOW)
            )
            of_piece = {i: items[i] for i in members}
            yield PieceTask(start, batches, batches, of_piece, max_failed=len(members))

    def _score_piece(
        self, piece: Piece, task: PieceTask, statuses: list[str], found: Verdicts
    ) -> None:
        (x,) = piece.activations.values()
        owner, section = piece.rows["example"], self.spec.section
        there = np.bincount(owner, minlength=max(task.items) + 1)
        names = {item.example.id: i for i, item in task.items.items()}
        for name, why in piece.failed.items():
            statuses[names[name]] = "failed"
            found.reasons[names[name]] = why
        whole = []
        for i, item in task.items.items():
            if statuses[i] == OK and there[i] < kept_tokens(item, section).sum():
                statuses[i] = "nonfinite"
                found.reasons[i] = "activations are NaN or infinite"
            elif statuses[i] == OK:
                whole.append(i)
        if not whole:
            return
        place = np.full(max(task.items) + 1, -1)
        place[whole] = np.arange(len(whole))
        kept = place[owner] >= 0
        rows, belongs = x[torch.from_numpy(kept)], place[owner[kept]]
        if self.spec.pooling == "last":  # a text's rows lie in order
            last = np.flatnonzero(np.diff(belongs, append=-1))
            rows, belongs = rows[torch.from_numpy(last)], belongs[last]
        pooled = (
            pool_latents(encode_rows(self.sae, rows), belongs, self.spec.pooling, self.linear)
            if self.spec.reads == "latents"
            else pool_activations(rows.double().numpy(), belongs, self.spec.pooling)
        )
        found.log_odds[whole] = self.linear.score(pooled)


def load_guard(
    folder: Path | str,
    model: ModelAdapter | str | None = None,
    *,
    device: str = "auto",
    truncate: str | None = None,
    token_budget: int = DEFAULT_TOKEN_BUDGET,
) -> Guard:
    """Load a guard that `saefty probe --save` wrote.

    Args:
        folder: Its folder.
        model: Its model if it is loaded already, or where it lies on this machine; None loads the
            one that the guard's record names, when it is needed.
        device: Where the model runs, as `model.device`.
        truncate: What is done with a text longer than the model's context: `never`, `left` or
            `right`; None does as in training.
        token_budget: Tokens in one forward pass, padding counted.

    Raises:
        ConfigError: If there is no guard, or a setting cannot be used.
        MismatchError: If a newer saefty wrote it, or the model is not the guard's.
        IntegrityError: If a file is missing or damaged.

    Example:
        >>> guard = load_guard("guard")  # doctest: +SKIP
        >>> guard.score(["How do I bake bread?"])  # doctest: +SKIP
    """
    return Guard(
        read_guard(folder), model, device=device, truncate=truncate, token_budget=token_budget
    )


class _Silent:
    """Takes reports of progress and tells nobody."""

    def begin(self, step: object) -> None:
        """Do nothing."""

    def advance(self, amount: int) -> None:
        """Do nothing."""


def _tokenize(
    model: ModelAdapter,
    examples: Sequence[Example],
    chosen: Sequence[int],
    truncate: str,
    statuses: list[str],
    reasons: dict[int, str],
) -> dict[int, TokenizedExample]:
    """Return the tokens of some examples; one that a chat template refuses gets a status."""
    # Their own numbers for names: ids of a caller need not differ.
    named = {i: replace(examples[i], id=str(i)) for i in chosen}
    try:
        items = model.tokenize(list(named.values()), truncate=truncate)  # type: ignore[arg-type]
        return dict(zip(chosen, items, strict=True))
    except InputError as error:
        if len(chosen) == 1:
            statuses[chosen[0]] = "refused"
            reasons[chosen[0]] = error.message
            return {}
    found: dict[int, TokenizedExample] = {}
    for i in chosen:
        found |= _tokenize(model, examples, [i], truncate, statuses, reasons)
    return found
