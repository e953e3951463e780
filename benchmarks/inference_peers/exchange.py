"""One engine in a child process of its own, asked over a pipe: a line of JSON there, a line of JSON back.

A child loads once, answers commands, and sleeps between them; so all engines can be in memory while they are measured
in turn, with every library's threads and memory its own. This file is both ends. The child's needs nothing but Python,
since some engines live in environments without PyTorch.

    load                        seconds, facts about what was loaded
    prefill   tokens            seconds for a prompt of so many tokens, logits of the last; the token that follows
    start     contexts, room    sequences of these lengths in the cache, not timed, room for so many tokens more
    decode    steps             seconds for so many greedy steps of all sequences; what the first one said;
                                 the next question goes on from there
    rest                        forgets the sequences: their memory is free
    memory                      bytes: peak, and of it what files share

An engine is a class with these methods, `memory` aside; time is taken here.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENGINES = {
    "runner": "ours:Runner",
    "engine": "ours:WholeEngine",
    "llama.cpp": "llamacpp:LlamaCpp",
    "transformers": "hugging:Transformers",
    "torchao": "hugging:TorchAo",
    "openvino": "intel:OpenVino",
}
_FOLDER = Path(__file__).parent


def prompt(tokens: int, offset: int = 0) -> list[int]:
    """The same token ids for everybody; all are below 2,000."""
    return [(7919 * (i + offset) + 13) % 1999 for i in range(tokens)]


class PeerError(Exception):
    """An engine could not do what it was asked."""


class Child:
    """A running engine."""

    def __init__(self, engine: str, settings: dict[str, Any], log: Path, python: str = sys.executable):
        self.log = log
        self.started = time.perf_counter()
        paths = [str(_FOLDER.parent), str(_FOLDER.parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
        # Threads of OpenMP sleep soon after their work by themselves; told to sleep at once they lose at every barrier.
        environment |= {
            "OMP_NUM_THREADS": str(settings["threads"]),
            "KMP_BLOCKTIME": "0",
            "TOKENIZERS_PARALLELISM": "0",
        }
        environment.pop("OMP_WAIT_POLICY", None)
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [python, "-m", "inference_peers.exchange", engine, json.dumps(settings)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment,
            )  # fmt: skip
        try:
            self.imports = self._answer()["seconds"]
        except PeerError:
            self.close()
            raise

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The child's answer. Raises `PeerError` if it failed or died."""
        try:
            self.process.stdin.write(json.dumps([command, arguments]).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has died: reading will say so
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise PeerError(f"ended with {self.process.wait()}; see {self.log}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def close(self) -> None:
        if self.process.stdin:
            self.process.stdin.close()  # the end of its commands
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def serve(engine: str, settings: dict[str, Any]) -> None:
    """The child: obey until there are no more commands."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # whatever a library prints goes to the log

        def reply(make: Callable[[], dict[str, Any]]) -> None:
            try:
                answer = make()
            except Exception as error:
                import traceback

                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"[:300]}
            out.write(json.dumps(answer) + "\n")
            out.flush()

        commands: dict[str, Callable[..., dict[str, Any]]] = {"memory": _memory}

        def begin() -> dict[str, Any]:
            began = time.perf_counter()
            module, name = ENGINES[engine].split(":")
            made = getattr(importlib.import_module(f"inference_peers.{module}"), name)(**settings)
            commands.update(
                {verb: _timed(getattr(made, verb)) for verb in ("load", "prefill", "start", "decode", "rest")}
            )
            return {"seconds": time.perf_counter() - began}

        reply(begin)
        for line in sys.stdin:
            command, arguments = json.loads(line)
            reply(lambda command=command, arguments=arguments: commands[command](**arguments))


def _timed(action: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    def run(**arguments: Any) -> dict[str, Any]:
        began = time.perf_counter()
        result = action(**arguments)
        return {"seconds": time.perf_counter() - began, "result": result}

    return run


def _memory() -> dict[str, int]:
    """Bytes, where Linux tells."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    found = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith(("VmHWM", "Rss"))}
    return {"peak": found["VmHWM"], "own": found["RssAnon"], "files": found["RssFile"]}


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
