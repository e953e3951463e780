"""The dialog format of a model: how it is spoken to, how its answers are read, and what ends them.

    name          frame                       functions are described            and called
    meta          Llama 3's, as given         in JSON, in the system message     {"name": …, "parameters": …}
    huggingface   its chat template's         in JSON, in the first question     {"name": …, "parameters": …}
    function      as meta                     in a tag's words, system message   <function=f>{…}</function>
    pythonic      as meta                     in Python's words, system message  [f(a='x'), g()]
    llama3        as meta                     not at all: 3.0 knows no tools     -
    llama2        [INST] … [/INST]            not at all                         -
    raw           none: messages are joined   not at all                         -
    none          none: a dialog is refused   not at all                         -

Everything that talks to a model (engine, server, terminal) has one of these and asks it; nothing else knows which tokens
frame a turn. `FORMATS` are the names that a person can choose, `likely` says which one a checkpoint gets if nobody does.

Whatever the format, all five dialects of calls are read (`call_stream.py`) where it has tools, since models do not keep
to the one they were asked for. A call in the history is written in its own dialect.
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from puna.chat import Dialect, Dialog, Message, system
from puna.errors import ConfigError, DataError
from puna.tokenizer import dialog as llama3
from puna.tokenizer import llama2
from puna.tokenizer.bpe import SPECIALS, Tokenizer
from puna.tokenizer.call_stream import Event, MessageStream
from puna.tokenizer.chat_template import HuggingFace, Version
from puna.tokenizer.dialog import Rendered, TokenClass
from puna.tokenizer.export import CHAT_TEMPLATE
from puna.tokenizer.load import AnyTokenizer
from puna.tokenizer.sentencepiece import SentencePieceTokenizer
from puna.tokenizer.tools_prompt import system_prompt
from puna.tokenizer.turns import META, Style

FORMATS: dict[str, str] = {
    "meta": "Llama 3.1's, as its reference implementation writes it; functions are called in JSON",
    "huggingface": "Llama 3.1's, as Hugging Face's chat template writes it, dates included",
    "function": "Llama 3.1's, with calls as <function=NAME>{...}</function>",
    "pythonic": "Llama 3.2's and 3.3's, with calls as [f(a='x'), g()]",
    "llama3": "Llama 3.0's, without tools",
    "llama2": "Llama 2's, [INST] and [/INST], without tools",
    "raw": "none: what is said is continued as a text, for base models",
}
NONE = "none"  # of a base model; not to be chosen, since nothing can be said in it


class Reader(Protocol):
    """An answer as a client is to see it, read while it is written."""

    def feed(self, text: str) -> list[Event]: ...

    def finish(self) -> list[Event]: ...


class DialogFormat(Protocol):
    """How one model is spoken to. `render`, `offer` and the like raise `PunaError` for what the format cannot say."""

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> AnyTokenizer: ...

    @property
    def dialect(self) -> Dialect | None:
        """How functions on offer are called; None if the format has no tools."""
        ...

    @property
    def continues(self) -> bool:
        """Whether an answer goes on with the prompt's text, so that the space it may begin with is its own."""
        ...

    def render(self, dialog: Dialog, *, answer: bool = True) -> Rendered:
        """`dialog` as ids and classes; with `answer`, up to where the assistant's next message begins."""
        ...

    def parse(self, ids: Sequence[int]) -> Message:
        """The assistant's message in `ids`, which follow a prompt; reading stops at the first stop id."""
        ...

    def parse_text(self, text: str) -> Message:
        """The same from a text in which special tokens are spelled out."""
        ...

    def reader(self, names: Collection[str] | None) -> Reader:
        """What reads an answer piece by piece; `names` are the functions on offer."""
        ...

    def offer(
        self,
        dialog: Dialog,
        functions: Sequence[Mapping[str, Any]],
        *,
        builtins: Sequence[str] = (),
        code_interpreter: bool = False,
    ) -> Dialog:
        """`dialog` with tools described where the format does so; without any, `dialog`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Llama3Format:
    """Llama 3's frame, in one of its styles."""

    tokenizer: Tokenizer
    name: str = "meta"
    dialect: Dialect = "json"
    style: Style = META
    continues: bool = False

    def render(self, dialog: Dialog, *, answer: bool = True) -> Rendered:
        return llama3.render(self.tokenizer, dialog, answer=answer, style=self.style)

    def parse(self, ids: Sequence[int]) -> Message:
        return llama3.parse(self.tokenizer, ids)[0]

    def parse_text(self, text: str) -> Message:
        return llama3.parse_text(text)

    def reader(self, names: Collection[str] | None) -> Reader:
        return MessageStream(names=names, spelled=True)

    def offer(
        self,
        dialog: Dialog,
        functions: Sequence[Mapping[str, Any]],
        *,
        builtins: Sequence[str] = (),
        code_interpreter: bool = False,
    ) -> Dialog:
        if not (functions or builtins or code_interpreter):
            return dialog
        tools = {"functions": functions, "builtins": builtins, "code_interpreter": code_interpreter}
        if isinstance(self.style, HuggingFace):
            return self.style.offered(dialog, **tools)
        text, rest = (dialog[0].content, dialog[1:]) if dialog and dialog[0].role == "system" else ("", dialog)
        return (system(system_prompt(text, dialect=self.dialect, **tools)), *rest)


