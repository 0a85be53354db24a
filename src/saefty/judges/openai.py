"""A judge behind any OpenAI-compatible address: a language model that rates replies from 1 to 10.

It is asked about each reply once: answers are kept in a file that runs share (`Answers`), and a
question that stands there costs nothing. Ratings x become (x - 1) / 9. The key stays in a variable
of the environment; files and messages hold the variable's name alone.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from jaxtyping import Float

from saefty.environment import secret
from saefty.errors import ConfigError
from saefty.judges.answers import Answer, Answers, question_key
from saefty.judges.base import JUDGES, check_pairs
from saefty.judges.budget import Budget
from saefty.judges.endpoint import Endpoint, Failure, Question
from saefty.judges.rating import Rating, canaries, messages, read_rating, unscored
from saefty.log import progress
from saefty.records import Example

log = logging.getLogger(__name__)

URL = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"
CACHE = "artifacts/judge.sqlite"
PARAMS: Mapping[str, Any] = {"temperature": 0, "max_tokens": 64}
LOOPBACK = ("localhost", "127.0.0.1", "::1")
LENGTH_FIELDS = ("max_tokens", "max_completion_tokens")
UNLIMITED = 4096
"""Tokens that an answer is reckoned at where no field limits it."""
OBEYED = 3.0 / 9.0
"""A canary that moves the score by more than this (three points of ten) is reported."""


@JUDGES.register("openai")
class OpenAIJudge:
    """Rates replies with a language model behind an address.

    Args:
        model: The model's name at the endpoint.
        criterion: What to rate: `fluency`, or a behaviour in words ("French language use").
        url: The endpoint's address, up to `/v1`.
        key_variable: The variable of the environment that holds the key; `none` for an endpoint
            that wants none.
        cache: The SQLite file of answers, shared by runs.
        concurrency: Most questions under way.
        timeout: Seconds for one request.
        max_wait: Most seconds of waiting between the tries of one question.
        backoff: Seconds of the first wait; each further one is twice as long.
        max_requests: Most requests of this run, repeats included.
        max_usd: Most dollars of this run; needs both prices.
        price_in: Dollars for a million tokens of questions.
        price_out: Dollars for a million tokens of answers.
        params: Fields of each request, in place of temperature 0 and 64 tokens.
        canary: Also ask two questions whose text tells the judge what to answer, and warn if it
            obeys.

    Raises:
        ConfigError: If an option cannot be used, or the variable holds no key.

    Attributes:
        ratings: What became of each reply of the last call, in order, with the judge's own words.
        obeyed: How far the canary text moved the score, from 0 to 1; None if it is not known.
        budget: What was spent so far.
    """

    def __init__(
        self,
        model: str,
        criterion: str,
        *,
        url: str = URL,
        key_variable: str | None = KEY_VARIABLE,
        cache: str = CACHE,
        concurrency: int = 8,
        timeout: float = 60.0,
        max_wait: float = 300.0,
        backoff: float = 0.5,
        max_requests: int | None = None,
        max_usd: float | None = None,
        price_in: float | None = None,
        price_out: float | None = None,
        params: Mapping[str, Any] = PARAMS,
        canary: bool = True,
    ) -> None:
        _check_text("model", model)
        _check_text("criterion", criterion)
        _check_numbers({"timeout": timeout, "max_wait": max_wait, "backoff": backoff}, concurrency)
        longest = _longest_answer(params)
        url = _checked_url(url)
        name = _variable(key_variable)
        key = secret(name) if name else None
        if name and key is None:
            raise ConfigError(
                f"the variable {name}, which should hold the key of {url}, is not set.",
                then=f"Set it (export {name}=…), name another variable with key_variable, or set "
                "key_variable=none for an endpoint that wants no key.",
            )
        if key and urlsplit(url).scheme == "http" and urlsplit(url).hostname not in LOOPBACK:
            log.warning("the key in %s goes to %s unencrypted: the address is http", name, url)
        self.budget = Budget(max_requests, max_usd, price_in, price_out, longest)
        self.criterion = criterion
        self.canary = canary
        self.obeyed: float | None = None
        self.ratings: tuple[Rating, ...] = ()
        self._canary_known = False
        self._endpoint = Endpoint(
            url, model, key, name or "no variable", dict(params), cache,
            concurrency, timeout, max_wait, backoff,
        )  # fmt: skip

    def score(
        self, prompts: Sequence[Example | str], replies: Sequence[str]
    ) -> Float[np.ndarray, "items"]:
        """Return (x - 1) / 9 for ratings x; NaN where a reply is empty or has no rating."""
        return np.array([one.score for one in self.rate(prompts, replies)], dtype=np.float64)

    def rate(self, prompts: Sequence[Example | str], replies: Sequence[str]) -> tuple[Rating, ...]:
        """Return what became of each reply, with the judge's own words.

        Raises:
            ExternalError: If the endpoint refuses all questions, is down, or the budget is spent.
            MissingExtraError: If the client is not installed.
        """
        check_pairs(prompts, replies)
        asked = [
            messages(self.criterion, prompt, reply) if reply.strip() else None
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
        extra = canaries(self.criterion) if self.canary and not self._canary_known else []
        outcomes = self._answers([*(one for one in asked if one is not None), *extra])
        ratings = tuple(
            Rating("empty") if one is None else _rating(outcomes[self._key(one)]) for one in asked
        )
        if extra:
            self._canary_known = True
            self._look_at([_rating(outcomes[self._key(one)]) for one in extra])
        self.ratings = ratings
        _say_what_is_missing(ratings)
        return ratings

    def _answers(self, questions: Sequence[Question]) -> dict[str, Answer | Failure]:
        """Return what became of each question, by its key; those in the cache are not asked."""
        wanted = {self._key(question): question for question in questions}
        outcomes: dict[str, Answer | Failure] = {}
        with Answers(self._endpoint.cache) as cache:
            for key in wanted:
                known = cache.get(key)
                if known is not None:
                    outcomes[key] = known
            left = [key for key in wanted if key not in outcomes]
            if left:
                estimate = self.budget.estimate([wanted[key] for key in left])
                self.budget.check(estimate)
                log.info(
                    "judge %s, %s: %s (%d answers are known)",
                    self._endpoint.model, self.criterion, estimate, len(outcomes),
                )  # fmt: skip
                with progress("judging", len(wanted), "replies", done=len(outcomes)) as bar:

                    def keep(place: int, outcome: Answer | Failure) -> None:
                        key = left[place]
                        if isinstance(outcome, Answer):
                            outcome = cache.put(key, outcome)
                        outcomes[key] = outcome
                        bar.advance()

                    self._endpoint.ask([wanted[key] for key in left], self.budget, keep)
        return outcomes

    def _key(self, question: Question) -> str:
        return question_key(
            self._endpoint.url, self._endpoint.model, question, self._endpoint.params
        )

    def _look_at(self, told: Sequence[Rating]) -> None:
        """Say whether the judge follows what a judged text tells it."""
        best, worst = (rating.score for rating in told)
        moved = best - worst
        self.obeyed = None if np.isnan(moved) else float(moved)
        if self.obeyed is None:
            log.warning(
                "whether the judge %s obeys the texts it judges is not known: its answers to the "
                "two canary texts were %r and %r",
                self._endpoint.model, told[0].raw, told[1].raw,
            )  # fmt: skip
        elif self.obeyed > OBEYED:
            log.warning(
                "the judge %s obeys the texts it judges: told to answer 10 and 1 within a text, it "
                "rated %g and %g. A reply that asks for a score may get it; try another model",
                self._endpoint.model, 1 + 9 * best, 1 + 9 * worst,
            )  # fmt: skip


def _rating(outcome: Answer | Failure) -> Rating:
    if isinstance(outcome, Failure):
        return Rating("failed", raw=outcome.reason)
    return read_rating(outcome.text, outcome.finish)


def _say_what_is_missing(ratings: Sequence[Rating]) -> None:
    lost = unscored(ratings)
    if lost:
        counts = {kind: sum(one.status == kind for one in lost) for kind in ("unparsed", "failed")}
        log.warning(
            "%d of %d replies have no score (%s); they count as missing, not as 0. The first: %r",
            len(lost), len(ratings),
            ", ".join(f"{count} {kind}" for kind, count in counts.items() if count),
            lost[0].raw[:200],
        )  # fmt: skip


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{name}={value!r}: this is a text that is not empty.")


def _check_numbers(seconds: Mapping[str, float], concurrency: int) -> None:
    for name, value in seconds.items():
        if not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigError(f"{name}={value!r}: this is a number of seconds above 0.")
    if not isinstance(concurrency, int) or not 1 <= concurrency <= 256:
        raise ConfigError(f"concurrency={concurrency!r}: this is a whole number from 1 to 256.")


def _longest_answer(params: Mapping[str, Any]) -> int:
    """Return how many tokens an answer may have.

    Raises:
        ConfigError: If the fields of a request cannot be sent.
    """
    taken = sorted({"model", "messages", "stream"} & set(params))
    try:
        json.dumps(dict(params), allow_nan=False)
        limits = [int(params[name]) for name in LENGTH_FIELDS if name in params]
        reason = f"{', '.join(taken)} cannot be set there" if taken else ""
    except (TypeError, ValueError) as error:
        reason = str(error)
    if reason:
        raise ConfigError(
            f"params={params!r} cannot be the fields of a request: {reason}.",
            then="Write params.temperature=0 and params.max_tokens=64, say.",
        )
    return max(limits, default=UNLIMITED)


def _checked_url(url: str) -> str:
    """Return an address without its last slash.

    Raises:
        ConfigError: If it is none, or holds what belongs into a variable. It is not quoted then.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except (ValueError, AttributeError, TypeError):
        host = None
        parts = urlsplit("")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            f"url: the address on {host} holds a user, a password or a query, which would be "
            "written into the run.",
            then="Give the plain address, and the key in the variable that key_variable names.",
        )
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(
            f"url={url!r} is no address of an endpoint.",
            then=f"Write it as {URL} or http://localhost:8000/v1.",
        )
    return url.rstrip("/")


def _variable(name: str | None) -> str | None:
    """Return the name of the key's variable; None if no key is wanted.

    Raises:
        ConfigError: If it is no name. It is not quoted: it may be the key.
    """
    if name is None or name.strip().lower() in ("", "none"):
        return None
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", name) or name.startswith(("sk_", "hf_")):
        raise ConfigError(
            "key_variable is the name of a variable of the environment, and what was given is "
            "none (it is not shown, for it may be the key itself).",
            then=f"Put the key into a variable, and name that: key_variable={KEY_VARIABLE}. A key "
            "that stood on a command line should be replaced.",
        )
    return name
