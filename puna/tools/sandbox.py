"""A Python interpreter for code that a model wrote.

    Sandbox().run("sum(range(10))")  ->  Run(stdout="45\n", error="", timed_out=False)

Each program runs in a process of its own, forked from a warm interpreter (`zygote.py`, which says what the walls are
and how they are put up), so programs cannot see one another, and one takes a few milliseconds. A program may
compute and print, with the part of the standard library that computes; a last line that is an expression is shown, as
in a notebook.

What it protects against, on Linux on x86-64 and 64-bit ARM (`Sandbox.walls` has "seccomp"): reading or writing any
file, the network, starting or signalling processes, using up CPU, memory, disk or the terminal, and this also where the
program gets the interpreter to run machine code of its own. The kernel holds that wall: a program has an empty
input, two pipes to write to, and about thirty system calls.

What it does not protect against: a fault in the kernel's code for those calls, timing side channels between processes
of one machine, and a program that wastes the whole of its allowance (`cpu_s` of one core, `memory_bytes`), again and
again. On other systems only resource limits (on macOS, not of memory) and Python's audit hook stand, which stop
accidents and honest mistakes, but not somebody who wants to get out: do not run there what strangers can influence.

The same program prints the same each time, unless it asks for the clock: string hashes and the random generator are
seeded, and addresses of objects are replaced in the output.
"""

import json
import re
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.config import require
from puna.tools.definition import Tool

ZYGOTE = Path(__file__).with_name("zygote.py")
START_S = 30.0  # for the zygote to start on a loaded machine
REPLY_S = 10.0  # for the zygote to answer, beyond what the program may take


@dataclass(frozen=True, kw_only=True)
class SandboxConfig:
    """What one program may use."""

    cpu_s: int = 1  # the limit that decides: it does not depend on what else the machine does
    wall_s: float = 5.0
    memory_bytes: int = 256 << 20  # address space, with the interpreter's own 40 MiB or so
    output_chars: int = 4000
    source_chars: int = 20_000

    def __post_init__(self) -> None:
        for name in ("cpu_s", "wall_s", "output_chars", "source_chars"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        enough = self.memory_bytes >= 64 << 20
        require(enough, f"memory_bytes={self.memory_bytes:,} is too little", hint="Python needs 64 MiB")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a program did: what it printed, and the exception (or the limit) that ended it, if any."""

    stdout: str
    error: str = ""
    timed_out: bool = False

    @property
    def text(self) -> str:
        """The run as a model is told of it: the output, then a line `error: ...` if there was one."""
        error = f"error: {self.error}" if self.error else ""
        return "\n".join(part for part in (self.stdout.rstrip("\n"), error) if part)


class Sandbox:
    """The interpreter. Starts on first use; `close` it, or use it in a `with`."""

    def __init__(self, config: SandboxConfig | None = None):
        self.config = config or SandboxConfig()
        self.walls: tuple[str, ...] = ()  # known after the start: "limits", "audit", and maybe "seccomp", "namespaces"
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    def run(self, code: str) -> Run:
        """Run one program. Never raises for what the program does."""
        if len(code) > self.config.source_chars:
            return Run(
                stdout="", error=f"the program has {len(code):,} characters, at most {self.config.source_chars:,}"
            )
        with self._lock:
            try:
                self._start()
                return self._run(self._ask(code))
            except OSError:  # the zygote was lost, killed by the system for example: the next program gets a new one
                self._stop()
                return Run(stdout="", error="the interpreter was lost")
            except BaseException:
                self._stop()  # interrupted halfway through an exchange: the socket's state is unknown
                raise

    def start(self) -> "Sandbox":
        """Start now rather than at the first program; then `walls` is known. Raises `OSError` if it cannot start."""
        with self._lock:
            self._start()
        return self

    def close(self) -> None:
        with self._lock:
            self._stop()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        if self._process is not None:
            return
        ours, theirs = socket.socketpair()
        with theirs:
            # -P -s -S: nothing is imported from the current directory or from site-packages. What -I would also do, to
            # ignore the environment, the empty environment does; it has to carry the seed of the string hashes.
            self._process = subprocess.Popen(
                [sys.executable, "-B", "-P", "-s", "-S", str(ZYGOTE)],
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
                start_new_session=True,  # the terminal's Ctrl-C is for the user's program
            )
        self._socket = ours
        ours.settimeout(START_S)
        walls = self._receive()
        self.walls = ("limits", "audit", *(name for name in ("seccomp", "namespaces") if walls[name]))

    def _stop(self) -> None:
        if self._process is not None:
            self._socket.close()
            self._process.kill()
            self._process.wait()
        self._process = self._socket = None

    def _ask(self, code: str) -> dict[str, Any]:
        config = self.config
        request = {
            "code": code,
            "cpu_s": config.cpu_s,
            "wall_s": config.wall_s,
            "memory_bytes": config.memory_bytes,
            "output_bytes": 4 * config.output_chars,  # UTF-8 has at most four bytes per character
        }
        body = json.dumps(request).encode()
        self._socket.settimeout(config.wall_s + REPLY_S)
        self._socket.sendall(len(body).to_bytes(4, "big") + body)
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        length = int.from_bytes(self._read_exactly(4), "big")
        return json.loads(self._read_exactly(length))

    def _read_exactly(self, count: int) -> bytes:
        block = b""
        while len(block) < count:
            part = self._socket.recv(count - len(block))
            if not part:
                raise ConnectionError("the zygote has closed the socket")
            block += part
        return block

    def _run(self, reply: dict[str, Any]) -> Run:
        ended, limit = reply["ended"], self.config.output_chars
        stdout, error = _without_addresses(reply["stdout"]), _without_addresses(reply["error"])
        if ended == "output" or len(stdout) > limit:
            return Run(stdout=stdout[:limit], error=f"the output was cut at {limit:,} characters")
        if ended == "time":
            return Run(stdout=stdout, error="the time limit was exceeded", timed_out=True)
        if ended != "ok":
            return Run(stdout=stdout, error=error or f"the interpreter ended with {ended}")
        return Run(stdout=stdout, error=error)


def _without_addresses(text: str) -> str:
    """`<object at 0x7f3a…>` differs from run to run: the address becomes 0x0."""
    return re.sub(r"\bat 0x[0-9a-f]+", "at 0x0", text)


def code_interpreter(sandbox: Sandbox) -> Tool:
    """Llama's built-in Python: the argument is `code`, the result what the program printed."""

    def function(arguments: dict[str, Any]) -> str:
        return sandbox.run(arguments["code"]).text

    return Tool(
        name="code_interpreter",
        description="Runs a Python program and returns what it prints.",
        parameters={
            "type": "object",
            "properties": {"code": {"type": "string", "description": "the program"}},
            "required": ["code"],
        },
        function=function,
    )