class _Toolless:
    """What the formats without tools have in common: an answer is text, as it stands."""

    name: str
    tokenizer: AnyTokenizer
    dialect: Dialect | None = None

    def parse(self, ids: Sequence[int]) -> Message:
        """The assistant's message in `ids`, up to the first stop id."""
        end = next((n for n, id in enumerate(ids) if id in self.tokenizer.stop_ids), len(ids))
        return self.parse_text(self.tokenizer.decode(ids[:end]))

    def parse_text(self, text: str) -> Message:
        """The same from text."""
        return Message(role="assistant", content=text)

    def reader(self, names: Collection[str] | None) -> Reader:
        """Nothing is kept back: no text is a call."""
        return _Plain()

    def offer(
        self,
        dialog: Dialog,
        functions: Sequence[Mapping[str, Any]],
        *,
        builtins: Sequence[str] = (),
        code_interpreter: bool = False,
    ) -> Dialog:
        """`dialog`; refused if there are tools."""
        if functions or builtins or code_interpreter:
            raise _no_tools(self.name)
        return dialog


class _Plain:
    def feed(self, text: str) -> list[Event]:
        return [text] if text else []

    def finish(self) -> list[Event]:
        return []


@dataclass(frozen=True, kw_only=True)
class PlainLlama3Format(_Toolless):
    """Llama 3.0's: the frame, and nothing that an answer says is a call."""

    tokenizer: Tokenizer
    name: str = "llama3"
    style: Style = META
    continues: bool = False

    def render(self, dialog: Dialog, *, answer: bool = True) -> Rendered:
        tools = next((m for m in dialog if m.tool_calls or m.role == "ipython"), None)
        if tools is not None:
            raise _no_tools(self.name)
        return llama3.render(self.tokenizer, dialog, answer=answer, style=self.style)


@dataclass(frozen=True, kw_only=True)
class Llama2Format(_Toolless):
    """Llama 2's chat format."""

    tokenizer: AnyTokenizer
    name: str = "llama2"
    continues: bool = False

    def render(self, dialog: Dialog, *, answer: bool = True) -> Rendered:
        return llama2.render(self.tokenizer, dialog, answer=answer)


@dataclass(frozen=True, kw_only=True)
class RawFormat(_Toolless):
    """No format at all: the messages are one text, each question on a line of its own, and the answer goes on with it."""

    tokenizer: AnyTokenizer
    name: str = "raw"
    continues: bool = True

    def render(self, dialog: Dialog, *, answer: bool = True) -> Rendered:
        texts: list[tuple[str, TokenClass]] = []
        for number, message in enumerate(dialog):
            if message.tool_calls or message.role == "ipython":
                raise _no_tools(self.name)
            ours = message.role == "assistant"
            gap = "\n" if number and not ours else ""
            texts.append((gap + message.content, TokenClass.BODY if ours else TokenClass.CONTEXT))
        ids, classes = [self.tokenizer.bos], [TokenClass.CONTEXT]
        for text, kind in texts:
            part = self.tokenizer.encode(text) if len(ids) == 1 else self.tokenizer.encode_more(text)
            ids += part
            classes += [kind] * len(part)
        return Rendered(ids, [int(c) for c in classes])


@dataclass(frozen=True, kw_only=True)
class NoFormat(_Toolless):
    """A base model that was never taught to converse; it completes texts, and a dialog is refused."""

    tokenizer: AnyTokenizer
    name: str = NONE
    continues: bool = True

    def render(self, dialog: Dialog, *, answer: bool = True) -> Rendered:
        raise DataError(
            "this is a base model: it has no dialog format and only continues texts",
            hint="--dialog raw continues what you type; --dialog NAME uses the format it was tuned for, if it was",
        )


