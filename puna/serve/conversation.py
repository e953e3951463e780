"""A conversation with the engine: its messages, its settings, and what happens when a question is asked.

    ask -> fit into the context -> stream the answer -> a tool call? run it, append the result, answer again
                                                     -> else the answer is part of the conversation

`ask` yields events, so a terminal shows them as they come and a test reads them as values. Nothing is forgotten in
silence: where the conversation has outgrown the context, the oldest exchanges are left out of what the model sees, and
an event says how many. They stay in `messages`, and in the file that `save` writes.
"""

import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from puna import artifacts, chat, config
from puna.chat import Completion, Dialog, Message, Request, Sampling, ToolCall
from puna.errors import ConfigError, DataError, PunaError
from puna.serve import knobs
from puna.serve.replies import Speech
from puna.serve.toolset import custom_names, offered
from puna.tools.agent import derive_seed, execute
from puna.tools.definition import Tool

MOST_CALLS = 4  # of tools, for one question
LONGEST_FILE = 16 << 20  # bytes, of a saved conversation


@dataclass(frozen=True)
class Said:
    """A bit of the answer."""

    text: str


@dataclass(frozen=True)
class Used:
    """The model called a tool, and this came of it."""

    call: ToolCall
    result: str


@dataclass(frozen=True)
class Forgot:
    """The oldest exchanges do not fit any more: so many, in all, are no longer seen by the model."""

    exchanges: int


@dataclass(frozen=True)
class Ended:
    """The answer is over. `tokens_per_s` counts from the first token to the last; 0 if there was one at most."""

    reason: Literal["stop", "length", "tool_calls", "stopped"]
    tokens: int
    tokens_per_s: float


