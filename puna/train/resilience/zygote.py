"""The zygote: a process that has imported everything a rank needs, and forks one on request.

Importing PyTorch and the training takes seconds; a fork takes milliseconds. So this process is started once, loads the
modules it is told, and waits at a socket. It computes nothing: no thread is started and no GPU is touched before a fork,
since neither would survive it. Ranks die with it, it dies with the launcher, and a supervisor that comes back after a
fault finds it, and the ranks, where they were.

    {"fork": {"target": "module:function", "argument": {...}, "env": {...}, "rank": 0, "errors": folder, "log": file}}
        -> {"forked": pid, "rank": 0}
    {"list": true}
        -> {"ranks": {pid: env}}
    later, unasked for: {"exited": pid, "rank": 0, "status": 1, "signal": 0, "at": monotonic seconds}

Each message is a line of JSON. One supervisor is served at a time; what happens while there is none is told to the next.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """`zygote SOCKET MODULE...`: load the modules, then serve."""
    path, modules = sys.argv[1], sys.argv[2:]
    die_with_parent()
    os.setsid()  # Ctrl-C is the launcher's
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # forks share these pages as long as no collection touches them
    Zygote(path).serve()


def die_with_parent() -> None:
    """Ask Linux for SIGKILL when the parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Zygote:
    """The event loop: a listening socket, at most one supervisor, and children that end."""

    def __init__(self, path: str):
        self.server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        temporary = f"{path}.{os.getpid()}"
        self.server.bind(temporary)
        self.server.listen(4)
        os.rename(temporary, path)  # who can connect finds everything loaded
        self.client: socket.socket | None = None
        self.buffer = b""
        self.ranks: dict[int, dict[str, Any]] = {}
        self.untold: list[dict[str, Any]] = []
        self.woken, wake = os.pipe()
        os.set_blocking(self.woken, False)
        os.set_blocking(wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def serve(self) -> None:
        """For ever: the launcher ends this process."""
        parent = os.getppid()
        while os.getppid() == parent:
            sources = [self.server, self.woken] + ([self.client] if self.client else [])
            ready, _, _ = select.select(sources, [], [], 1.0)
            if self.woken in ready:
                os.read(self.woken, 4096)
            self._reap()
            if self.server in ready:
                self._welcome()
            if self.client in ready:
                self._listen()

    def _welcome(self) -> None:
        if self.client is not None:
            self.client.close()
        self.client, _ = self.server.accept()
        self.buffer = b""
        untold, self.untold = self.untold, []
        for message in untold:
            self._tell(message)

    def _listen(self) -> None:
        try:
            data = self.client.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self.client.close()
            self.client = None
            return
        self.buffer += data
        *lines, self.buffer = self.buffer.split(b"\n")
        for line in lines:
            self._obey(json.loads(line))

    def _obey(self, request: dict[str, Any]) -> None:
        if "list" in request:
            self._tell({"ranks": {str(pid): known for pid, known in self.ranks.items()}})
        if "fork" in request:
            order = request["fork"]
            pid = os.fork()
            if pid == 0:
                self._become(order)
            self.ranks[pid] = {"rank": order["rank"], "env": order["env"]}
            self._tell({"forked": pid, "rank": order["rank"]})

    def _become(self, order: dict[str, Any]) -> None:
        """The child's whole life: it never returns into the loop."""
        status = 1
        try:
            self._shed()
            os.environ.update(order["env"])
            if order.get("log"):
                log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                os.dup2(log, 1)
                os.dup2(log, 2)
            status = run(order)
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _shed(self) -> None:
        """Close what is the zygote's, and take signals as a new process does."""
        die_with_parent()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.server.close()
        if self.client is not None:
            self.client.close()
        os.close(self.woken)

    def _reap(self) -> None:
        while self.ranks:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            known = self.ranks.pop(pid, None)
            if known is not None:
                code, number = os.waitstatus_to_exitcode(status), 0
                if code < 0:
                    code, number = 0, -code
                about = {"rank": known["rank"], "status": code, "signal": number, "at": time.monotonic()}
                self._tell({"exited": pid, **about})

    def _tell(self, message: dict[str, Any]) -> None:
        if self.client is None:
            self.untold.append(message)
            return
        try:
            self.client.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.client.close()
            self.client = None
            self.untold.append(message)


def run(order: dict[str, Any]) -> int:
    """Call a rank's target; its exit status. What it died of is left for the supervisor."""
    from puna.train.resilience.signals import confess

    try:
        module, _, name = order["target"].partition(":")
        getattr(importlib.import_module(module), name)(**order["argument"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1 if end.code else 0
    except BaseException as error:
        return confess(Path(order["errors"]), order["rank"], error)
    return 0


if __name__ == "__main__":
    main()
