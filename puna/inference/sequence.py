"""One request on its way: its tokens, where their keys and values lie, the text so far, and why it ended."""

from collections import deque
from collections.abc import Set
from dataclasses import dataclass

from puna.chat import Completion, Request, TokenChoice
from puna.errors import DataError
from puna.inference.blocks import root_key
from puna.inference.sampler import among_likeliest
from puna.inference.structure import Matcher
from puna.inference.text import TextStream


class ContextError(DataError):
    """A prompt is too long for the model, or for the cache."""


@dataclass(frozen=True)
class Piece:
    """A bit of an answer as it is made. The last piece of a stream has the whole as `completion`.

    `tokens` are those that this piece brings to an end, where the request asked for their log-probabilities.
    """

    text: str
    completion: Completion | None = None
    tokens: tuple[TokenChoice, ...] = ()


class Sequence:
    """The state of one request.

    `tokens` are the prompt and what was drawn; of those the first `cached` have their keys and values in `blocks`
    (`blocks.py` owns these fields). `limit` is how many may be drawn: max_tokens, or less if the context ends before.
    `finish` is None while it runs, then `stop` or `length`. What can be shown waits in `fresh` until somebody takes it.
    `begins` says that what is drawn begins a text of its own; it is no longer so once a token with text was drawn.
    `errors` is the tokenizer's way with bytes that are no UTF-8.
    """

    def __init__(
        self,
        prompt: list[int],
        request: Request,
        limit: int,
        stop_ids: Set[int],
        begins: bool = True,
        errors: str = "replace",
    ):
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.request, self.sampling = request, request.sampling
        self.limit = limit
        self.begins = begins
        self.stop_ids = stop_ids
        self.matcher: Matcher | None = None  # what the answer's form still allows
        self.adapter: int | None = None  # the runner's index of the request's adapter
        self.arrival = 0  # the scheduler's number
        self.watched = False  # somebody sees it grow: steps should be short
        self.screened = request.structure is None and among_likeliest(self.sampling)
        self.follows: Sequence | None = None  # one with the same prompt, who is reading it for both

        self.blocks: list[int] = []
        self.keys: list[bytes] = []
        self.cached = self.published = self.found = 0  # found: tokens that were in the cache when it was first admitted
        self.root = root_key(request.owner, request.adapter)

        self.logprob = 0.0
        self.choices: list[TokenChoice] = []
        self.prompt_choices: list[TokenChoice] = []
        self.text = TextStream(self.sampling.stop, errors)
        self.fresh: deque[Piece] = deque()
        self.finish: str | None = None if limit > 0 or self.sampling.prompt_logprobs is not None else "length"
        self.error: BaseException | None = None
        self.abandoned = False
        self._bytes = 0  # of all drawn tokens
        self._ends: deque[int] = deque()  # where the tokens end whose choice was not shown yet

    @property
    def prompt(self) -> list[int]:
        return self.tokens[: self.prompt_length]

    @property
    def drawn(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def count(self) -> int:
        """Tokens drawn."""
        return len(self.tokens) - self.prompt_length

    @property
    def longest(self) -> int:
        """Tokens at most."""
        return self.prompt_length + self.limit

    @property
    def unread(self) -> int:
        """Tokens that the model has yet to read before the next one can be drawn. One: it is decoding."""
        return len(self.tokens) - self.cached

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: higher priority, then earlier arrival."""
        return -self.request.priority, self.arrival

    @property
    def alone(self) -> bool:
        """Whether its prompt must be read in full, by itself: the log-probabilities of all its tokens are wanted."""
        return self.sampling.prompt_logprobs is not None

    @property
    def done(self) -> bool:
        return self.finish is not None or self.error is not None or self.abandoned

    def append(self, token: int, logprob: float, data: bytes, top: tuple[TokenChoice, ...] = ()) -> None:
        """Take the next drawn token; `data` is its text in bytes, `top` the likeliest ones in its place."""
        if self.limit == 0:  # only the prompt's log-probabilities were wanted
            self.finish = "length"
            return
        self.tokens.append(token)
        self.logprob += logprob
        self.begins = self.begins and not data
        if self.matcher is not None:
            self.matcher.take(token)
        if token in self.stop_ids:
            self._end("stop")
            return
        if self.sampling.logprobs is not None:
            self.choices.append(TokenChoice(token=token, data=data, logprob=logprob, top=top))
            self._bytes += len(data)
            self._ends.append(self._bytes)
        self._show(self.text.push(data))
        if self.text.stopped:
            self._cut()
            self.finish = "stop"
        elif self.count >= self.limit:
            self._end("length")
        elif self.matcher is not None and self.matcher.complete:
            self._end("stop")

    def rest(self) -> tuple[TokenChoice, ...]:
        """Of the tokens whose log-probabilities are wanted, those that no piece has shown."""
        return tuple(self.choices[len(self.choices) - len(self._ends) :])

    def _end(self, reason: str) -> None:
        self._show(self.text.finish())
        if self.text.stopped:
            self._cut()
        self.finish = "stop" if self.text.stopped else reason

    def _show(self, text: str) -> None:
        if text:
            first = len(self.choices) - len(self._ends)
            shown = self._bytes - self.text.held
            while self._ends and self._ends[0] <= shown:
                self._ends.popleft()
            tokens = tuple(self.choices[first : len(self.choices) - len(self._ends)])
            self.fresh.append(Piece(text, tokens=tokens))

    def _cut(self) -> None:
        """A stop string was met: forget the tokens that lie behind the text."""
        shown, decoded, decoder = len(self.text.text), 0, self.text.decoder()
        for keep, choice in enumerate(self.choices):
            if decoded >= shown:
                dropped = len(self.choices) - keep
                del self.choices[keep:]
                while self._ends and dropped:
                    self._ends.pop()
                    dropped -= 1
                break
            decoded += len(decoder.decode(choice.data, final=not choice.data))
