"""Conversations as token ids, in Llama 3.1's format, with the class of each token.

    <|begin_of_text|>
    <|start_header_id|>system<|end_header_id|>\\n\\n{text}<|eot_id|>
    <|start_header_id|>user<|end_header_id|>\\n\\n{text}<|eot_id|>
    <|start_header_id|>assistant<|end_header_id|>\\n\\n{text}<|eot_id|>

in one line, without the breaks shown here. A tool's result has the role `ipython`. The assistant's body takes one of
these forms:

    {text}<|eot_id|>
    {"name": "f", "parameters": {…}}<|eot_id|>
    <function=f>{…}</function><|eot_id|>
    [f(a='x'), g()]<|eot_id|>
    [text]<|python_tag|>brave_search.call(query="…")<|eom_id|>
    [text]<|python_tag|>{source}<|eom_id|>

`<|eom_id|>` ends a message after which the assistant goes on, once the tool has answered. A call of the other kinds
that comes after text or after a tagged call gets a `<|python_tag|>` too, since nothing else would tell where it begins.

What texts the turns hold depends on the `Style`: Meta's own, in which messages stand as given and nothing is added, or
Hugging Face's (`chat_template.py`). Llama 2's format is another one (`llama2.py`).

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
from puna.tokenizer.bpe import Tokenizer
from puna.tokenizer.call_stream import read
from puna.tokenizer.calls import PYTHON_TAG
from puna.tokenizer.turns import META, Style, Turn


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


def render(tokenizer: Tokenizer, dialog: Dialog, *, answer: bool, style: Style = META) -> Rendered:
    """`dialog` as ids; with `answer`, followed by the header of the assistant's next message.

    Raises `PunaError` for a tool call that cannot be written, or that is not the assistant's, and for what else the
    style cannot say.
    """
    ids, classes = [tokenizer.bos], [TokenClass.CONTEXT]
    for turn in style.turns(dialog):
        ours = turn.role == "assistant"
        parts = (
            (TokenClass.HEADER, _header(tokenizer, turn.role)),
            (TokenClass.BODY, _body(tokenizer, turn)),
            (TokenClass.END, [tokenizer.eom if turn.waits else tokenizer.eot]),
        )
        for kind, part in parts:
            ids += part
            classes += [kind if ours else TokenClass.CONTEXT] * len(part)
    if answer:
        header = _header(tokenizer, "assistant")
        ids += header
        classes += [TokenClass.HEADER] * len(header)
    return Rendered(ids, [int(c) for c in classes])


def _header(tokenizer: Tokenizer, role: str) -> list[int]:
    return [tokenizer.start_header, *tokenizer.encode(role), tokenizer.end_header, *tokenizer.encode("\n\n")]


def _body(tokenizer: Tokenizer, turn: Turn) -> list[int]:
    ids: list[int] = []
    for number, text in enumerate(turn.segments):
        if number:
            ids.append(tokenizer.python_tag)
        ids += tokenizer.encode(text)
    return ids


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
    content, calls = read(segments)
    return Message(role="assistant", content=content, tool_calls=calls)
