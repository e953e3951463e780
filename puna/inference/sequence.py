"""One request on its way: its prompt's ids, what was drawn, the text so far, and why it ended."""

from collections import deque
from collections.abc import Set
from dataclasses import dataclass

from puna.chat import Completion, Sampling
from puna.errors import DataError
from puna.inference.text import TextStream


class ContextError(DataError):
    """A prompt is too long for the model."""


@dataclass(frozen=True)
class Piece:
    """A bit of an answer as it is made. The last piece of a stream has the whole as `completion`."""

    text: str
    completion: Completion | None = None


class Sequence:
    """The state of one request.

    `limit` is how many tokens may be drawn: max_tokens, or less if the context ends before. `finish` is None while it
    runs, then `stop` or `length`. What can be shown waits in `fresh` until somebody takes it. `begins` says that what is
    drawn begins a text of its own, `errors` is the tokenizer's way with bytes that are no UTF-8.
    """

    def __init__(
        self,
        prompt: list[int],
        sampling: Sampling,
        limit: int,
        stop_ids: Set[int],
        *,
        begins: bool = True,
        errors: str = "replace",
    ):
        self.prompt = prompt
        self.sampling = sampling
        self.limit = limit
        self.stop_ids = stop_ids
        self.drawn: list[int] = []
        self.logprob = 0.0
        self.begins = begins
        self.text = TextStream(sampling.stop, errors)
        self.fresh: deque[str] = deque()
        self.finish: str | None = None if limit > 0 else "length"
        self.error: BaseException | None = None
        self.abandoned = False

    @property
    def length(self) -> int:
        """Tokens so far, prompt and drawn."""
        return len(self.prompt) + len(self.drawn)

    @property
    def longest(self) -> int:
        """Tokens at most."""
        return len(self.prompt) + self.limit

    @property
    def done(self) -> bool:
        return self.finish is not None or self.error is not None or self.abandoned

    def append(self, token: int, logprob: float, data: bytes) -> None:
        """Take the next drawn token; `data` is its text in bytes."""
        self.drawn.append(token)
        self.logprob += logprob
        if token in self.stop_ids:
            self._end("stop")
            return
        self._show(self.text.push(data))
        if self.text.stopped:
            self.finish = "stop"
        elif len(self.drawn) >= self.limit:
            self._end("length")

    def _end(self, reason: str) -> None:
        self._show(self.text.finish())
        self.finish = "stop" if self.text.stopped else reason

    def _show(self, text: str) -> None:
        if text:
            self.fresh.append(text)
