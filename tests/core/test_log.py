"""What a terminal shows: a bar is one line, and every line of news is a line of its own."""

import contextlib
import os
import pty
import re
import select
import threading

from puna import log


class Terminal:
    """Takes the place of stderr, as a terminal."""

    def __init__(self, monkeypatch):
        self.master, slave = pty.openpty()
        monkeypatch.setattr("sys.stderr", os.fdopen(slave, "w"))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(log, "_beside", False)

    def shown(self) -> str:
        """What came there, without colours."""
        came = b""
        while select.select([self.master], [], [], 0.05)[0]:
            came += os.read(self.master, 1 << 16)
        return re.sub(r"\x1b\[[0-9;]*m", "", came.decode())


WIPED = r"\r\x1b\[2K(\x1b\[\?25h)?$"


def test_news_during_a_bar_do_not_tear_it(monkeypatch):
    terminal = Terminal(monkeypatch)
    with log.progress("work", 10) as bar:
        bar.advance(3)
        bar.note("step 3")
        bar._bar[0].refresh()
        log.warn("one")
        said = threading.Thread(target=log.info, args=("two",))
        said.start()
        said.join()
    shown = terminal.shown()
    assert "step 3" in shown
    for line in ("warning: one", "two"):
        before, _, after = shown.partition(line)
        assert re.search(WIPED, before) and after.startswith("\r\n"), repr(before[-60:])
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_news_wipe_the_bar_of_another_process(monkeypatch):
    terminal = Terminal(monkeypatch)
    log.beside_a_bar()
    log.info("one")
    log.warn("two")
    assert terminal.shown() == "\r\x1b[2K\x1b[?25hone\r\n\r\x1b[2K\x1b[?25hwarning: two\r\n"


def test_news_that_nobody_can_take_stop_nothing(monkeypatch):
    full = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr("sys.stderr", full)
    log.info("one")
    log.warn("two")
    log.mend_terminal("three")
    with contextlib.suppress(OSError):
        full.close()
