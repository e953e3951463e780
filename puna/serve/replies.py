"""From our answers to OpenAI's: whole bodies, and the chunks of a stream.

    not streamed   one object: choices[].message (or .text), usage
    streamed       chunks: the role, then content deltas, tool calls at the end, a finish_reason; `usage` in a last
                   chunk of its own where stream_options.include_usage asks for it; then [DONE]

Both say the same. A tool call is text while the model writes it, so a stream keeps back what may be one, and from the
first call on everything, until the answer is complete and parsed (`Speech`).
"""

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from puna import __version__
from puna.chat import Completion, TokenChoice, ToolCall
from puna.serve.calls import Call
from puna.serve.fields import ApiError
from puna.serve.worker import Ticket
from puna.tokenizer.call_stream import Event, MessageStream
from puna.tokenizer.calls import TAGGED
from puna.tokenizer.formats import Reader

Tokens = Sequence[TokenChoice]


class Speech:
    """One answer as a client hears it: `say` as pieces come, then `finish` once.

    A call stands at the very start of an answer or after `<|python_tag|>`; nothing else is kept back, and what began
    like a call only until it shows that it is none (`MessageStream`).
    """

    def __init__(self, tools: frozenset[str] | None, reader: Reader | None = None):
        """`tools` are the functions on offer; None for a raw completion, in which nothing is a call.

        `reader` is the dialog format's, Llama 3's by default.
        """
        self._tools = tools
        self._stream = reader or MessageStream(names=tools, spelled=True)
        self._calling = False
        self._said = ""

    def say(self, text: str) -> str:
        """What of the answer so far, extended by `text`, may be shown now: the new part of it."""
        if self._tools is not None:
            text = "".join(self._words(self._stream.feed(text)))
        self._said += text
        return text

    def finish(self, completion: Completion) -> tuple[str, tuple[ToolCall, ...]]:
        """The rest of the content, and the calls."""
        content, calls = (completion.text, ()) if self._tools is None else visible(completion, self._tools)
        return content[len(self._said) :], calls

    def _words(self, events: list[Event]) -> Iterator[str]:
        """The text up to the first call. What stands after one is settled when all calls are known: see `visible`."""
        for event in events:
            self._calling |= isinstance(event, ToolCall)
            if not self._calling:
                yield event


def visible(completion: Completion, tools: frozenset[str]) -> tuple[str, tuple[ToolCall, ...]]:
    """The content and the tool calls of an answer.

    What merely looks like a call, of a function that the client did not offer, is content; so is a call that was cut
    off, since it is not the call that was meant.
    """
    calls = completion.message.tool_calls
    if completion.finish_reason != "length" and all(call.dialect in TAGGED or call.name in tools for call in calls):
        return completion.message.content, calls
    return completion.text, ()


