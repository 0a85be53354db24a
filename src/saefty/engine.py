"""The local engine: tasks in one process or several, with the same results for any number.

A task is a unit of a plan (a *piece* of a dataset), small enough to do again. Its result depends on
the task alone, and what it leaves on disk is committed by `fsio`, so that doing it twice does no
harm. That is all the engine needs to know: it hands tasks out, passes on what the workers report,
and when a worker dies it starts another and gives it the task again. A task that kills its worker
twice at the same step is *narrowed* by its owner: cut smaller, until the cause stands alone.

Workers are plain child processes with a socket to their parent. Each opens what it needs (a model,
SAEs) by itself; tasks and results are small, activations never travel. A worker whose parent is
gone ends at its next report.
"""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeVar, runtime_checkable

from pydantic import Field

from saefty import matmul
from saefty.config import Config
from saefty.errors import ResourceError, SaeftyError
from saefty.overlap import TwoSteps, overlapped

log = logging.getLogger(__name__)

CRASHES = 2  # at one step, before it is taken for the cause; the first may come from outside
STARTED_IN_VAIN = 3  # times a worker may die at one task before its first step
PATIENCE_S = 5.0  # for a worker to end after it was told to

SERVE = "from saefty.engine import serve; serve({})"

Step = Any
"""What a worker is about to do: small, comparable, and understood by the task's owner."""

Task = TypeVar("Task")


class ThreadsSection(Config):
    """How a process uses this machine."""

    threads: int | None = Field(default=None, gt=0)
    """Threads on the CPU, for each process; None takes what torch chooses. The last bits of a
    matrix product depend on it, so a run that is resumed keeps the number it was started with."""


class EngineSection(ThreadsSection):
    """How work is shared out on this machine. Results do not depend on the number of workers."""

    workers: int = Field(default=1, gt=0)
    """Processes that read the model side by side, each with a copy of it; on several GPUs each
    takes the next one. A run may be resumed with another number. Workers times threads should not
    exceed the cores."""

    overlap: bool = True
    """Write what was read while the next is read, where one process does both. Off, memory holds
    one piece less."""

    max_failed: float = Field(default=0.01, ge=0, le=1)
    """Share of the examples that may fail in the forward pass (at least one may) before the run
    stops. Those that fail are left out, named and counted."""


@runtime_checkable
class Report(Protocol):
    """What work tells about itself while it goes on."""

    def begin(self, step: Step) -> None:
        """Say what is about to be done, so that it is known if it brings the process down."""

    def advance(self, amount: int) -> None:
        """Say that so many more units are done."""


Work = Callable[[Any, Report], Any]
"""Does one task, and returns its result: small, and on disk already in what matters."""


def run_tasks(
    tasks: Iterable[Task],
    open_work: Callable[[], Work],
    narrow: Callable[[Task, Step, str], Task],
    workers: int,
    threads: int | None,
    advance: Callable[[float], None],
) -> Generator[Any, None, None]:
    """Do tasks in child processes; results come as they are ready.

    Args:
        tasks: What is to be done; drawn one by one.
        open_work: Opens what a worker needs; called in the worker, so it must be picklable.
        narrow: Returns a task without the step that brought its worker down (the third argument
            says how), or with that step cut smaller.
        workers: Most processes at once.
        threads: Torch's threads in each; None leaves that to torch.
        advance: Told of the units done.

    Raises:
        ResourceError: If workers die before they can begin.
        SaeftyError: What a worker raised.
    """
    waiting = iter(tasks)
    pool = _Pool(open_work, workers, threads)
    crashes: Counter[Any] = Counter()
    narrowed: set[int] = set()  # workers with a task whose cause of death is being looked for
    try:
        for worker, task in zip(range(workers), waiting, strict=False):
            pool.start(worker, task)
        while pool.busy:
            for number in pool.ready():
                answer = pool.receive(number)
                if answer is None:
                    task, step, how = pool.bury(number)
                    crashes[step] += 1
                    allowed = 1 if number in narrowed else CRASHES
                    if crashes[step] >= (allowed if step is not None else STARTED_IN_VAIN):
                        if step is None:
                            raise ResourceError(
                                f"workers end before they can begin ({how}, {STARTED_IN_VAIN} "
                                "times); each loads the model, so the memory may not hold as many "
                                "copies.",
                                safe="What was committed is whole.",
                                then="Set engine.workers to a smaller number; the run can be "
                                "resumed with it.",
                            )
                        task = narrow(task, step, how)
                        narrowed.add(number)
                    log.warning("a worker ended (%s); another takes its place", how)
                    pool.start(number, task)
                elif answer[0] == "advance":
                    advance(answer[1])
                elif answer[0] == "result":
                    crashes.pop(None, None)
                    narrowed.discard(number)
                    following = next(waiting, None)
                    if following is None:
                        pool.dismiss(number)
                    else:
                        pool.give(number, following)
                    yield answer[1]
    finally:
        pool.close()


def share_out(
    tasks: Iterable[Task],
    count: int,
    work: Work,
    open_work: Callable[[], Work] | None,
    narrow: Callable[[Task, Step, str], Task],
    workers: int,
    advance: Callable[[float], None],
    *,
    overlap: bool = False,
) -> Generator[Any, None, None]:
    """Do tasks in this process, or in several if there are to be and there is enough to do.

    Args:
        tasks: What is to be done; drawn one by one.
        count: How many tasks there are.
        work: Does a task in this process.
        open_work: Opens the same in a worker; None allows this process only.
        narrow: As for `run_tasks`.
        workers: Most processes at once.
        advance: Told of the units done.
        overlap: In this process, round a task off while the next is begun, where `work` can.
    """
    import torch

    if open_work is None or not shares(count, workers):
        if overlap and isinstance(work, TwoSteps):
            return overlapped(tasks, work, _Here(advance), give_memory_back)
        return _do_here(tasks, work, _Here(advance))
    workers = min(workers, count)
    return run_tasks(tasks, open_work, narrow, workers, torch.get_num_threads(), advance)


