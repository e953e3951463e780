"""What a person sees while work goes on: one line per event, one moving line per long task, all on stderr.

Results go to stdout by `print`; nothing else does. On a terminal a long task shows a bar with its speed and the time
left; in a file or a CI log it shows a plain line at most every ten seconds.
"""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
PLAIN_LINE_EVERY_S = 10.0
_hushed = False
_beside = False
_showing: list[Any] = []  # the console of a bar: lines must go through it, or they tear it


def hush() -> None:
    """Leave news and progress to another process, which does the same work and tells it once. Warnings are still told."""
    global _hushed
    _hushed = True


def beside_a_bar() -> None:
    """A child of this process may be showing a bar on this terminal: from now on its line is wiped before ours."""
    global _beside
    _beside = True


def mend_terminal(text: str = "") -> None:
    """Wipe the line of another process's bar, show the cursor, which a bar hides, and say `text`: all at once."""
    wipe = "\r\x1b[2K\x1b[?25h" if sys.stderr.isatty() else ""
    with contextlib.suppress(OSError):
        sys.stderr.write(wipe + text)
        sys.stderr.flush()


def info(text: str) -> None:
    """One line of news."""
    if not _hushed:
        _print(text)


def warn(text: str) -> None:
    """One line that the user should not miss, though work goes on."""
    _print(f"warning: {text}", style="yellow")


def duration(seconds: float) -> str:
    """`75` as `1m15s`: what a person reads at a glance."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """One long task: `advance` it, `note` what is worth seeing beside the bar."""

    def __init__(self, label: str, total: float | None, unit: str, done: float = 0):
        self.label, self.total, self.unit = label, total, unit
        self.done = self.started_at = done
        self.started = self.printed = time.monotonic()
        self.text = ""
        self._bar = None

    def advance(self, amount: float = 1) -> None:
        """Say that `amount` more units are done."""
        self.done += amount
        self._show()

    def note(self, text: str) -> None:
        """Show `text` (a loss, a count) beside the bar."""
        self.text = text
        self._show()

    def line(self) -> str:
        """The state as plain text, with the speed and the estimated time left."""
        elapsed = time.monotonic() - self.started
        rate = (self.done - self.started_at) / elapsed if elapsed > 0 else 0.0
        share = f"{self.done:,.0f}/{self.total:,.0f}" if self.total else f"{self.done:,.0f}"
        left = f", {duration((self.total - self.done) / rate)} left" if self.total and rate else ""
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        return f"{self.label}: {share} {self.unit} ({speed}/s{left}) {self.text}".rstrip()

    def _show(self) -> None:
        if _hushed:
            return
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, completed=self.done, note=self.text)
        elif time.monotonic() - self.printed >= PLAIN_LINE_EVERY_S:
            self.printed = time.monotonic()
            with contextlib.suppress(OSError):
                print(self.line(), file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: float | None = None, *, unit: str = "items", done: float = 0) -> Iterator[Progress]:
    """A long task with `total` units of work, of which `done` were finished by an earlier run."""
    task = Progress(label, total, unit, done)
    if sys.stderr.isatty() and not _hushed:
        with _bar(task):
            yield task
    else:
        yield task


def track(items: Iterable[T], label: str, *, total: int | None = None, unit: str = "items") -> Iterator[T]:
    """`items` one by one, with progress."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with progress(label, total, unit=unit) as task:
        for item in items:
            yield item
            task.advance()


@contextmanager
def _bar(task: Progress) -> Iterator[None]:
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%") if task.total else TextColumn("{task.completed:,.0f}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns, console=_console(), transient=True) as bar:
        task._bar = bar, bar.add_task(task.label, total=task.total, completed=task.done, note="")
        _showing.append(bar.console)
        try:
            yield
        finally:
            _showing.pop()
            task._bar = None


def _print(text: str, **style: Any) -> None:
    """A line to stderr. Where nobody can take it (a file on a full disk, a terminal that is gone) work goes on."""
    console, how = _showing[-1] if _showing else _console(), {"markup": False, "highlight": False, **style}
    with contextlib.suppress(OSError):
        if not _beside:
            return console.print(text, **how)
        with console.capture() as line:
            console.print(text, **how)
        mend_terminal(line.get())


def _console():
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True)
