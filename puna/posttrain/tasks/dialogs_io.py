"""Dialogues and items as lines of JSON. What is written reads back equal; messages have the form of `puna.chat`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from puna import config
from puna.artifacts import replacing
from puna.chat import Dialog, dialog_from_json, dialog_to_json
from puna.posttrain.tasks.item import Item, ToolRef
from puna.train.objectives.sft import read_lines


def item_to_json(item: Item) -> dict[str, Any]:
    """An item as plain JSON values."""
    return {**config.to_json(item), "dialog": dialog_to_json(item.dialog)}


def item_from_json(data: dict[str, Any]) -> Item:
    """The item that `item_to_json` wrote."""
    return Item(
        **{
            **data,
            "dialog": dialog_from_json(data["dialog"]),
            "tools": tuple(ToolRef(**tool) for tool in data["tools"]),
            "entities": tuple(data["entities"]),
        }
    )


def write_lines(path: Path, values: Iterable[Any]) -> int:
    """Write JSON values one per line, atomically; returns how many."""
    count = 0
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for count, value in enumerate(values, start=1):  # noqa: B007
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
    return count


def read_dialogs(path: Path) -> list[Dialog]:
    """The dialogues of a file such as `sft.jsonl`."""
    return [dialog_from_json(record["dialog"]) for record in read_lines(path)]


def read_items(path: Path) -> list[Item]:
    """The items of a file such as `eval.jsonl`."""
    return [item_from_json(record) for record in read_lines(path)]
