"""Conversations as token ids in Llama 2's chat format.

    <s>[INST] <<SYS>>\\n{system}\\n<</SYS>>\\n\\n{user} [/INST] {answer} </s><s>[INST] {user} [/INST] {answer} </s>…

A question and its answer are one sequence, between the two special tokens that there are. The system message stands
inside the first question. Questions and answers alternate, white space around each goes, and no tool has a place.

The text between `<s>` and `</s>` is encoded in one piece. So `</s>` in a user's text stays text, and nobody can end a
sequence or begin one by typing. The markers are another matter: `[INST]`, `[/INST]` and `<<SYS>>` have no tokens of
their own, so that those in a user's text read exactly as those of the format. The reference implementation refuses such
a text. Here it is encoded as it stands, as Hugging Face's template does, since code and articles do mention the
markers: whoever mixes trusted and untrusted text in one question must not count on them to keep the two apart.
"""

from collections.abc import Sequence
from typing import Protocol

from puna.chat import Dialog, Message
from puna.errors import DataError
from puna.tokenizer.dialog import Rendered, TokenClass


class Llama2Tokenizer(Protocol):
    """What the format needs of a tokenizer: `encode` gives no special ids, and begins each text as a new word."""

    bos: int
    eos: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def render(tokenizer: Llama2Tokenizer, dialog: Dialog, *, answer: bool) -> Rendered:
    """`dialog` as ids and classes, as `dialog.render` gives them; with `answer` it must end with a question.

    Of an answer, the text (and the space that ends it) is BODY and `</s>` is END; no token is a HEADER. Raises `DataError`
    for a dialog that the format cannot say.
    """
    _check(dialog, answer)
    ids: list[int] = []
    classes: list[TokenClass] = []
    for question, reply in _exchanges(dialog):
        asked = tokenizer.encode(question)
        whole = tokenizer.encode(f"{question} {reply} ") if reply is not None else asked
        context = 1 + _common(asked, whole)  # begin-of-sequence, and what the answer does not change
        end = [] if reply is None else [tokenizer.eos]
        ids += [tokenizer.bos, *whole, *end]
        classes += [TokenClass.CONTEXT] * context + [TokenClass.BODY] * (1 + len(whole) - context)
        classes += [TokenClass.END] * len(end)
    return Rendered(ids, [int(c) for c in classes])


def parse(tokenizer: Llama2Tokenizer, ids: Sequence[int]) -> Message:
    """The assistant's message in `ids`, which follow a question; reading stops at `</s>`."""
    body = list(ids)
    if tokenizer.eos in body:
        body = body[: body.index(tokenizer.eos)]
    return Message(role="assistant", content=tokenizer.decode(body).strip())


def _check(dialog: Dialog, answer: bool) -> None:
    turns = dialog[1:] if dialog and dialog[0].role == "system" else dialog
    for number, message in enumerate(turns):
        due = ("user", "assistant")[number % 2]
        if message.role != due:
            raise DataError(
                f"message {number + 1} after the system message is of the role {message.role!r}, not {due!r}",
                hint="Llama 2's format alternates user and assistant, has one system message, the first, and no tools",
            )
        if message.tool_calls:
            raise DataError("Llama 2's format has no tool calls", hint="use a model of Llama 3.1 or later")
    if answer and (not turns or turns[-1].role != "user"):
        raise DataError("there is no question to answer", hint="end the dialog with a user message")


def _exchanges(dialog: Dialog) -> list[tuple[str, str | None]]:
    """Each question with its markers, and the answer to it; None where it is still to come."""
    opening = ""
    if dialog and dialog[0].role == "system":
        opening, dialog = f"<<SYS>>\n{dialog[0].content}\n<</SYS>>\n\n", dialog[1:]
    found = []
    for at in range(0, len(dialog), 2):
        question = f"[INST] {(opening + dialog[at].content).strip()} [/INST]"
        found.append((question, dialog[at + 1].content.strip() if at + 1 < len(dialog) else None))
        opening = ""
    return found


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids both begin with."""
    return next((n for n, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))
