"""Multiple choice by likelihood: which of the given answers does the model find the least surprising?

    raw        argmax over options of log P(option | question)
    per byte   argmax of log P(option | question) / bytes(option): long options are not punished for being long

Both are reported, as evaluation harnesses do (the second is their `acc_norm`), since which is better depends on the task and choosing
afterwards would flatter. A tie for the first place is counted as wrong: a model that says nothing scores 0, not chance.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from puna.chat import Continuation, Dialog, Generator
from puna.errors import DataError
from puna.evaluation.scores import score

_FORM = 'one item a line: {"context": "The sky is", "options": [" blue.", " green."], "answer": 0}'


@dataclass(frozen=True, kw_only=True)
class Item:
    """A question with its options: after a raw `context`, or as the reply to a `dialog`. `answer` is an index."""

    options: tuple[str, ...]
    answer: int
    context: str = ""
    dialog: Dialog = ()

    def __post_init__(self) -> None:
        if not 0 <= self.answer < len(self.options) or not all(self.options):
            raise ValueError(f"answer {self.answer} must be one of {len(self.options)} non-empty options")


def choice_report(generator: Generator, name: str, items: Sequence[Item]) -> dict[str, Any]:
    """Accuracy on `items` by both rules: `{"items": n, "raw": task, "per_byte": task}`, tasks as in `scores`."""
    continuations = [
        Continuation(text=option, context=item.context, dialog=item.dialog) for item in items for option in item.options
    ]
    likelihoods = iter(generator.score(continuations))
    raw, per_byte = [], []
    for item in items:
        nats = np.array([next(likelihoods) for _ in item.options])
        sizes = np.array([len(option.encode()) for option in item.options])
        raw.append(_first(nats) == item.answer)
        per_byte.append(_first(nats / sizes) == item.answer)
    chance = float(np.mean([1 / len(item.options) for item in items])) if items else 0.0
    return {
        "items": len(items),
        "raw": score(name, raw, chance=chance).json(),
        "per_byte": score(name, per_byte, chance=chance).json(),
    }


def read_choices(path: Path) -> dict[str, list[Item]]:
    """Items by group from lines of JSON: {"context", "options", "answer", "group" (optional)}.

    Raises `DataError` naming the line that is none.
    """
    groups: dict[str, list[Item]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", hint=_FORM) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            options = tuple(data["options"])
            if not all(isinstance(text, str) for text in (data["context"], *options)):
                raise TypeError("context and options must be texts")
            item = Item(options=options, answer=int(data["answer"]), context=data["context"])
            groups.setdefault(str(data.get("group", path.stem)), []).append(item)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}, line {number} is no multiple-choice item: {error!r}", hint=_FORM) from None
    if not groups:
        raise DataError(f"{path} has no items", hint=_FORM)
    return groups


def _first(values: np.ndarray) -> int | None:
    """The index of the only largest value; None for a tie."""
    best = np.flatnonzero(values == values.max())
    return int(best[0]) if len(best) == 1 else None
