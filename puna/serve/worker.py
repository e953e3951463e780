"""One engine, many clients: a thread that owns the engine and deals out its tokens.

    submit -> waiting (bounded, first come first served) -> active (at most `slots`) -> done
                                  each round: one piece for every active request, in turn

Nobody waits for somebody else's whole answer, or for his prompt to be read: a short question that arrives during a long
one is answered meanwhile. Taking a piece makes a step of the engine at most, and a step draws a token for every active
request, so all of them run as one batch. Pieces reach the event loop of the server through
`call_soon_threadsafe`; a client that goes away cancels its ticket, and the next round closes the engine's iterators.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from puna.chat import Completion, Request
from puna.errors import BusyError, PunaError
from puna.serve.fields import ApiError

log = logging.getLogger(__name__)


class Ticket:
    """A client's place: the pieces of its requests as they come, and `cancel` to give the place up."""

    def __init__(self, requests: Sequence[Request]):
        self.requests = list(requests)
        self.cancelled = False
        self.finished = False
        self.submitted, self.first, self.last = time.monotonic(), 0.0, 0.0  # when, and when pieces came
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Any]]:
        """(index of the request, piece) until each request's last piece, the one with a completion, has come."""
        unfinished = len(self.requests)
        while unfinished:
            index, event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            unfinished -= event.completion is not None
            yield index, event
        self.finished = True

    async def completions(self) -> list[Completion]:
        """All answers, in the order of the requests."""
        done: dict[int, Completion] = {}
        async for index, piece in self:
            if piece.completion is not None:
                done[index] = piece.completion
        return [done[index] for index in range(len(self.requests))]

    def timings(self, tokens: int) -> dict[str, float]:
        """How long the first piece took, and the speed from it to the last, of `tokens` in all."""
        seconds = self.last - self.first
        speed = (tokens - len(self.requests)) / seconds if seconds > 0 else 0.0
        return {"first_token_s": round(self.first - self.submitted, 4), "tokens_per_s": round(speed, 2)}

    def cancel(self) -> None:
        """No more pieces are wanted. Harmless after the end."""
        self.cancelled = True

    def deliver(self, index: int, event: Any) -> None:
        """Called by the worker's thread."""
        self.last = time.monotonic()
        self.first = self.first or self.last
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))
        except RuntimeError:  # the server's loop has ended
            self.cancelled = True


class Worker:
    """Serves requests from `engine` in one thread, `slots` at a time, at most `queue` more waiting."""

    def __init__(self, engine: Any, *, slots: int = 16, queue: int = 64):
        self.engine = engine
        self.slots, self.queue = slots, queue
        self._waiting: deque[tuple[Ticket, int]] = deque()
        self._active: list[_Active] = []
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="puna-worker", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that have not started."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Requests that are being answered."""
        return len(self._active)

    def submit(self, requests: Sequence[Request]) -> Ticket:
        """Queue the requests of one call, all or none. Raises `ApiError` (503) if there is no room for them."""
        ticket = Ticket(requests)
        with self._wake:
            if self._closing:
                raise shutting_down()
            self._waiting = deque(place for place in self._waiting if not place[0].cancelled)
            if len(self._waiting) + len(ticket.requests) > self.queue:
                raise overloaded(f"{len(self._waiting)} requests are waiting, at most {self.queue} may")
            self._waiting.extend((ticket, index) for index in range(len(ticket.requests)))
            self._wake.notify()
        return ticket

    def stop(self) -> None:
        """End every answer after the engine's current step; returns at once."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def close(self) -> None:
        """Stop, and wait for it."""
        self.stop()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while self._admit():
            self._active = [active for active in self._active if active.step()]
        for ticket, index in self._waiting:
            ticket.deliver(index, shutting_down())
        for active in self._active:
            active.end(shutting_down())

    def _admit(self) -> bool:
        """Fill the free slots, sleeping while there is nothing at all to do; False when closing."""
        with self._wake:
            while not (self._waiting or self._active or self._closing):
                self._wake.wait()
            while self._waiting and len(self._active) < self.slots:
                ticket, index = self._waiting.popleft()
                if not ticket.cancelled:
                    self._active.append(_Active(self.engine, ticket, index))
            return not self._closing


class _Active:
    """A request that holds a slot: the engine's iterator for it."""

    def __init__(self, engine: Any, ticket: Ticket, index: int):
        self.ticket, self.index = ticket, index
        self._pieces: Iterator[Any] = _pieces(engine, ticket.requests[index])

    def step(self) -> bool:
        """Take one piece and hand it on, unless a step brought none; False when this request is over."""
        if self.ticket.cancelled:
            self._pieces.close()
            return False
        try:
            piece = next(self._pieces)
        except BusyError as error:
            return self.end(overloaded(error.message))
        except PunaError as error:
            return self.end(ApiError(400, str(error)))
        except Exception:
            log.exception("the engine failed on a request")
            return self.end(ApiError(500, "the model failed on this request", kind="server_error"))
        if piece.text or piece.tokens or piece.completion is not None:
            self.ticket.deliver(self.index, piece)
        if piece.completion is not None:
            self._pieces.close()
        return piece.completion is None

    def end(self, error: ApiError) -> bool:
        self._pieces.close()
        self.ticket.deliver(self.index, error)
        return False


def _pieces(engine: Any, request: Request) -> Iterator[Any]:
    """The engine's stream as a generator, so that an error in starting it surfaces where pieces are taken."""
    yield from engine.stream(request, patient=False)
    raise RuntimeError("the engine's stream ended without a completion")


def overloaded(why: str) -> ApiError:
    """What a client gets for whom there is no room now."""
    busy = f"the server is busy: {why}"
    return ApiError(503, busy, kind="server_error", code="overloaded", headers={"Retry-After": "2"})


def shutting_down() -> ApiError:
    """What a client gets whose answer the server cannot finish."""
    return ApiError(503, "the server is shutting down", kind="server_error", code="shutting_down")
