"""Llama 3's format as Hugging Face's chat template writes it, for models and prompts that expect that form.

The template of Llama 3.1 that most tools use differs from the reference implementation in seven points:

                         Meta (`turns.META`)            the template
    no system message    no system header               a system header with two dates, always
    functions            in a text of the caller's      before the text of the first user message, other words
    a JSON call          as the model wrote it          {"name": …, "parameters": …}
    texts                as given                       white space around them goes
    a tool's result      as given                       as a JSON string, in quotes
    calls in a message   any number                     one; text beside it is left out
    <|eom_id|>           after a tagged call            after every call, if there are built-in tools; else never

so its prompts have other tokens:

    <|begin_of_text|><|start_header_id|>system<|end_header_id|>\\n\\nEnvironment: ipython\\nTools: brave_search\\n\\n
    Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n{system}<|eot_id|>…

The template decides by a function's name how a call is written; here the call's own dialect does, so that history has
the tokens that the model drew. The two agree wherever the name tells the dialect. In two places the template's tokens
are not the model's, and ours are: quotes in a built-in tool's argument are escaped, and a program for the code
interpreter stands as it is. Special tokens' names in texts stay texts, as everywhere here.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from puna.chat import Dialog, Message, system, user
from puna.config import require
from puna.errors import PunaError
from puna.tokenizer.calls import BUILTIN_TOOLS, CODE_INTERPRETER
from puna.tokenizer.turns import Turn, segments, wants_tool

Version = Literal["3", "3.1", "3.2", "3.3"]

_FORM = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)
_FOR_USER = (
    "Given the following functions, please respond with a JSON for a function call "
    "with its proper arguments that best answers the given prompt.\n\n"
)
_FOR_SYSTEM = (
    "You have access to the following functions. To call a function, please respond with JSON for a function call."
)

_OPENINGS = ("Environment: ipython\nTools: ", "Environment: ipython\n", "Cutting Knowledge Date: ")


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """The template's style, a `turns.Style`, with what a template is told beside the messages.

    `version` is the model's: 3 has neither dates nor tools, 3.2 no built-in ones. `functions` are definitions, each
    `{"name": …, "description": …, "parameters": JSON schema}`; `builtins` names built-in tools, `code_interpreter` among
    them. None differs from an empty tuple, as it does for the template. `today` is a text, since tokens must not depend
    on the clock: 3.2's template would put the day there on which it runs, like `time.strftime("%d %b %Y")`.
    Raises `ConfigError` for what the version's template does not know.

    `as_written` departs from the template where it would change or refuse what a model said, or what `offered` made.
    """

    version: Version = "3.1"
    functions: tuple[Mapping[str, Any], ...] | None = None
    builtins: tuple[str, ...] | None = None
    functions_in_user_message: bool = True  # else in the system message
    as_written: bool = False  # history as models wrote it: several calls in a message, and the text beside them
    today: str = "26 Jul 2024"
    knowledge_date: str = "December 2023"

    def __post_init__(self) -> None:
        known = (*BUILTIN_TOOLS, CODE_INTERPRETER)
        require(self.version in ("3", "3.1", "3.2", "3.3"), f"version={self.version!r} must be 3, 3.1, 3.2 or 3.3")
        if self.version in ("3", "3.2"):
            require(self.builtins is None, f"the template of Llama {self.version} knows no built-in tools")
        if self.version == "3":
            require(self.functions is None, "the template of Llama 3 knows no functions")
        for name in self.builtins or ():
            require(name in known, f"{name!r} is not a built-in tool", hint=f"they are {', '.join(known)}")

    def turns(self, dialog: Dialog) -> list[Turn]:
        """The turns of `dialog`. Raises `PunaError` where the template refuses it."""
        turns = []
        if self.version != "3":
            text, dialog = _apart(dialog)
            opened = self.as_written and text.startswith(_OPENINGS)
            turns.append(Turn("system", (text if opened else self._system(text.strip()),)))
            if self.functions is not None and self.functions_in_user_message:
                turns.append(self._first_question(dialog))
                dialog = dialog[1:]
        waits = self.builtins is not None or bool(turns and turns[0].segments[0].startswith(_OPENINGS[0]))
        return turns + [self._turn(message, waits) for message in dialog]

    def offered(
        self,
        dialog: Dialog,
        *,
        functions: Sequence[Mapping[str, Any]],
        builtins: Sequence[str] = (),
        code_interpreter: bool = False,
    ) -> Dialog:
        """`dialog` with the tools written into it, where the template would put them.

        A style that is `as_written` gives it the template's tokens: a system message that opens as the template's does
        gets no second opening. Where no question comes first, functions stand in the system message.
        Raises `ConfigError` for tools that the version's template does not know.
        """
        named = (*builtins, *([CODE_INTERPRETER] if code_interpreter else []))
        text, rest = _apart(dialog)
        asked = bool(rest) and rest[0].role == "user" and self.functions_in_user_message
        style = replace(
            self,
            functions=tuple(functions) or None,
            builtins=named or None,
            functions_in_user_message=asked,
        )
        opening = system(style._system(text.strip()))
        if not (functions and asked):
            return (opening, *rest)
        return (opening, user(style._first_question(rest).segments[0]), *rest[1:])

    def _system(self, text: str) -> str:
        lines = []
        if self.builtins is not None or self.functions is not None:
            lines.append("Environment: ipython\n")
        if self.builtins is not None:
            lines.append(f"Tools: {', '.join(name for name in self.builtins if name != CODE_INTERPRETER)}\n\n")
        lines.append(f"Cutting Knowledge Date: {self.knowledge_date}\nToday Date: {self.today}\n\n")
        if self.functions is not None and not self.functions_in_user_message:
            lines.append(_FOR_SYSTEM + _FORM + self._definitions())
        return "".join(lines) + text

    def _first_question(self, dialog: Dialog) -> Turn:
        if not dialog or dialog[0].role != "user":
            raise PunaError(
                "the functions have no user message to stand in, at the start of the dialog",
                hint="begin with a user message, or set functions_in_user_message=False",
            )
        return Turn("user", (_FOR_USER + _FORM + self._definitions() + dialog[0].content.strip(),))

    def _definitions(self) -> str:
        wrapped = ({"type": "function", "function": function} for function in self.functions or ())
        return "".join(json.dumps(entry, indent=4, ensure_ascii=False) + "\n\n" for entry in wrapped)

    def _turn(self, message: Message, waits: bool) -> Turn:
        if self.version == "3" and (message.tool_calls or message.role == "ipython"):
            raise PunaError("Llama 3's template knows no tools", hint="3.1 and later do; or use the style META")
        if len(message.tool_calls) > 1 and not self.as_written:
            raise PunaError(
                f"a message has {len(message.tool_calls)} tool calls, and the chat template knows one at a time",
                hint="use the style META, or a message for each call",
            )
        if message.tool_calls:
            alone = Message(role=message.role, tool_calls=message.tool_calls)
            return Turn(message.role, segments(message if self.as_written else alone), waits or wants_tool(message))
        if message.role == "ipython":
            return Turn(message.role, (json.dumps(message.content, ensure_ascii=False),))
        return Turn(message.role, (message.content.strip(),))


def _apart(dialog: Dialog) -> tuple[str, Dialog]:
    """The system message's text, and what follows it."""
    return (dialog[0].content, dialog[1:]) if dialog and dialog[0].role == "system" else ("", dialog)
