"""`puna chat` as a person meets it: a real pseudo-terminal, real signals; and as a pipe does."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PROGRAM = """
import sys
from scripted_engine import ScriptedEngine, echo
from puna.serve.terminal import ChatOptions, chat

def script(request):
    said = request.dialog[-1].content
    return {"long": "word " * 400, "evil": "\\x1b[2Jgone\\x9b"}.get(said, echo(request))

engine = ScriptedEngine(script, pause_s=float(sys.argv[1]))
sys.exit(chat(engine, name="tiny", options=ChatOptions(prompt=" ".join(sys.argv[2:]))))
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{HERE.parent.parent}{os.pathsep}{HERE}", "TERM": "xterm"}


class Terminal:
    """A person at a pseudo-terminal: types, and reads until something appears."""

    def __init__(self, pause_s: float = 0.0):
        self.master, slave = pty.openpty()
        command = [sys.executable, "-c", PROGRAM, str(pause_s)]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=ENVIRONMENT, start_new_session=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C, a moment after the prompt: CPython's readline misses a signal between its prompt and its `select`."""
        time.sleep(1.0)  # of a machine that does other work, too
        self.type("\x03")

    def until(self, pattern: str, timeout_s: float = 20) -> str:
        """What appeared, up to and with the pattern; it is used up."""
        deadline = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.text)):
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self.master], [], [], left)[0], f"no {pattern!r} in {self.text!r}"
            try:
                self.text += os.read(self.master, 65536).decode(errors="replace")
            except OSError:
                raise AssertionError(f"the program ended: {self.text!r}") from None
        seen, self.text = self.text[: found.end()], self.text[found.end() :]
        return seen

    def code(self) -> int:
        return self.process.wait(timeout=10)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in a shell's background inherits an ignored Ctrl-C


@pytest.fixture
def terminal():
    opened = []

    def open_(**settings):
        opened.append(Terminal(**settings))
        opened[-1].until(">>> ")
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


def test_a_conversation_with_speed_commands_and_several_lines(terminal):
    person = terminal(pause_s=0.001)
    person.type("hello\n")
    assert re.search(r"You said: hello\r\n.*\d+ tokens, [\d.,]+ tokens/s", person.until(">>> "), re.DOTALL)
    person.type('"""one\n')
    person.until(r"\.\.\. ")
    person.type('two"""\n')
    assert "You said: one\r\ntwo\r\n" in person.until(">>> ")
    person.type("/set temperature 0.1\n")
    assert re.search(r"temperature +0\.1", person.until(">>> "))
    person.type("/temperature\n")
    assert "not a command" in person.until(">>> ")
    person.type("/bye\n")
    assert person.code() == 0


def test_ctrl_c_stops_an_answer_and_not_the_program(terminal):
    person = terminal(pause_s=0.01)
    person.type("long\n")
    person.until("word word")
    person.type("\x03")
    assert "stopped" in person.until(">>> ", timeout_s=5)
    person.type("hi\n")
    assert "You said: hi" in person.until(">>> ")
    person.type("\x04")
    assert person.code() == 0


def test_ctrl_c_at_the_prompt_hints_and_a_second_one_leaves(terminal):
    person = terminal()
    person.interrupt()
    assert "/bye" in person.until(">>> ")
    person.type("hi\n")
    person.until("You said: hi")
    person.until(">>> ")
    person.interrupt()
    person.until(">>> ")
    person.interrupt()
    assert person.code() == 0
    assert "Traceback" not in person.text


def test_an_answer_cannot_command_the_terminal(terminal):
    person = terminal()
    person.type("evil\n")
    seen = person.until("gone")
    assert "\x1b[2J" not in seen and "\u241b[2Jgone" in seen


def test_the_arrow_recalls_an_earlier_line(terminal):
    pytest.importorskip("readline")
    person = terminal()
    person.type("first\n")
    person.until("You said: first")
    person.until(">>> ")
    person.type("\x1b[A\n")
    assert "You said: first" in person.until("tokens")


def piped(stdin: str, *prompt: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM, "0", *prompt]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=ENVIRONMENT, timeout=30)


def test_a_pipe_is_answered_line_by_line_without_prompts():
    done = piped('one\n\n/set temperature 0\n"""two\nlines"""\n')
    assert done.stdout == "You said: one\nYou said: two\nlines\n"
    assert "temperature" in done.stderr and done.returncode == 0


def test_a_prompt_with_a_pipe_is_one_question():
    assert piped("the text\n", "Summarise this:").stdout == "You said: Summarise this:\n\nthe text\n"


def test_what_cannot_be_answered_in_a_pipe_shows_in_the_exit_code():
    done = piped("x" * 5000 + "\nhello\n")
    assert done.returncode == 1 and "hint:" in done.stderr
    assert done.stdout == "You said: hello\n"


def test_a_reader_that_leaves_early_ends_the_chat_quietly():
    command = [sys.executable, "-c", PROGRAM, "0.001"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    process.stdin.write(b"long\n")
    process.stdin.flush()
    process.stdout.read(5)
    process.stdout.close()
    assert process.wait(timeout=10) in (0, -signal.SIGPIPE)
    assert b"Traceback" not in process.stderr.read()
    process.stdin.close()
    process.stderr.close()