class Reply:
    """The shape of the answer to one call: ids, the object's name, and how a choice is written."""

    def __init__(self, call: Call, model: str, *, is_chat: bool):
        self.call, self.is_chat = call, is_chat
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"puna-{__version__}",
        }

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The body that answers a call without streaming."""
        name = "chat.completion" if self.is_chat else "text_completion"
        choices = [self._choice(index, completion) for index, completion in enumerate(completions)]
        return {**self._head, "object": name, "choices": choices, "usage": self.usage(completions)}

    def usage(self, completions: Sequence[Completion]) -> dict[str, int]:
        """Tokens, exactly: each distinct prompt once, each drawn token once."""
        drawn = sum(completion.completion_tokens for completion in completions)
        prompt = self.call.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}

    def chunk(
        self, index: int, finish_reason: str | None = None, *, tokens: Tokens = (), **delta: Any
    ) -> dict[str, Any]:
        """One chunk of a stream, for one choice; `tokens` are those whose log-probabilities go with it."""
        says = {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
        logprobs = self._logprobs(index, tokens) if tokens else None
        choice = {"index": index, **says, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._chunk([choice], {"usage": None} if self.call.include_usage else {})

    def opening(self) -> Iterator[dict[str, Any]]:
        """The chunks before any token: whose turn it is, or the echoed prompt."""
        for index in range(len(self.call.requests)):
            if self.is_chat:
                yield self.chunk(index, role="assistant", content="")
            elif self.call.echo:
                yield self.chunk(index, content=self.call.echo[index])

    def closing(
        self, index: int, rest: str, calls: tuple[ToolCall, ...], completion: Completion, tokens: Tokens = ()
    ) -> Iterator[dict]:
        """The last chunks of one choice; `tokens` are those whose log-probabilities were not shown."""
        if rest or tokens:
            yield self.chunk(index, content=rest, tokens=tokens)
        if calls:
            numbered = [{"index": i, **call} for i, call in enumerate(tool_calls(calls))]
            yield self.chunk(index, tool_calls=numbered)
        yield self.chunk(index, finish_reason(completion, calls))

    def tally(self, completions: Sequence[Completion], ticket: Ticket) -> dict[str, Any]:
        """The chunk that carries the usage and, beyond OpenAI's API, the speed."""
        usage = self.usage(completions)
        return self._chunk([], {"usage": usage, "timings": ticket.timings(usage["completion_tokens"])})

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> dict[str, Any]:
        name = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self._head, "object": name, "choices": choices, **more}

    def _choice(self, index: int, completion: Completion) -> dict[str, Any]:
        if not self.is_chat:
            text = "".join((*self.call.echo[index : index + 1], completion.text))
            tokens = (*completion.prompt_choices, *completion.tokens)
            logprobs = self._logprobs(index, tokens)
            return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason(completion, ())}
        content, calls = visible(completion, self.call.tools)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": list(tool_calls(calls))}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(index, completion.tokens),
            "finish_reason": finish_reason(completion, calls),
        }

    def _logprobs(self, index: int, tokens: Tokens) -> dict[str, Any] | None:
        """The tokens' log-probabilities in the form of the call; None where they were not asked for."""
        if self.call.requests[index].sampling.logprobs is None:
            return None
        return chat_logprobs(tokens) if self.is_chat else completion_logprobs(tokens)


def chat_logprobs(tokens: Tokens) -> dict[str, Any]:
    """As /v1/chat/completions has them."""

    def entry(choice: TokenChoice) -> dict[str, Any]:
        text = choice.data.decode(errors="replace")
        return {"token": text, "logprob": choice.logprob, "bytes": list(choice.data)}

    return {"content": [{**entry(t), "top_logprobs": [entry(o) for o in t.top]} for t in tokens], "refusal": None}


def completion_logprobs(tokens: Tokens) -> dict[str, Any]:
    """As /v1/completions has them; offsets count characters from the first of these tokens."""
    texts = [t.data.decode(errors="replace") for t in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [{o.data.decode(errors="replace"): o.logprob for o in t.top} for t in tokens],
        "text_offset": [sum(map(len, texts[:i])) for i in range(len(texts))],
    }


def finish_reason(completion: Completion, calls: tuple[ToolCall, ...]) -> str:
    """`tool_calls` exactly where there are some, else how the text ended."""
    if calls:
        return "tool_calls"
    return "length" if completion.finish_reason == "length" else "stop"


def tool_calls(calls: Sequence[ToolCall]) -> Iterator[dict[str, Any]]:
    """Calls as OpenAI writes them: arguments are JSON in a string.

    The id says the call's dialect, for which the protocol has no place: so a client that sends the call back, in the
    history of its next question, tells how the model wrote it (`dialect_of`).
    """
    for call in calls:
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        function = {"name": call.name, "arguments": arguments}
        yield {"id": f"call_{call.dialect}_{secrets.token_hex(12)}", "type": "function", "function": function}


def event(data: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def error_event(error: ApiError) -> bytes:
    """An error after the stream has begun: the status is out already, so the body of the error goes as an event."""
    return event(error.body())
