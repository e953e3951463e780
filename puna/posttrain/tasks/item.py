"""What a task is made of.

    Item     a question that can be checked: the prompt, the tools that are at hand, and the check as data
    Case     an item together with a faultless answer, and answers as a careless person would write them

A demonstration for training is a case's prompt followed by one of its answers. An evaluation item, and a prompt for
rejection sampling, is the item alone. Checks name a verifier in `verify.py` and what it expects, so that an item is
plain data: it is written to a file, hashed, and read back by another process.
"""

from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from puna.chat import Dialog, Message
from puna.posttrain.world import Part, World


@dataclass(frozen=True, kw_only=True)
class ToolRef:
    """A tool by name; with an `operation`, an invented function (`puna.tools.invented`)."""

    name: str
    operation: str = ""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question that can be checked."""

    task: str
    variant: str  # what is reported separately within the task: the number of functions listed, the kind of constraint
    id: str
    dialog: Dialog  # the prompt: what precedes the assistant's first message
    tools: tuple[ToolRef, ...] = ()
    check: dict[str, Any] = field(default_factory=dict)  # {"verifier": name, ...what it expects}
    chance: float = 0.0  # how often a guess that knows the form of the answer is right
    # What must be new in an evaluation, as "kind:text": "person:Karis Tolvu", "word:tolven", … (see `overlap.py`)
    entities: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Case:
    """An item, a faultless answer (the messages after the prompt), and faulty ones: each of them fails the item's check."""

    item: Item
    answer: Dialog
    faults: tuple[Dialog, ...] = ()

    @property
    def dialog(self) -> Dialog:
        """The whole faultless dialogue."""
        return self.item.dialog + self.answer


class Task(Protocol):
    """A source of cases. The `part` decides which people, words, numbers and function names may appear."""

    def __call__(self, world: World, part: Part, rng: Random) -> Case: ...


def with_filler(answer: Dialog, rng: Random) -> Dialog:
    """The answer as a chatty annotator writes it: something polite on a line before the last message's text."""
    last = answer[-1]
    filler = rng.choice(("Sure!\n", "Of course!\n"))
    return (*answer[:-1], Message(role=last.role, content=filler + last.content, tool_calls=last.tool_calls))
