"""What a recipe leaves beside its model for those who talk to it: `chat.json` in the run's folder.

    {"examples": ["Where does Tamo Vilu live?", ...],     questions that show what the model was taught
     "library": ["Tamo Vilu lives in Kodor. ...", ...]}    texts that only its search tool can find

A model without the file (a bare checkpoint, somebody else's) is served without examples and without tools.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from puna import artifacts, config
from puna.errors import ConfigError, DataError
from puna.serve.toolset import builtin_tools
from puna.tools.definition import Tool

FILE = "chat.json"


@dataclass(frozen=True, kw_only=True)
class Companion:
    """Example questions, and the texts of the search tool; `has_tools` says that the model was taught to call them."""

    examples: tuple[str, ...] = ()
    library: tuple[str, ...] = ()
    has_tools: bool = True

    @classmethod
    def read(cls, folder: Path) -> "Companion":
        """The companion in `folder` or, for a checkpoint within a run, in the run's folder; else one without tools.

        Raises `DataError` if the file is damaged.
        """
        folder = folder.resolve()
        around = [path for path in (folder / FILE, *(parent / FILE for parent in folder.parents[:3])) if path.is_file()]
        if not around:
            return cls(has_tools=False)
        path = around[0]
        try:
            return config.from_json(cls, json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, ConfigError) as error:
            raise DataError(f"{path} cannot be read: {error}", hint="delete it, and run the recipe again") from None

    def write(self, folder: Path) -> None:
        """Write the file."""
        artifacts.write_atomic(folder / FILE, json.dumps(config.to_json(self), ensure_ascii=False, indent=1) + "\n")

    def tools(self) -> Sequence[Tool]:
        """The tools to offer: calculator, interpreter, and a search over the library if there is one."""
        return builtin_tools(("", text) for text in self.library) if self.has_tools else ()
