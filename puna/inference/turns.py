"""Whose turn it is to step: one of the threads that wait for answers steps for all of them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Turns:
    """Makes `step` the work of whoever waits."""

    def __init__(self, step: Callable[[], None]):
        self._step = step
        self._changed = threading.Condition()
        self._stepping = False
        self.made = 0  # steps so far

    def until(self, reached: Callable[[], object]) -> None:
        """Make steps until `reached()`, or wait while another thread makes them."""
        while True:
            with self._changed:
                while self._stepping and not reached():
                    self._changed.wait()
                if reached():
                    return
                self._stepping = True
            try:
                self._step()
            finally:
                with self._changed:
                    self._stepping = False
                    self.made += 1
                    self._changed.notify_all()

    @contextmanager
    def between(self) -> Iterator[bool]:
        """No step begins within; the value says that none is under way either."""
        with self._changed:
            yield not self._stepping
