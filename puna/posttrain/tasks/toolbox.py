"""The tools that items refer to by name, and how the system message announces them.

Items are data and name their tools; `Toolbox(world)` makes them real: the calculator, the search over the world's
library, the interpreter in its sandbox, and each invented function. Demonstrations are written without running them,
from what they are known to return; a test compares the two.
"""

from collections.abc import Sequence

from puna.posttrain.tasks.item import Item, ToolRef
from puna.posttrain.world import World, library
from puna.tokenizer.tools_prompt import system_prompt
from puna.tools.calculator import calculator
from puna.tools.definition import Tool
from puna.tools.invented import invented_function
from puna.tools.sandbox import Sandbox, code_interpreter
from puna.tools.search import SearchIndex, search_tool

CALCULATOR, SEARCH, INTERPRETER = "wolfram_alpha", "brave_search", "code_interpreter"
NO_TOOLS = "You have no tools."
ALL_BUILTIN = (ToolRef(name=SEARCH), ToolRef(name=CALCULATOR), ToolRef(name=INTERPRETER))


def builtin_sets(tool: str) -> tuple[tuple[ToolRef, ...], ...]:
    """What may be announced where `tool` is needed: that one alone, or all built-in tools."""
    return (ToolRef(name=tool),), ALL_BUILTIN


def builtin_system(tools: Sequence[ToolRef]) -> str:
    """The system message that announces built-in tools, in Llama 3.1's words."""
    names = [tool.name for tool in tools]
    return system_prompt(builtins=[n for n in names if n != INTERPRETER], code_interpreter=INTERPRETER in names)


class Toolbox:
    """The tools of a world; call it with an item to get those that the item lists. Use it in a `with`, or `close` it."""

    def __init__(self, world: World):
        self._sandbox = Sandbox()
        index = SearchIndex(("", article) for article in library(world))
        self._builtin = {
            CALCULATOR: calculator(),
            SEARCH: search_tool(index),
            INTERPRETER: code_interpreter(self._sandbox),
        }

    def __call__(self, item: Item) -> list[Tool]:
        return [invented_function(t.name, t.operation) if t.operation else self._builtin[t.name] for t in item.tools]

    def __enter__(self) -> "Toolbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the interpreter's process."""
        self._sandbox.close()
