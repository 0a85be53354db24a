"""Questions to an OpenAI-compatible address: several at once, repeated here and nowhere else.

The client's own repeats are switched off, so a fault is met by one layer. What passes by itself
(429, 5xx, a timeout, a broken connection, half an answer) is asked again after a wait that doubles
and is drawn at random, or as long as the endpoint says (Retry-After), up to a limit on the waiting
for one question. What does not pass (a refused key, a spent quota, a model that is not there) stops
all questions at once: no further request is sent, those under way are let finish.

The loop of events runs in a thread of its own, so that callers, notebooks with a loop of their own
included, see a plain function.
"""

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from saefty.environment import HIDDEN, Secret, redacted
from saefty.errors import ExternalError, MissingExtraError
from saefty.judges.answers import Answer
from saefty.judges.budget import Budget, BudgetSpentError
from saefty.judges.faults import (
    NO_KEY,
    NO_MODEL,
    NO_MONEY,
    NO_QUOTA,
    NOT_THERE,
    PASSING,
    SHOWN,
    PassingError,
    QuestionError,
    read_answer,
    retry_after,
)

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

log = logging.getLogger(__name__)

Question = Sequence[Mapping[str, str]]

LONGEST_WAIT = 30.0  # seconds between two tries, unless the endpoint asks for more
ATTEMPTS = 20
HOPELESS = 5
"""Questions in a row without an answer after which the endpoint is taken to be down."""
DRAIN = 10.0  # seconds for requests under way when all stop
SAFE = "Answers that came are in the cache {cache}; none was lost."
LOGGERS = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")
SETTLING = 0.01  # seconds between two looks whether money that was set aside is free again
PULSE = 0.2
"""Seconds between two looks of the waiting thread, which notices Ctrl-C then at the latest."""


@dataclass(frozen=True)
class Failure:
    """A question that has no answer, and why."""

    reason: str


@dataclass(frozen=True)
class Endpoint:
    """Where questions go, and with how much patience.

    Attributes:
        url: The address, up to `/v1`.
        model: The model's name there.
        key: What proves who asks; None where nobody asks for it.
        key_variable: The variable that holds it, for messages.
        params: Further fields of a request, such as the temperature.
        cache: Where answers are kept, for messages.
        concurrency: Most questions under way.
        timeout: Seconds for one request, from its start to the last byte of its answer.
        max_wait: Most seconds of waiting between the tries of one question.
        backoff: Seconds of the first wait.
    """

    url: str
    model: str
    key: Secret | None
    key_variable: str
    params: Mapping[str, Any]
    cache: str
    concurrency: int = 8
    timeout: float = 60.0
    max_wait: float = 300.0
    backoff: float = 0.5

    def hidden(self, text: str) -> str:
        """Return a text of the endpoint without the key and whatever else is secret."""
        if self.key is not None:
            text = text.replace(self.key.reveal(), HIDDEN)
        return redacted(text)

    def ask(
        self,
        questions: Sequence[Question],
        budget: Budget,
        answered: Callable[[int, Answer | Failure], None],
    ) -> None:
        """Ask questions; each ends as one answer or one failure.

        Args:
            questions: What is asked.
            budget: What it may cost.
            answered: Called with a question's place and its outcome, one at a time.

        Raises:
            ExternalError: If the endpoint refuses all questions, is down, or the budget is spent.
            MissingExtraError: If the client is not installed.
        """
        try:
            import openai  # noqa: F401 - so that what is missing is said before a thread starts
        except ImportError:
            raise MissingExtraError(
                "judges behind an address need the package openai.",
                then="Run pip install 'saefty[judge]', or choose a judge that works offline: "
                "saefty list judges.",
            ) from None
        for name in LOGGERS:  # they write addresses and headers
            logging.getLogger(name).setLevel(logging.WARNING)
        _in_a_thread(_Asking(self, questions, budget, answered).run())