def shares(count: int, workers: int) -> bool:
    """Return whether there are to be worker processes, and enough tasks for two."""
    return min(workers, count) > 1


def _do_here(tasks: Iterable[Task], work: Work, report: Report) -> Generator[Any, None, None]:
    for task in tasks:
        yield work(task, report)
        give_memory_back()


def give_memory_back() -> None:
    """Return to the system what is free between tasks, where the C library can.

    Tensors of ever other shapes leave the heap in pieces, and it would grow with the rows.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class _Here:
    """What work in this process tells about itself."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        self.advance: Callable[[int], None] = advance

    def begin(self, step: Step) -> None:
        """Do nothing: if the process goes, so does whoever would want to know."""


class _Pool:
    """Worker processes, their sockets, and what each is doing."""

    def __init__(self, open_work: Callable[[], Any], workers: int, threads: int | None) -> None:
        level = logging.getLogger("saefty").getEffectiveLevel()
        # Work without torch, which has no threads to be told, multiplies nothing either.
        self._setup = (list(sys.path), threads, threads and matmul.chosen(), level)
        self._open_work = open_work
        self._passive = workers * (threads or 1) > (os.cpu_count() or 1)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._sockets: dict[int, Connection] = {}
        self._tasks: dict[int, tuple[Any, Step]] = {}

    @property
    def busy(self) -> bool:
        return bool(self._tasks)

    def start(self, number: int, task: Any) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._processes[number] = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"from saefty.engine import serve; serve({theirs.fileno()})",
                ],
                env=self._environment(number),
                pass_fds=[theirs.fileno()],
                process_group=0,  # a terminal's Ctrl-C is for the parent, which ends its workers
            )
        self._sockets[number] = Connection(ours.detach())
        with suppress(OSError):  # it has died; reading from it will say so
            self._sockets[number].send(self._setup)
            self._sockets[number].send(self._open_work)
        self.give(number, task)

    def give(self, number: int, task: Any) -> None:
        self._tasks[number] = (task, None)
        with suppress(OSError):  # as above
            self._sockets[number].send(task)

    def ready(self) -> list[int]:
        numbers = {self._sockets[number]: number for number in self._tasks}
        return [numbers[found] for found in wait(list(numbers)) if isinstance(found, Connection)]

    def receive(self, number: int) -> tuple[str, Any] | None:
        """Return what a worker says to the owner of its task; None if it has died."""
        try:
            kind, content = self._sockets[number].recv()
        except (EOFError, OSError):
            return None
        if kind == "begin":
            self._tasks[number] = (self._tasks[number][0], content)
        elif kind == "log":
            name, level, message = content
            logging.getLogger(name).log(level, "%s", message)
        elif kind == "error":
            error, trace = content
            if not isinstance(error, SaeftyError):
                error.add_note(f"In a worker process:\n{trace}")
            raise error
        return kind, content

    def bury(self, number: int) -> tuple[Any, Step, str]:
        """Return what a dead worker was doing, and how it ended."""
        self._sockets.pop(number).close()
        code = self._processes.pop(number).wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return *self._tasks.pop(number), how

    def dismiss(self, number: int) -> None:
        """Let a worker go that has nothing more to do."""
        del self._tasks[number]
        self._sockets.pop(number).close()

    def close(self) -> None:
        """End all workers; a piece under way counts for nothing until it is committed."""
        for connection in self._sockets.values():
            connection.close()
        for number, process in self._processes.items():
            if number in self._tasks:
                process.terminate()
        for process in self._processes.values():
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _environment(self, number: int) -> dict[str, str]:
        import torch

        environment = dict(os.environ)
        if self._passive:
            environment.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait give way
        visible = environment.get("CUDA_VISIBLE_DEVICES", "")
        devices = visible.split(",") if visible else range(torch.cuda.device_count())
        if len(devices) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(devices[number % len(devices)])
        return environment


class _Sender(logging.Handler):
    """Send log records to the parent, and progress as well: what a worker says goes one way."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        self._connection.send(("log", (record.name, record.levelno, record.getMessage())))

    def begin(self, step: Step) -> None:
        self._connection.send(("begin", step))

    def advance(self, amount: int) -> None:
        self._connection.send(("advance", amount))


def _send_error(connection: Connection, error: Exception) -> None:
    trace = traceback.format_exc()
    try:
        connection.send(("error", (error, trace)))
    except (TypeError, AttributeError, ValueError):  # an exception that cannot be pickled
        connection.send(("error", (RuntimeError(repr(error)), trace)))


def serve(descriptor: int) -> None:
    """Do tasks that come through a socket until it closes; what a worker process runs."""
    connection = Connection(descriptor)
    try:
        path, threads, way, level = connection.recv()
        sys.path[:] = path
        sender = _Sender(connection)
        logging.getLogger("saefty").handlers = [sender]
        logging.getLogger("saefty").setLevel(level)
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
            matmul.settle(way)
        try:
            work = connection.recv()()
            while True:
                connection.send(("result", work(connection.recv(), sender)))
                give_memory_back()
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:  # noqa: BLE001 - raised again in the parent
            _send_error(connection, error)
    except (EOFError, OSError):  # the parent is gone, or needs no more
        os._exit(0)