def _no_tools(name: str) -> DataError:
    return DataError(
        f"the dialog format {name!r} has no tools",
        hint="use a model of Llama 3.1 or later, or choose another format with --dialog, if the model was tuned for it",
    )


@dataclass(frozen=True, kw_only=True)
class Signs:
    """What a checkpoint says about its format, beside its vocabulary; empty or 0 where it says nothing."""

    context: int = 0  # tokens
    outputs: int = 0  # of the model: the vocabulary with its padding
    rope_factor: float = 0.0  # 8 in Llama 3.1 and 3.3, 32 in 3.2
    template: str = ""  # the chat template's text
    title: str = ""  # what it calls itself


def dialog_format(tokenizer: AnyTokenizer, name: str = "", signs: Signs = Signs()) -> DialogFormat:
    """The format `name` for a model with this tokenizer, or the likely one if `name` is empty.

    Raises `ConfigError` for a name that is none, and for a format that the vocabulary has no tokens for.
    """
    name = name or likely(tokenizer, signs)
    if name not in (*FORMATS, NONE):
        near = difflib.get_close_matches(name, FORMATS, n=1)
        start = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"{name!r} is not a dialog format", hint=f"{start}they are {', '.join(FORMATS)}")
    for plain in (Llama2Format, RawFormat, NoFormat):
        if name == plain.name:
            return plain(tokenizer=tokenizer)
    if not isinstance(tokenizer, Tokenizer):
        raise ConfigError(
            f"the dialog format {name!r} needs Llama 3's special tokens, and this vocabulary is Llama 1's or 2's",
            hint="use llama2 or raw",
        )
    if name == "huggingface":
        style = HuggingFace(version=_version(signs), as_written=True)
        plain = style.version == "3"
        return (PlainLlama3Format if plain else Llama3Format)(tokenizer=tokenizer, name=name, style=style)
    if name == "llama3":
        return PlainLlama3Format(tokenizer=tokenizer)
    dialects: dict[str, Dialect] = {"meta": "json", "function": "function", "pythonic": "pythonic"}
    return Llama3Format(tokenizer=tokenizer, name=name, dialect=dialects[name])


def likely(tokenizer: AnyTokenizer, signs: Signs = Signs()) -> str:
    """The name of the format that a model with this tokenizer was most likely tuned for; "none" for a base model.

    A chat template decides where it is known. Else: SentencePiece with Llama 1's context is a base model, with more it
    is Llama 2. Among Llama 3s, the released shape without stretched positions is 3.0, stretched 32 times it is 3.2.
    Base and chat models of one release look alike, and get the chat format.
    """
    template = "" if signs.template == CHAT_TEMPLATE else signs.template  # ours is written for any model
    if isinstance(tokenizer, SentencePieceTokenizer):
        if template:
            return "llama2" if "[INST]" in template else NONE
        return NONE if 0 < signs.context <= _LLAMA_1_CONTEXT else "llama2"
    if "Cutting Knowledge Date" in template:
        return "huggingface"
    if template and "<|start_header_id|>" not in template:
        return NONE
    released = signs.outputs == _LLAMA_3_OUTPUTS
    if _python_tag_absent(tokenizer) or (released and not signs.rope_factor):
        return "llama3"
    newer = signs.rope_factor == _LLAMA_3_2_FACTOR or any(number in signs.title for number in ("3.2", "3.3"))
    return "pythonic" if released and newer else "meta"


_LLAMA_1_CONTEXT = 2048
_LLAMA_3_OUTPUTS = 128_256
_LLAMA_3_2_FACTOR = 32.0


def _python_tag_absent(tokenizer: Tokenizer) -> bool:
    place = SPECIALS.index("<|python_tag|>")
    return tokenizer.special_names[place] != "<|python_tag|>"


def _version(signs: Signs) -> Version:
    """Whose template Hugging Face's is: told by its text, or by the shape where there is none."""
    if signs.template and "Cutting Knowledge Date" not in signs.template:
        return "3"
    if signs.template:
        return "3.1" if "builtin_tools" in signs.template else "3.2"
    return "3.2" if signs.rope_factor == _LLAMA_3_2_FACTOR else "3.1"
