"""From messages to turns: which texts stand between the special tokens of Llama 3's format.

A `Turn` is one message as the format frames it. Its body is a row of texts with `<|python_tag|>` between each two:

    <|start_header_id|>{role}<|end_header_id|>\\n\\n{text}<|python_tag|>{text}…<|eot_id|>  or  <|eom_id|> if it waits

A `Style` says how a dialog becomes turns; `dialog.py` turns those into ids. There are two, since the released models
were shown to the world twice: `META` here, as the reference implementation has it, and `chat_template.HuggingFace`.
"""

from dataclasses import dataclass
from typing import Protocol

from puna.chat import Dialog, Message, Role
from puna.errors import PunaError
from puna.tokenizer.calls import TAGGED, write_calls


@dataclass(frozen=True)
class Turn:
    """One message: whose, the texts of its body, and whether it waits for a tool's answer."""

    role: Role
    segments: tuple[str, ...]
    waits: bool = False


class Style(Protocol):
    """How a dialog is told to a model."""

    def turns(self, dialog: Dialog) -> list[Turn]:
        """The turns of `dialog`, in order. Raises `PunaError` for what this style cannot say."""
        ...


@dataclass(frozen=True)
class Meta:
    """The reference implementation's style: each message is a turn, its text as given, and nothing is added."""

    def turns(self, dialog: Dialog) -> list[Turn]:
        """The turns of `dialog`. Raises `PunaError` for a call that cannot be written, or is not the assistant's."""
        return [Turn(message.role, segments(message), wants_tool(message)) for message in dialog]


META = Meta()


def wants_tool(message: Message) -> bool:
    """Whether `message` ends with `<|eom_id|>`: it calls a built-in tool or the code interpreter."""
    return any(call.dialect in TAGGED for call in message.tool_calls)


def segments(message: Message) -> tuple[str, ...]:
    """The texts of a message's body; a `<|python_tag|>` stands between each two."""
    if message.tool_calls and message.role != "assistant":
        raise PunaError(
            f"a message of the role {message.role!r} has tool calls", hint="only the assistant's messages call tools"
        )
    texts = [message.content]
    for text, tagged in write_calls(message.tool_calls):
        if texts == [""] and not tagged:
            texts = [text]  # at the very start of the body a call needs no tag
        else:
            texts.append(text)
    return tuple(texts)
