"""The tools that a served model may use, and how it is told of them.

Llama 3.1 knows three built-in tools by training: `brave_search`, `wolfram_alpha` and the code interpreter; the system
message only names them. Any other tool is described to it, in the way of its dialog format.
"""

from collections.abc import Iterable, Sequence

from puna.chat import Dialog
from puna.tokenizer.calls import BUILTIN_TOOLS, CODE_INTERPRETER
from puna.tokenizer.formats import DialogFormat
from puna.tools.calculator import calculator
from puna.tools.definition import Tool
from puna.tools.sandbox import Sandbox, code_interpreter
from puna.tools.search import SearchIndex, search_tool


def builtin_tools(documents: Iterable[tuple[str, str]] = ()) -> tuple[Tool, ...]:
    """The calculator, the code interpreter and, where there are (title, text) documents, a search over them.

    The interpreter starts with its first program.
    """
    index = SearchIndex(documents)
    search = (search_tool(index),) if len(index) else ()
    return (*search, calculator(), code_interpreter(Sandbox()))


def offered(format: DialogFormat, dialog: Dialog, tools: Sequence[Tool]) -> Dialog:
    """`dialog` with `tools` offered in it, as the model's dialog format does. Raises `PunaError` if it has no tools."""
    names = [tool.name for tool in tools]
    own = [tool for tool in tools if tool.name not in (*BUILTIN_TOOLS, CODE_INTERPRETER)]
    return format.offer(
        dialog,
        [tool.declaration()["function"] for tool in own],
        builtins=[name for name in names if name in BUILTIN_TOOLS],
        code_interpreter=CODE_INTERPRETER in names,
    )


def custom_names(tools: Sequence[Tool]) -> frozenset[str]:
    """The tools that a model knows only from their descriptions."""
    return frozenset(tool.name for tool in tools) - {*BUILTIN_TOOLS, CODE_INTERPRETER}
