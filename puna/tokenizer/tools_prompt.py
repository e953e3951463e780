"""How a conversation tells the model which tools there are, in Llama 3.1's words.

The system message opens with the environment, and each part is left out where it has nothing to say:

    Environment: ipython                      any built-in tool, or the code interpreter alone
    Tools: brave_search, wolfram_alpha        the built-in tools; the interpreter is never listed
    Cutting Knowledge Date: December 2023
    Today Date: 21 September 2024

    You are a helpful assistant.

Functions of the user's own are described in the words that the released models were trained with, and those depend on
how they are to be called (`calls.py`): in JSON, in a `<function=…>` tag, or in Python's notation. The block stands in the
system message or, as in the format's documentation, in a user message before the question.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from puna.chat import Dialect
from puna.errors import PunaError
from puna.tokenizer.calls import BUILTIN_TOOLS

_JSON = (
    "Answer the user's question by making use of the following functions if needed.\n"
    "If none of the function can be used, please say so.\n"
    "Here is a list of functions in JSON format:\n",
    "\n\nReturn function calls in JSON format.",
)
_TAG = (
    "You have access to the following functions:\n\n",
    "\n\nThink very carefully before calling functions.\n"
    "If you choose to call a function ONLY reply in the following format with no prefix or suffix:\n\n"
    '<function=example_function_name>{"example_name": "example_value"}</function>\n\n'
    "Reminder:\n"
    "- If looking for real time information use relevant functions before falling back to brave_search\n"
    "- Function calls MUST follow the specified format, start with <function= and end with </function>\n"
    "- Required parameters MUST be specified\n"
    "- Only call one function at a time\n"
    "- Put the entire function call reply on one line",
)
_PYTHON = (
    "You are an expert in composing functions. You are given a question and a set of possible functions.\n"
    "Based on the question, you will need to make one or more function/tool calls to achieve the purpose.\n"
    "If none of the function can be used, point it out. If the given question lacks the parameters required by the "
    "function,\n"
    "also point it out. You should only return the function call in tools call sections.\n\n"
    "If you decide to invoke any of the function(s), you MUST put it in the format of "
    "[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]\n"
    "You SHOULD NOT include any other text in the response.\n\n"
    "Here is a list of functions in JSON format that you can invoke.\n\n",
    "",
)


def system_prompt(
    text: str = "",
    *,
    builtins: Sequence[str] = (),
    code_interpreter: bool = False,
    functions: Sequence[Mapping[str, Any]] = (),
    dialect: Dialect = "json",
    knowledge_date: str = "",
    today: str = "",
) -> str:
    """The text of a system message: environment, dates, functions, then `text`.

    `builtins` names built-in tools, `functions` and `dialect` are what `functions_prompt` takes. Dates are written as
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
    blocks = ["\n".join(lines), functions_prompt(functions, dialect) if functions else "", text]
    return "\n\n".join(block for block in blocks if block)


def functions_prompt(functions: Sequence[Mapping[str, Any]], dialect: Dialect = "json") -> str:
    """The block that describes custom functions, each `{"name": …, "description": …, "parameters": JSON schema}`.

    `dialect` is how they are to be called: `json`, `function` or `pythonic`. Raises `PunaError` for another one.
    """
    if dialect == "function":
        before, after = _TAG
        described = (
            f"Use the function '{f['name']}' to '{f.get('description', '')}':\n{json.dumps(f, ensure_ascii=False)}"
            for f in functions
        )
        return before + "\n\n".join(described) + after
    if dialect == "pythonic":
        return _PYTHON[0] + json.dumps(list(functions), indent=4, ensure_ascii=False) + _PYTHON[1]
    if dialect != "json":
        raise PunaError(f"functions are not called in the dialect {dialect!r}", hint="json, function or pythonic")
    definitions = (json.dumps({"type": "function", "function": f}, indent=4, ensure_ascii=False) for f in functions)
    return _JSON[0] + "\n".join(definitions) + _JSON[1]
