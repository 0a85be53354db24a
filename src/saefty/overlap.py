"""Work beside other work: what was done is written, or what comes next is read, in a thread.

What goes into the thread is what leaves the processor free: checksums, copying, waiting for the
disk. It must not compute with torch, whose threads would take the processor from those of the work
beside it. One thing is done aside at a time, and the next waits for it: two at most are in memory.
"""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar, runtime_checkable

Item = TypeVar("Item")


@runtime_checkable
class TwoSteps(Protocol):
    """Work whose second step may go on beside the first step of the next task."""

    def begin(self, task: Any, report: Any) -> Any:
        """Do the first step."""

    def complete(self, begun: Any) -> Any:
        """Do the second step; return the result of the task."""


def overlapped(
    tasks: Iterable[Any], work: TwoSteps, report: Any, between: Callable[[], None]
) -> Generator[Any, None, None]:
    """Do tasks one after another, each one's second step beside the next one's first.

    What fails in the second step is raised at the next word that the first step reports, in this
    thread. Whatever ends the tasks early, a second step under way is waited for; only if that is
    interrupted as well is it left to itself.

    Args:
        tasks: What is to be done; drawn one by one.
        work: How.
        report: Told of what the first step says.
        between: Called when a task is done.

    Yields:
        The results, in the order of the tasks.
    """
    aside = _Aside(work.complete)
    given = False
    try:
        aside.start()
        for task in tasks:
            begun = work.begin(task, _Watching(report, aside))
            done = [aside.result()] if given else []
            aside.give(begun)
            given = True
            del begun
            between()
            yield from done
        if given:
            yield aside.result()
            between()
    finally:
        aside.end()


def read_ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """Draw items in a thread, each while the one before it is in use.

    What fails in drawing an item is raised in its place, in this thread; what fails in drawing one
    that nobody asks for is not raised. Who stops early closes this generator, which waits for a
    drawing under way; only if that is interrupted as well is it left to itself.

    Args:
        items: What is to be drawn; None ends it.
    """
    aside = _Aside(lambda _: next(items, None))
    try:
        aside.start()
        aside.give(None)
        while (drawn := [aside.result()])[0] is not None:
            aside.give(None)
            yield drawn.pop()  # held by its user alone
    finally:
        aside.wait()


class _Aside:
    """A thread that does one call after another. It does not keep the process alive.

    An interruption may come between any two steps of the thread that gives calls. So what is waited
    for in the end is the thread: whatever it was given by then is done, and nothing else is.
    """

    def __init__(self, call: Callable[[Any], Any]) -> None:
        self._call = call
        self._given: SimpleQueue[list[Any] | None] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="saefty aside", daemon=True)

    def start(self) -> None:
        """Begin to wait for what is given."""
        self._thread.start()

    def give(self, begun: Any) -> None:
        """Let the thread do a call."""
        self._given.put([begun])

    def result(self) -> Any:
        """Wait for a call; return its result, or raise what it raised."""
        answer = self._answers.get()
        self.check()
        return answer

    def check(self) -> None:
        """Raise what a call raised, if one has."""
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Wait until all that was given is done; raise what failed, which failed first."""
        self.wait()
        self.check()

    def wait(self) -> None:
        """Wait until all that was given is done, or has failed."""
        self._given.put(None)
        with suppress(RuntimeError):  # interrupted before it was started
            self._thread.join()

    def _run(self) -> None:
        while box := self._given.get():
            try:
                # Out of the box, so that it is in memory for this call alone.
                self._answers.put(self._call(box.pop()))
            except BaseException as error:  # noqa: BLE001 - raised again in the other thread
                self._error = error
                self._answers.put(None)
                return


class _Watching:
    """Passes a report on, and looks at each word whether the thread aside has failed."""

    def __init__(self, report: Any, aside: _Aside) -> None:
        self._report, self._aside = report, aside

    def begin(self, step: Any) -> None:
        """Pass on what is about to be done."""
        self._aside.check()
        self._report.begin(step)

    def advance(self, amount: int) -> None:
        """Pass on that so many more units are done."""
        self._aside.check()
        self._report.advance(amount)
