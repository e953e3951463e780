"""A signal that asks the run to end is answered at once, not at the end of the step.

Python runs a signal's handler between two lines of the main thread. While that waits in a collective of PyTorch, there
are no lines, for minutes if a peer is gone. So the handler is empty, and a thread of its own reads the number that the
interpreter writes into a pipe the moment the signal comes; the thread saves and ends the process.

The same module keeps what a dying rank says: its stack on request (faulthandler), and its exception, for the supervisor.
"""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from puna.artifacts import write_atomic
from puna.errors import PunaError
from puna.train.resilience.watch import STACK_SIGNAL

ASKED = (signal.SIGTERM, signal.SIGINT)
LEFT = 143  # exit status of a rank that was asked to end and saved: 128 + SIGTERM, as shells report it
USER_ERROR = 65  # exit status of a rank that ended with an error of ours: to start it again would not help

_active = threading.Event()


def answer(leave: Callable[[], None], folder: Path, rank: int) -> None:
    """From now on, SIGTERM or SIGINT calls `leave` in a thread and ends the process. Main thread only; else nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    keep_stacks(folder, rank)
    if threading.current_thread() is not threading.main_thread():
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    for number in ASKED:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(write)
    _active.set()
    threading.Thread(target=_wait, args=(read, leave), name="signals", daemon=True).start()


def ignore() -> None:
    """The run is done: a signal ends the process in the ordinary way again."""
    _active.clear()
    if threading.current_thread() is threading.main_thread():
        for number in ASKED:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _wait(read: int, leave: Callable[[], None]) -> None:
    while number := os.read(read, 1):
        if number[0] in ASKED and _active.is_set():
            status = LEFT if number[0] == signal.SIGTERM else 130
            try:
                leave()
            except BaseException:
                traceback.print_exc()
                status = 1
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()
            os._exit(status)


_stack_files = []


def keep_stacks(folder: Path, rank: int) -> None:
    """Write the stacks of all threads to a file when the watcher asks, even where the interpreter is stuck."""
    file = (folder / f"stack-{rank}.txt").open("w")
    _stack_files.append(file)  # faulthandler keeps the descriptor, not the file
    faulthandler.register(STACK_SIGNAL, file=file, all_threads=True)


def confess(folder: Path, rank: int, error: BaseException) -> int:
    """Leave a note on what a rank died of; the exit status."""
    ours = isinstance(error, PunaError)
    note = {
        "rank": rank,
        "error": type(error).__name__,
        "message": str(error),
        "traceback": "" if ours else "".join(traceback.format_exception(error)),
    }
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"error-{rank}.json", json.dumps(note))
    return USER_ERROR if ours else 1


def confession(folder: Path, rank: int) -> dict[str, str] | None:
    """What a rank died of, if it could say so."""
    try:
        return json.loads((folder / f"error-{rank}.json").read_text())
    except (OSError, ValueError):
        return None
