"""An ordered map over several processes, which end with it, whatever ends it.

The standard library's pools leave their workers running when the parent is killed, and on Python 3.9 they can hang
after a worker is killed while it receives a task.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import signal
from collections.abc import Generator, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, Callable, TypeVar, cast

from openpangu_sft.util.errors import UserError

AHEAD = 4  # most items in flight per worker, so that memory does not grow with the input

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """Applies a function to items in several processes; yields the results in the order of the items.

    The processes are forked, so what the function holds (a tokenizer) is shared and not loaded again. Closing the
    generator early ends them. With one worker, this process does the work. Raises `UserError` where a process died,
    for instance because memory ran out, and the function's own `UserError` and `OSError`.
    """
    if workers == 1:
        yield from map(function, items)
        return
    processes: dict[Connection, ForkProcess] = {}
    busy: dict[Connection, int] = {}
    done: dict[int, Result] = {}
    given = taken = 0

    def collect() -> None:
        for connection in cast("list[Connection]", wait(list(busy))):
            with _alive(processes[connection]):
                result = connection.recv()
            if isinstance(result, (UserError, OSError)):
                raise result
            done[busy.pop(connection)] = result

    try:
        _start(function, workers, processes)
        waiting = ((item,) for item in items)
        following = next(waiting, None)
        while following or taken < given:
            if taken in done:
                yield done.pop(taken)
                taken += 1
            elif not following or len(busy) == workers or given - taken >= AHEAD * workers:
                collect()
            else:
                idle = next(connection for connection in processes if connection not in busy)
                with _alive(processes[idle]):
                    idle.send(following[0])
                busy[idle] = given
                given += 1
                following = next(waiting, None)  # read while the workers work
    finally:
        for process in processes.values():
            process.kill()
        for connection, process in processes.items():
            process.join()
            connection.close()


def _start(function: Callable[[Any], Any], workers: int, processes: dict[Connection, ForkProcess]) -> None:
    context = multiprocessing.get_context("fork")
    # Ctrl-C reaches the whole process group; workers start with it blocked, and this process ends them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(function, theirs, [*processes, ours]), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(function: Callable[[Any], Any], connection: Connection, inherited: list[Connection]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for ours in inherited:  # else workers keep each other's pipes open and never see that the parent is gone
        ours.close()
    # What came with the fork stays: the collector need not visit it, which would copy its pages.
    gc.freeze()
    gc.set_threshold(100_000)  # there are many lists and no cycles
    with contextlib.suppress(EOFError, OSError):
        while True:
            item = connection.recv()
            result: Any
            try:
                result = function(item)
            except (UserError, OSError) as error:  # any other is ours, and its traceback is printed
                result = error
            connection.send(result)


@contextlib.contextmanager
def _alive(process: ForkProcess) -> Iterator[None]:
    """Turns a broken pipe into the reason why it broke."""
    try:
        yield
    except (EOFError, OSError):
        process.join(timeout=5)
        code = process.exitcode
        how = f"by {signal.Signals(-code).name}" if code and code < 0 else f"with exit code {code}"
        raise UserError(f"a worker process was ended {how}", remedy="if memory ran out, lower data.workers") from None
