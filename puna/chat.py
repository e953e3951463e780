"""The nouns of a conversation, and the one interface to something that answers.

Curation, tools, safety, evaluation and post-training see a model only as a `Generator`: our engine, a remote server
that speaks OpenAI's protocol, or a scripted stub in a test are all one to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Role = Literal["system", "user", "assistant", "ipython"]
Dialect = Literal["json", "builtin", "python", "function", "pythonic"]


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """One call that an assistant makes.

    `dialect` is how it is written: `json` is Llama 3.1's zero-shot form `{"name": …, "parameters": …}`, `builtin` is
    `brave_search.call(query="…")`, `python` is source for the code interpreter (then `name` is `code_interpreter` and
    `arguments` is `{"code": …}`), `function` is `<function=NAME>{…}</function>`, and `pythonic` is Llama 3.2's list
    `[f(a='x'), g()]`.
    """

    name: str
    arguments: dict[str, Any]
    dialect: Dialect = "json"


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message. `ipython` is the role of a tool's result, as in Llama 3.1.

    An assistant message that calls a tool has `tool_calls`; `content` then is any text beside the call.
    """

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


Dialog = tuple[Message, ...]


def system(content: str) -> Message:
    return Message(role="system", content=content)


def user(content: str) -> Message:
    return Message(role="user", content=content)


def assistant(content: str = "", *calls: ToolCall) -> Message:
    return Message(role="assistant", content=content, tool_calls=calls)


def tool_result(content: str) -> Message:
    return Message(role="ipython", content=content)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; a `seed` makes a request repeatable whatever runs beside it."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0  # keep tokens with at least this share of the likeliest token's probability
    repetition_penalty: float = 1.0  # divides the logits of tokens that the prompt or the answer has
    presence_penalty: float = 0.0  # taken from the logit of each token that the answer has
    frequency_penalty: float = 0.0  # the same, once for each time that it has it
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    seed: int = 0
    max_tokens: int = 256
    min_tokens: int = 0  # no end token is drawn before
    ignore_end: bool = False  # no end token is drawn at all: for measurements
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # how many likeliest tokens to report beside each drawn one; None reports nothing
    prompt_logprobs: int | None = None  # the same for the prompt's tokens


@dataclass(frozen=True, kw_only=True)
class Structure:
    """A form that an answer must have: `text` is a JSON schema, a regular expression, or a grammar in Lark's notation."""

    kind: Literal["json", "regex", "grammar"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """Something to be answered: a dialog (rendered in the model's chat format) or a raw `prompt` to continue.

    Several answers to one prompt are several requests with seeds of their own; the prompt is read once for all.
    Only requests of one `owner` share what was read: others cannot find out by the time it takes what somebody asked.
    Higher `priority` goes first. `adapter` names a LoRA adapter that the generator has loaded.
    """

    dialog: Dialog = ()
    prompt: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    structure: Structure | None = None
    owner: str = ""
    priority: int = 0
    adapter: str | None = None


@dataclass(frozen=True, kw_only=True)
class TokenChoice:
    """A token that was or could have been: its text in bytes (it may be part of a character), log p in nats.

    `top` are the likeliest tokens in its place, likeliest first, where the request asked for them.
    """

    token: int
    data: bytes
    logprob: float
    top: tuple["TokenChoice", ...] = ()


@dataclass(frozen=True, kw_only=True)
class Completion:
    """An answer: its `message` (tool calls parsed), its raw `text`, and why it ended.

    `finish_reason`: `stop` (the model ended it, or a stop string did), `length` (max_tokens or the context was full),
    `tool_calls` (it asks for a tool). `logprob` is the sum over the drawn tokens, in nats, under the model at
    temperature 1. `tokens` and `prompt_choices` have the single ones where the request asked for them: the tokens of
    `text` (an end token and a stop string are no part of it), and the prompt's tokens after the first.
    `cached_tokens` of the prompt were not read because an earlier request of the owner had left them.
    """

    message: Message
    text: str
    finish_reason: Literal["stop", "length", "tool_calls"]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprob: float = 0.0
    tokens: tuple[TokenChoice, ...] = ()
    prompt_choices: tuple[TokenChoice, ...] = ()
    cached_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A text whose likelihood is asked for, after a raw `context` or, with a dialog, as the assistant's next message."""

    text: str
    context: str = ""
    dialog: Dialog = ()


class Generator(Protocol):
    """Something that answers."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order. Requests may be served together; results do not depend on it."""
        ...

    def score(self, continuations: Sequence[Continuation]) -> list[float]:
        """The log-likelihood of each continuation's text, in nats, in order."""
        ...


def dialog_to_json(dialog: Dialog) -> list[dict[str, Any]]:
    """A dialog as plain JSON values; an absent list of calls is left out."""
    return [
        {"role": m.role, "content": m.content}
        | ({"tool_calls": [vars(call) for call in m.tool_calls]} if m.tool_calls else {})
        for m in dialog
    ]


def dialog_from_json(data: Sequence[dict[str, Any]]) -> Dialog:
    """The dialog that `dialog_to_json` wrote. Raises KeyError or TypeError where it is not one."""
    return tuple(
        Message(
            role=m["role"],
            content=m["content"],
            tool_calls=tuple(ToolCall(**call) for call in m.get("tool_calls", ())),
        )
        for m in data
    )
