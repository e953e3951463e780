"""How a conversation tells the model which tools there are, in Llama 3.1's words.

The system message opens with the environment, and each part is left out where it has nothing to say:

    Environment: ipython                      any built-in tool, or the code interpreter alone
    Tools: brave_search, wolfram_alpha        the built-in tools; the interpreter is never listed
    Cutting Knowledge Date: December 2023
    Today Date: 21 September 2024

    You are a helpful assistant.

Functions of the user's own are described in JSON, between two fixed sentences that the released models were trained
with; the block stands in the system message or, as in the format's documentation, in a user message before the question.
A call of one is then a JSON call (`calls.py`).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from puna.errors import PunaError
from puna.tokenizer.calls import BUILTIN_TOOLS

_BEFORE = (
    "Answer the user's question by making use of the following functions if needed.\n"
    "If none of the function can be used, please say so.\n"
    "Here is a list of functions in JSON format:\n"
)
_AFTER = "\n\nReturn function calls in JSON format."


def system_prompt(
    text: str = "",
    *,
    builtins: Sequence[str] = (),
    code_interpreter: bool = False,
    functions: Sequence[Mapping[str, Any]] = (),
    knowledge_date: str = "",
    today: str = "",
) -> str:
    """The text of a system message: environment, dates, functions, then `text`.

    `builtins` names built-in tools, `functions` are definitions as `functions_prompt` takes them. Dates are written as
    given (`"December 2023"`, `"21 September 2024"`). Raises `PunaError` for a built-in tool that does not exist.
    """
    for name in builtins:
        if name not in BUILTIN_TOOLS:
            raise PunaError(f"{name!r} is not a built-in tool", hint=f"they are {', '.join(BUILTIN_TOOLS)}")
    lines = ["Environment: ipython"] if builtins or code_interpreter else []
    if builtins:
        lines.append(f"Tools: {', '.join(builtins)}")
    if knowledge_date:
        lines.append(f"Cutting Knowledge Date: {knowledge_date}")
    if today:
        lines.append(f"Today Date: {today}")
    blocks = ["\n".join(lines), functions_prompt(functions) if functions else "", text]
    return "\n\n".join(block for block in blocks if block)


def functions_prompt(functions: Sequence[Mapping[str, Any]]) -> str:
    """The block that describes custom functions, each `{"name": …, "description": …, "parameters": JSON schema}`."""
    definitions = (json.dumps({"type": "function", "function": f}, indent=4, ensure_ascii=False) for f in functions)
    return _BEFORE + "\n".join(definitions) + _AFTER
