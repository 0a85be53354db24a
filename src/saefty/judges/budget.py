"""What a judge may cost: an estimate before the first question, and a stop before the limit.

Prices are the user's, in dollars for a million tokens; none are built in, for they change. A
request is counted when it is sent. Money is set aside before a request at the most it can cost and
settled by what the endpoint reports; a request that was cut off in the middle may have been charged
and is counted at what was set aside. Limits hold from one start of a program to its end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from saefty.errors import ConfigError, ExternalError

OVERHEAD = 16
"""Tokens that an endpoint adds to a question at most, for roles and marks."""
MILLION = 1e6


class BudgetSpentError(ExternalError):
    """The next request would go beyond a limit that the user has set."""


@dataclass(frozen=True)
class Estimate:
    """What questions will cost: once each, without repeats.

    Attributes:
        requests: How many will be sent.
        tokens_in: Tokens of the questions, at about three bytes a token.
        tokens_out: The longest answers that are allowed.
        usd: The price; None without prices.
    """

    requests: int
    tokens_in: int
    tokens_out: int
    usd: float | None

    def __str__(self) -> str:
        money = "" if self.usd is None else f", at most about ${self.usd:,.4f}"
        return f"{self.requests:,} requests, about {self.tokens_in:,} tokens of questions{money}"


@dataclass
class Budget:
    """The limits and what is spent.

    Args:
        max_requests: Most requests, repeats included; None for no limit.
        max_usd: Most money; None for no limit.
        price_in: Dollars for a million tokens of questions.
        price_out: Dollars for a million tokens of answers.
        longest: Tokens of the longest answer that is allowed.

    Raises:
        ConfigError: If a limit is not positive, or there is a limit of money and no price.
    """

    max_requests: int | None = None
    max_usd: float | None = None
    price_in: float | None = None
    price_out: float | None = None
    longest: int = 64
    requests: int = field(default=0, init=False)
    usd: float = field(default=0.0, init=False)
    _aside: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_usd"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name}={value}: a limit is a number above 0.")
        for name in ("price_in", "price_out"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"{name}={value}: a price is a number of dollars, 0 or more.")
        if (self.price_in is None) != (self.price_out is None) or (
            self.max_usd is not None and self.price_in is None
        ):
            raise ConfigError(
                f"max_usd={self.max_usd}, price_in={self.price_in}, price_out={self.price_out}: a "
                "limit of money needs both prices.",
                then="Set price_in and price_out to the dollars for a million tokens that your "
                "provider asks.",
            )

    def estimate(self, questions: Sequence[Sequence[Mapping[str, str]]]) -> Estimate:
        """Return what questions will cost."""
        tokens_in = sum(_bytes(question) // 3 + OVERHEAD for question in questions)
        tokens_out = self.longest * len(questions)
        usd = None if self.price_in is None else self._price(tokens_in, tokens_out)
        return Estimate(len(questions), tokens_in, tokens_out, usd)

    def check(self, estimate: Estimate) -> None:
        """Refuse work that will not fit, before any of it is paid for.

        Raises:
            BudgetSpentError: If it goes beyond a limit.
        """
        safe = "Nothing of it was asked; answers from before stay in the cache."
        if self.max_requests is not None and self.requests + estimate.requests > self.max_requests:
            raise BudgetSpentError(
                f"{estimate.requests} replies are to be judged, {self.requests} requests were made "
                f"already, and max_requests is {self.max_requests}.",
                safe=safe,
                then="Raise max_requests, or take fewer prompts.",
            )
        money = estimate.usd
        if self.max_usd is not None and money is not None and self.usd + money > self.max_usd:
            raise BudgetSpentError(
                f"judging needs {estimate}; ${self.usd:,.4f} are spent already, and max_usd is "
                f"{self.max_usd:g}.",
                safe=safe,
                then="Raise max_usd, or take fewer prompts.",
            )

    def must_wait(self, question: Sequence[Mapping[str, str]]) -> bool:
        """Return whether a question fits only if those under way cost less than they can."""
        if self.max_usd is None or self._aside <= 0:
            return False
        most = self._most(question)
        return self.usd + most <= self.max_usd < self.usd + self._aside + most

    def set_aside(self, question: Sequence[Mapping[str, str]]) -> float:
        """Take one request and the most it can cost out of what is left.

        Returns:
            The money, for `settle`.

        Raises:
            BudgetSpentError: If it is not there any more; the request must not be sent.
        """
        if self.max_requests is not None and self.requests >= self.max_requests:
            raise BudgetSpentError(
                f"{self.requests} requests were made, repeats included, and max_requests is "
                f"{self.max_requests}.",
                then="Raise max_requests and run the same command again.",
            )
        most = self._most(question)
        if self.max_usd is not None and self.usd + self._aside + most > self.max_usd:
            raise BudgetSpentError(
                f"${self.usd:,.4f} are spent, and the next request could go beyond max_usd="
                f"{self.max_usd:g}.",
                then="Raise max_usd and run the same command again.",
            )
        self.requests += 1
        self._aside += most
        return most

    def settle(self, aside: float, tokens_in: int, tokens_out: int) -> None:
        """Count an answer at what the endpoint reports."""
        self._aside = max(self._aside - aside, 0.0)
        self.usd += self._price(tokens_in, tokens_out)

    def release(self, aside: float, *, charged: bool) -> None:
        """Count a request without an answer: for nothing, or for all that was set aside."""
        self._aside = max(self._aside - aside, 0.0)
        self.usd += aside if charged else 0.0

    def _most(self, question: Sequence[Mapping[str, str]]) -> float:
        # A token is at least one byte, so this is a bound and not a guess.
        return self._price(_bytes(question) + OVERHEAD * len(question), self.longest)

    def _price(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * (self.price_in or 0.0) + tokens_out * (self.price_out or 0.0)) / MILLION


def _bytes(question: Sequence[Mapping[str, str]]) -> int:
    return sum(len(turn["content"].encode("utf-8")) for turn in question)