Event = Said | Used | Forgot | Ended


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a file of `/save` holds."""

    puna_chat: int = 1  # the version of this format
    system: str = ""
    sampling: Sampling
    seed: int | None = None
    messages: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        config.require(self.puna_chat == 1, f"puna_chat={self.puna_chat} is not a version that can be read (1 is)")


class Conversation:
    """What was said, and how the next answer is drawn. `seed` None draws each answer afresh."""

    def __init__(
        self, engine: Any, *, system: str = "", sampling: Sampling = knobs.DEFAULT, tools: Sequence[Tool] = ()
    ):
        self.engine = engine
        self.system, self.sampling = system, sampling
        self.tools = tuple(tools) if engine.format.dialect else ()
        self.tools_on = bool(self.tools)
        self.seed: int | None = None
        self.adapter: str | None = next(iter(engine.adapters), None)
        self.clear()

    def clear(self) -> None:
        """Start anew; the settings stay."""
        self.messages: list[Message] = []
        self._first = 0  # of the messages that the model sees

    @property
    def dialog(self) -> Dialog:
        """What the model sees."""
        dialog = (*([chat.system(self.system)] if self.system else []), *self.messages[self._first :])
        return offered(self.engine.format, dialog, self.tools) if self.tools_on else dialog

    @property
    def tokens(self) -> int:
        """The length of what the model sees."""
        dialog = self.dialog
        answered = dialog[-1:] and dialog[-1].role == "assistant"
        waits = bool(self.messages[self._first :]) and not answered
        return len(self.engine.format.render(dialog, answer=waits).ids) if dialog else 0

    def set(self, name: str, text: str) -> None:
        """Change one setting to what a person typed. Raises `ConfigError`."""
        if name == "seed" and text == "random":
            self.seed = None
            return
        self.sampling = knobs.turn(self.sampling, name, text)
        if name == "seed":
            self.seed = self.sampling.seed

    def ask(self, text: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Say `text` and yield what comes of it, until the answer is over or `stopped()`.

        Raises `DataError` if `text` alone is too long; then the conversation is as it was.
        """
        self.messages.append(chat.user(text))
        return self._answer(stopped)

    def retry(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Answer the last question again. Raises `PunaError` if there is none."""
        last = max((i for i, m in enumerate(self.messages) if m.role == "user"), default=None)
        if last is None:
            raise PunaError("there is no question to answer again", hint="ask one")
        del self.messages[last + 1 :]
        return self._answer(stopped)

    def _answer(self, stopped: Callable[[], bool]) -> Iterator[Event]:
        start = len(self.messages)  # what the question adds comes after
        try:
            yield from self._turns(stopped)
        except BaseException:
            del self.messages[start:]
            raise
        finally:
            if self.messages and self.messages[-1].role != "assistant":  # nothing was said: as if never asked
                del self.messages[start - 1 :]

    def _turns(self, stopped: Callable[[], bool]) -> Iterator[Event]:
        seed = secrets.randbits(63) if self.seed is None else self.seed
        calls, clock = 0, _Clock()
        while True:
            yield from self._fit()
            drawn = replace(self.sampling, seed=derive_seed(seed, calls) if calls else seed)
            request = Request(dialog=self.dialog, sampling=drawn, adapter=self.adapter)
            completion = yield from self._stream(request, clock, stopped)
            if completion is None:
                yield clock.ended("stopped")
                return
            self.messages.append(completion.message)
            asked = completion.message.tool_calls if completion.finish_reason == "tool_calls" else ()
            if not asked or not self.tools_on or calls + len(asked) > MOST_CALLS:
                yield clock.ended(completion.finish_reason)
                return
            for call in asked:
                execution = execute(call, self.tools)
                self.messages.append(chat.tool_result(execution.result))
                yield Used(call, execution.result)
            calls += len(asked)

    def _stream(self, request: Request, clock: "_Clock", stopped: Callable[[], bool]) -> Iterator[Event]:
        """The events of one message; returns its completion, or None if it was stopped (its text is kept)."""
        names = custom_names(self.tools) if self.tools_on else None
        speech = Speech(names, self.engine.format.reader(names))
        said = ""
        pieces = self.engine.stream(request, patient=False)  # so that it can be stopped while the question is read
        try:
            for piece in pieces:
                if piece.text or piece.completion:
                    clock.tick()
                text = speech.finish(piece.completion)[0] if piece.completion else speech.say(piece.text)
                if text:
                    said += text
                    yield Said(text)
                if piece.completion:
                    clock.count(piece.completion)
                    return piece.completion
                if stopped():
                    break
        finally:
            pieces.close()
        if said:
            self.messages.append(chat.assistant(said))
        return None

    def _fit(self) -> Iterator[Event]:
        """Leave out the oldest exchanges until a quarter of the context, or a whole answer, has room."""
        context = self.engine.config.context
        reserve = min(self.sampling.max_tokens, context // 4)
        before = self._first
        while (tokens := self.tokens) + reserve > context:
            later = (i for i, m in enumerate(self.messages) if m.role == "user" and i > self._first)
            self._first, earlier = next(later, self._first), self._first
            if self._first == earlier:
                break
        if self._first > before:
            yield Forgot(sum(m.role == "user" for m in self.messages[: self._first]))
        if tokens >= context:
            raise DataError(
                f"this takes {tokens:,} tokens with the system message, and the context holds {context:,}",
                hint="make it shorter; nothing was sent",
            )

    def save(self, path: Path) -> None:
        """Write the conversation as JSON. Raises `DataError` rather than replace a file that is not one."""
        if path.exists():
            try:
                _read(path)
            except PunaError:
                raise DataError(f"{path} exists and is not a saved conversation", hint="choose another name") from None
        saved = Saved(system=self.system, sampling=self.sampling, seed=self.seed, messages=tuple(self.messages))
        try:
            artifacts.write_atomic(path, json.dumps(config.to_json(saved), ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}", hint="choose another place") from None

    def load(self, path: Path) -> None:
        """Go on with a saved conversation. Raises `PunaError` if the file is not one; then nothing has changed."""
        saved = _read(path)
        for name in knobs.KNOBS:
            knobs.turn(saved.sampling, name, str(getattr(saved.sampling, name)))
        self.engine.format.render(saved.messages, answer=False)  # what this model's format cannot say is found now
        self.clear()
        self.system, self.sampling, self.seed = saved.system, saved.sampling, saved.seed
        self.messages = list(saved.messages)


class _Clock:
    """Tokens of one answer, over all its messages, and the time in which they came."""

    def __init__(self) -> None:
        self._started = self._last = 0.0
        self._pieces = self.tokens = 0

    def tick(self) -> None:
        self._last = time.monotonic()
        self._started = self._started or self._last
        self._pieces += 1

    def count(self, completion: Completion) -> None:
        self.tokens += completion.completion_tokens

    def ended(self, reason: Literal["stop", "length", "tool_calls", "stopped"]) -> Ended:
        tokens = self._pieces if reason == "stopped" else self.tokens
        seconds = self._last - self._started
        return Ended(reason, tokens, (tokens - 1) / seconds if tokens > 1 and seconds > 0 else 0.0)


def _read(path: Path) -> Saved:
    try:
        if path.stat().st_size > LONGEST_FILE:
            raise DataError(f"{path} is larger than any saved conversation", hint="give a file that /save wrote")
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", hint="give a file that /save wrote") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}", hint="give a file that /save wrote") from None
    if not isinstance(data, dict) or "puna_chat" not in data:
        raise DataError(f"{path} is not a saved conversation", hint="give a file that /save wrote")
    try:
        return config.from_json(Saved, data)
    except ConfigError as error:
        raise DataError(f"{path} is not a saved conversation: {error}", hint="give a file that /save wrote") from None
