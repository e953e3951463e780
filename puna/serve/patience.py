"""How long a connection may take to say what it wants.

A client that sends a request's head byte by byte, or never, holds a connection and costs nothing; a thousand of them
take all that a process may have open ("slowloris"). Uvicorn waits for ever. Here a connection is closed that has not
sent a whole head within `HEAD_S` of its beginning, or of the first byte after the answer before.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 20.0


class Patient(H11Protocol):
    """Uvicorn's protocol, which does not wait for ever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # a request is being answered
            self._forget()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_S, self.transport.close)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