class _Asking:
    """One list of questions under way."""

    def __init__(
        self,
        endpoint: Endpoint,
        questions: Sequence[Question],
        budget: Budget,
        answered: Callable[[int, Answer | Failure], None],
    ) -> None:
        self.endpoint = endpoint
        self.questions = questions
        self.budget = budget
        self.answered = answered
        self.stopping = asyncio.Event()
        self.stopped_by: BaseException | None = None
        self.not_before = 0.0
        self.in_a_row = 0
        self.any_answer = False

    async def run(self) -> None:
        """Ask everything.

        Raises:
            BaseException: What stopped it.
        """
        from openai import AsyncOpenAI

        key = self.endpoint.key
        async with AsyncOpenAI(
            base_url=self.endpoint.url,
            api_key="none" if key is None else key.reveal(),
            max_retries=0,
            timeout=self.endpoint.timeout,
        ) as client:
            places = iter(range(len(self.questions)))
            count = min(self.endpoint.concurrency, len(self.questions))
            workers = [asyncio.create_task(self._work(client, places)) for _ in range(count)]
            try:
                stop = asyncio.create_task(_set(self.stopping))
                left = set(workers)
                while left and not self.stopping.is_set():
                    await asyncio.wait({*left, stop}, return_when=asyncio.FIRST_COMPLETED)
                    left = {worker for worker in left if not worker.done()}
                stop.cancel()
                if self.stopping.is_set():
                    paid = isinstance(self.stopped_by, BudgetSpentError)
                    await asyncio.wait(workers, timeout=self.endpoint.timeout if paid else DRAIN)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        if self.stopped_by is not None:
            raise self.stopped_by

    async def _work(self, client: "AsyncOpenAI", places: Iterator[int]) -> None:
        """Take one question after another until there are none, or all stop."""
        try:
            for place in places:
                if self.stopping.is_set():
                    return
                outcome = await self._outcome(client, self.questions[place])
                if outcome is None:
                    return
                self.answered(place, outcome)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - raised again by `run`
            self._stop(error)

    def _stop(self, error: BaseException) -> None:
        if self.stopped_by is None:
            self.stopped_by = error
        self.stopping.set()

    async def _outcome(self, client: "AsyncOpenAI", question: Question) -> Answer | Failure | None:
        """Return what became of a question; None if all stopped while it waited."""
        waited, reason, began = 0.0, "", time.monotonic()
        for attempt in range(ATTEMPTS):
            if await self._stopped_within(self.not_before - time.monotonic()):
                return None
            while self.budget.must_wait(question):
                if await self._stopped_within(SETTLING):
                    return None
            try:
                answer = await self._once(client, question)
            except QuestionError as error:
                return self._failed(str(error), down=False)
            except PassingError as error:
                reason = error.reason
                wait = self._wait(attempt, error.after)
                if error.after > self.endpoint.max_wait:
                    raise self._refused(
                        f"the judge at {self.endpoint.url} asks to wait {error.after:,.0f} seconds "
                        f"({reason}), and max_wait is {self.endpoint.max_wait:g}",
                        "Run the same command again later; it asks only what is left. Or raise "
                        "max_wait.",
                    ) from None
                if error.after:  # it holds for every question, not for this one alone
                    self.not_before = max(self.not_before, time.monotonic() + wait)
                waited += wait
                if waited > self.endpoint.max_wait:
                    break
                if await self._stopped_within(wait):
                    return None
            else:
                self.in_a_row, self.any_answer = 0, True
                return answer
        tries = f"after {attempt + 1} tries in {time.monotonic() - began:.2g} s"
        return self._failed(f"{reason}, {tries}", down=True)

    def _failed(self, reason: str, *, down: bool) -> Failure:
        """Give one question up, or all of them where there is no hope."""
        self.in_a_row += 1
        if self.in_a_row >= HOPELESS and (down or not self.any_answer):
            raise self._refused(
                f"{self.in_a_row} questions in a row to {self.endpoint.url} had no answer; the "
                f"last: {reason}",
                "Check the address, the model and the request's fields "
                f"({dict(self.endpoint.params)}), and run the same command again; it asks only "
                "what is left.",
            )
        return Failure(reason)

    def _wait(self, attempt: int, after: float) -> float:
        """Return how long to wait: half to all of a doubling time, and no less than was asked."""
        doubling = min(self.endpoint.backoff * 2.0**attempt, LONGEST_WAIT)
        return max(doubling * random.uniform(0.5, 1.0), after * random.uniform(1.0, 1.1))

    async def _stopped_within(self, seconds: float) -> bool:
        """Wait; return at once, and whether all stop, when they do."""
        if self.stopping.is_set() or seconds <= 0:
            return self.stopping.is_set()
        try:
            await asyncio.wait_for(self.stopping.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _once(self, client: "AsyncOpenAI", question: Question) -> Answer:
        """Send one request."""
        try:
            aside = self.budget.set_aside(question)
        except BudgetSpentError as error:
            raise BudgetSpentError(error.message, safe=self._safe(), then=error.then) from None
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                reply = await client.chat.completions.create(
                    model=self.endpoint.model,
                    messages=list(question),  # type: ignore[arg-type]
                    extra_body=dict(self.endpoint.params),
                )
            answer, charged = read_answer(reply)
            answer = replace(answer, text=self.endpoint.hidden(answer.text))
        except BaseException as error:
            passing = self._sorted(error)
            self.budget.release(aside, charged=getattr(passing, "charged", True))
            if passing is error:
                raise
            raise passing from None  # the client's own error quotes what the endpoint sent
        if charged:
            self.budget.settle(aside, answer.tokens_in, answer.tokens_out)
        else:  # the endpoint does not say
            self.budget.release(aside, charged=True)
        return answer

    def _sorted(self, error: BaseException) -> BaseException:
        """Return what an error means for the question, or for all of them."""
        import openai

        if isinstance(error, openai.APIStatusError):
            return self._of_status(error)
        if isinstance(error, TimeoutError | openai.APITimeoutError):
            return PassingError(f"no answer within {self.endpoint.timeout:g} s", charged=True)
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__ or error
            return PassingError(f"connection failed ({self._words(cause)})", charged=True)
        if isinstance(error, openai.APIError | ValueError | AttributeError | TypeError):
            return PassingError(f"half an answer ({self._words(error)})", charged=True)
        return error

    def _of_status(self, error: "APIStatusError") -> Exception:
        status, code = error.status_code, str(error.code or error.type or "")
        said = f"{status}{f' {code}' if code else ''}: {self._words(error)}"
        if code in NO_QUOTA or status == NO_MONEY:
            return self._refused(
                f"the quota of the key in {self.endpoint.key_variable} is spent ({said})",
                "Top the account up, and run the same command again; it asks only what is left.",
            )
        if code in NO_MODEL or status in NOT_THERE:
            return self._refused(
                f"{self.endpoint.url} has no model {self.endpoint.model!r}, or is not the address "
                f"of an OpenAI-compatible endpoint ({said})",
                "Check the options model and url (an address mostly ends in /v1), and run the same "
                "command again; it asks only what is left.",
            )
        if status in NO_KEY:
            if self.endpoint.key is None:
                return self._refused(
                    f"{self.endpoint.url} wants a key, and none was sent: key_variable is none "
                    f"({said})",
                    "Set key_variable to the name of a variable that holds a key, and run the same "
                    "command again; it asks only what is left.",
                )
            return self._refused(
                f"{self.endpoint.url} refuses the key in {self.endpoint.key_variable} ({said})",
                "Set the variable to a valid key that may use this model, and run the same command "
                "again; it asks only what is left.",
            )
        if status in PASSING or status >= 500:
            after = retry_after(error.response.headers)
            return PassingError(said, after=after, charged=False)
        return QuestionError(said)

    def _refused(self, message: str, then: str) -> ExternalError:
        return ExternalError(f"{message}.", safe=self._safe(), then=then)

    def _words(self, error: BaseException) -> str:
        """Return an error's own words, short and without the key, which endpoints like to quote."""
        body = getattr(error, "body", None)
        said = body.get("message") if isinstance(body, Mapping) else None
        text = " ".join(self.endpoint.hidden(str(said or error)).split()) or type(error).__name__
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"

    def _safe(self) -> str:
        return SAFE.format(cache=self.endpoint.cache)


async def _set(event: asyncio.Event) -> None:
    await event.wait()


def _in_a_thread(job: Coroutine[Any, Any, None]) -> None:
    """Run a job to its end in a loop of its own; Ctrl-C here cancels it there."""
    started = threading.Event()
    ended: list[BaseException] = []
    held: dict[str, Any] = {}

    async def main() -> None:
        held.update(loop=asyncio.get_running_loop(), task=asyncio.current_task())
        started.set()
        await job

    def body() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            ended.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=body, name="judge", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(PULSE)
    except BaseException:
        started.wait()
        if thread.is_alive() and "loop" in held:
            held["loop"].call_soon_threadsafe(held["task"].cancel)
            thread.join()
        raise
    if ended:
        raise ended[0]
