"""Work in two steps, so that a task is rounded off in a thread while the next one is begun.

The second step is what leaves the processor free: checksums, writing, waiting for the disk. It must
not compute with torch, whose threads would take the processor from those of the first step. One
task is rounded off at a time, and the next waits for it: two at most are held in memory.
"""

import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Protocol, runtime_checkable


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
        self._given.put(None)
        with suppress(RuntimeError):  # interrupted before it was started
            self._thread.join()
        self.check()

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
