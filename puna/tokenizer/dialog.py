"""Conversations as token ids, in Llama 3.1's format, with the class of each token.

    <|begin_of_text|>
    <|start_header_id|>system<|end_header_id|>\\n\\n{text}<|eot_id|>
    <|start_header_id|>user<|end_header_id|>\\n\\n{text}<|eot_id|>
    <|start_header_id|>assistant<|end_header_id|>\\n\\n{text}<|eot_id|>

in one line, without the breaks shown here. A tool's result has the role `ipython`. Where no system message is given
there is no system header. The assistant's body takes one of these forms:

    {text}<|eot_id|>
    {"name": "f", "parameters": {…}}<|eot_id|>
    [text]<|python_tag|>brave_search.call(query="…")<|eom_id|>
    [text]<|python_tag|>{source}<|eom_id|>

`<|eom_id|>` ends a message after which the assistant goes on, once the tool has answered. A JSON call that comes after
text or after a tagged call gets a `<|python_tag|>` too, since nothing else would tell where it begins.

Every text between two special tokens is encoded by itself. So no text can produce a special token or change its
neighbours' ids, the prompt up to the answer does not depend on the answer, and a message parsed from what the model
wrote is rendered to the ids it wrote (where those were the tokenizer's own choice and the calls well-formed). The
reference implementation drops `<|python_tag|>` when it renders a built-in call again; here history stays as it was.

Training needs to know whose token each is. The classes are exact because they are given while rendering, not found
afterwards: SFT learns BODY and END, DPO's contrast leaves out END.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from puna.chat import Dialog, Message
from puna.errors import PunaError
from puna.tokenizer.bpe import Tokenizer
from puna.tokenizer.calls import JOINT, parse_json_calls, parse_tagged, write_call

PYTHON_TAG = "<|python_tag|>"


class TokenClass(IntEnum):
    """Whose token it is."""

    CONTEXT = 0  # begin_of_text, and everything of other roles
    HEADER = 1  # the header of an assistant's message
    BODY = 2  # its text and calls, `<|python_tag|>` included
    END = 3  # its `<|eot_id|>` or `<|eom_id|>`


@dataclass(frozen=True)
class Rendered:
    """A conversation as `ids`, and for each id its `TokenClass`."""

    ids: list[int]
    classes: list[int]


def render(tokenizer: Tokenizer, dialog: Dialog, *, answer: bool) -> Rendered:
    """`dialog` as ids; with `answer`, followed by the header of the assistant's next message.

    Raises `PunaError` for a tool call that cannot be written, or that is not the assistant's.
    """
    ids, classes = [tokenizer.bos], [TokenClass.CONTEXT]
    for message in dialog:
        ours = message.role == "assistant"
        parts = (
            (TokenClass.HEADER, _header(tokenizer, message.role)),
            (TokenClass.BODY, _body(tokenizer, message)),
            (TokenClass.END, [tokenizer.eom if wants_tool(message) else tokenizer.eot]),
        )
        for kind, part in parts:
            ids += part
            classes += [kind if ours else TokenClass.CONTEXT] * len(part)
    if answer:
        header = _header(tokenizer, "assistant")
        ids += header
        classes += [TokenClass.HEADER] * len(header)
    return Rendered(ids, [int(c) for c in classes])


def wants_tool(message: Message) -> bool:
    """Whether `message` ends with `<|eom_id|>`: it calls a built-in tool or the code interpreter."""
    return any(call.dialect != "json" for call in message.tool_calls)


def _header(tokenizer: Tokenizer, role: str) -> list[int]:
    return [tokenizer.start_header, *tokenizer.encode(role), tokenizer.end_header, *tokenizer.encode("\n\n")]


def _body(tokenizer: Tokenizer, message: Message) -> list[int]:
    ids: list[int] = []
    for number, text in enumerate(_segments(message)):
        if number:
            ids.append(tokenizer.python_tag)
        ids += tokenizer.encode(text)
    return ids


def _segments(message: Message) -> list[str]:
    """The texts of a message's body; a `<|python_tag|>` stands between each two."""
    if message.tool_calls and message.role != "assistant":
        raise PunaError(
            f"a message of the role {message.role!r} has tool calls", hint="only the assistant's messages call tools"
        )
    segments = [message.content]
    json_may_follow = not message.content  # untagged, at the very start or joined to a JSON call
    joint = ""
    for call in message.tool_calls:
        text = write_call(call)
        if call.dialect == "json" and json_may_follow:
            segments[-1] += joint + text
        else:
            segments.append(text)
        json_may_follow = call.dialect == "json"
        joint = JOINT
    return segments


def parse(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[Message, bool]:
    """The assistant's message in `ids`, which follow its header, and whether `<|eom_id|>` ended it.

    Reading stops at the first stop id; a message that was cut short has none. Other special tokens in the body become
    their names as text.
    """
    segments: list[list[int]] = [[]]
    for id in ids:
        if id in tokenizer.stop_ids:
            return _message([tokenizer.decode(s) for s in segments]), id == tokenizer.eom
        if id == tokenizer.python_tag:
            segments.append([])
        else:
            segments[-1].append(id)
    return _message([tokenizer.decode(s) for s in segments]), False


def parse_text(text: str) -> Message:
    """The same from text in which `<|python_tag|>` is spelled out, as servers of other makes return it."""
    return _message(text.split(PYTHON_TAG))


def _message(segments: list[str]) -> Message:
    """An assistant's message from the texts of its body."""
    calls, content = parse_json_calls(segments[0])
    if calls:
        content = content.strip()
    for segment in segments[1:]:
        more, rest = parse_tagged(segment)
        calls += more
        content += rest.strip()
    return Message(role="assistant", content=content, tool_calls=calls)
