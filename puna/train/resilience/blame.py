"""Whose fault it was that ranks ended: they are lost together, and one of them was first.

A rank that loses a peer fails too, a moment later. So a signal is blamed before an exception, and an exception before the
complaint of having lost a peer.
"""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.train.resilience import signals

VICTIM = 3


@dataclass(kw_only=True)
class Fault:
    """Why an attempt ended."""

    kind: str  # killed | abort | crash | hang | zygote | drain | user
    rank: int | None
    why: str
    since_s: float = 0.0  # monotonic: the last sign of life
    stack: str = ""

    @property
    def first_line(self) -> str:
        """The reason in a line."""
        return self.why.splitlines()[0] if self.why else ""


def is_bad(message: dict[str, Any]) -> bool:
    """Did this rank (the zygote's message of its end) end as it should not?"""
    return bool(message["signal"]) or message["status"] not in (0, signals.LEFT)


def degree(message: dict[str, Any], errors: Callable[[int], Path]) -> int:
    """How sure it is that this rank's end was not another's fault; the lowest number is the surest."""
    if message["signal"]:
        return 0
    if message["status"] == signals.USER_ERROR:
        return 1
    said = signals.confession(errors(message["rank"]), message["rank"]) or {}
    return VICTIM if _is_victim(said) else 2


def fault_of(message: dict[str, Any], errors: Callable[[int], Path], since_s: float) -> Fault:
    """What the end of this rank was. `errors` says where a rank leaves its last words."""
    rank = message["rank"]
    said = signals.confession(errors(rank), rank) or {}
    if message["signal"]:
        name = signal.Signals(message["signal"]).name
        kind = "abort" if name == "SIGABRT" else "killed"
        return Fault(kind=kind, rank=rank, why=f"the process died of {name}", since_s=since_s)
    if message["status"] == signals.USER_ERROR:
        return Fault(kind="user", rank=rank, why=said.get("message", ""), since_s=since_s)
    why = f"{said.get('error', 'exit status')}: {said.get('message', message['status'])}"
    return Fault(kind="crash", rank=rank, why=why, since_s=since_s, stack=said.get("traceback", ""))


def _is_victim(said: dict[str, str]) -> bool:
    """Did a rank die because it lost a peer? PyTorch says so in the message of a RuntimeError."""
    message = said.get("message", "")
    words = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "gloo",
        "NCCL",
        "Timed out waiting",
    )
    return said.get("error") in ("RuntimeError", "DistBackendError", "DistNetworkError", "") and any(
        word in message for word in words
    )
