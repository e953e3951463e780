"""An engine that says what a script tells it, token by token, over a tokenizer whose tokens are bytes."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from puna.chat import Completion, Request, Structure
from puna.tokenizer.bpe import Tokenizer
from puna.tokenizer.dialog import PYTHON_TAG
from puna.tokenizer.formats import dialog_format


@dataclass(frozen=True)
class Piece:
    text: str = ""
    completion: Completion | None = None
    tokens: tuple = ()


@dataclass(frozen=True)
class Config:
    context: int
    parameters: int = 4_200_000


class ScriptedEngine:
    """`answer(request)` gives the text of an answer, special tokens spelled out; `pause_s` passes before each token."""

    def __init__(
        self, answer: Callable[[Request], str], *, context: int = 2048, pause_s: float = 0.0, dialog: str = "meta"
    ):
        self.answer, self.pause_s = answer, pause_s
        self.config = Config(context)
        self.adapters: tuple[str, ...] = ()
        self.tokenizer = Tokenizer({bytes([i]): i for i in range(256)})
        self.format = dialog_format(self.tokenizer, dialog)
        self.seen: list[Request] = []
        self.closed = threading.Event()  # an iterator was closed before its end
        self.drawn = 0

    def prompt_tokens(self, request: Request) -> int:
        if request.prompt is not None:
            return len([self.tokenizer.bos, *self.tokenizer.encode(request.prompt)])
        return len(self.format.render(request.dialog).ids)

    def stream(self, request: Request, *, patient: bool = True) -> Iterator[Piece]:
        self.seen.append(request)
        ids, spelled = self._script(self.answer(request)), []
        limit = request.sampling.max_tokens
        try:
            for id in ids[:limit]:
                time.sleep(self.pause_s)
                self.drawn += 1
                spelled.append(id)
                if id not in self.tokenizer.stop_ids:
                    yield Piece(self.tokenizer.decode([id]))
            yield Piece(completion=self._completion(request, spelled, cut=len(ids) > limit))
        except GeneratorExit:
            self.closed.set()
            raise

    def check_form(self, structure: Structure) -> None:
        """Any form will do: none is followed."""

    def figures(self) -> dict[str, int]:
        return {"cache_tokens": 4096, "guessed": 7}

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [list(self.stream(request))[-1].completion for request in requests]

    def _script(self, text: str) -> list[int]:
        first, *tagged = text.split(PYTHON_TAG)
        ids = self.tokenizer.encode(first)
        for part in tagged:
            ids += [self.tokenizer.python_tag, *self.tokenizer.encode(part)]
        return [*ids, self.tokenizer.eom if tagged else self.tokenizer.eot]

    def _completion(self, request: Request, ids: list[int], *, cut: bool) -> Completion:
        message = self.format.parse(ids)
        text = self.tokenizer.decode([id for id in ids if id not in self.tokenizer.stop_ids])
        reason = "length" if cut else "tool_calls" if message.tool_calls else "stop"
        return Completion(
            message=message,
            text=text,
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens(request),
            completion_tokens=len(ids),
        )


def echo(request: Request) -> str:
    """Answers with the last message."""
    return f"You said: {request.dialog[-1].content}" if request.dialog else f" and {request.prompt}"
