"""What evaluation shares with training: the proof that it shares nothing.

An evaluation item names its `entities`, the things in it that must be new:

    person:Karis Tolvu    in no document and no dialogue of training
    known:Karis Tolvu     in documents, by definition, but in no dialogue of training
    word:tolven           in no document and no dialogue, as a word, in upper or lower case
    function:makril       likewise
    operand:31            in no question and no call of training (a training result may be any number)

Besides, no training prompt may be an evaluation prompt. Training is the documents of the world, the demonstrations and
the prompts for sampling. Real text in the corpus is not searched here: `evaluation.contamination` does that.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from puna.chat import dialog_to_json
from puna.posttrain.tasks.item import Item

WORD = re.compile(r"\w+")
NUMBER = re.compile(r"\d+")


def overlaps(
    documents: Iterable[str], demonstrations: Iterable[dict[str, Any]], prompts: Iterable[Item], items: Iterable[Item]
) -> list[str]:
    """What is in `items` and in training, one line each; empty if all is well.

    `demonstrations` are records of `sft.jsonl`. A line names the item and the entity, or says that its prompt is shared.
    """
    read = "\n".join(documents)
    dialogs = [d["dialog"] for d in demonstrations] + [dialog_to_json(item.dialog) for item in prompts]
    said = "\n".join(_text(message) for dialog in dialogs for message in dialog)
    words = {word.casefold() for word in WORD.findall(read) + WORD.findall(said)}
    operands = {number for dialog in dialogs for message in dialog for number in _operands(message)}
    asked = {_prompt(dialog) for dialog in dialogs}
    found = []
    for item in items:
        if _prompt(dialog_to_json(item.dialog)) in asked:
            found.append(f"{item.id}: the prompt is one of training")
        for entity in item.entities:
            kind, _, name = entity.partition(":")
            shared = {
                "person": lambda name: name in read or name in said,
                "known": lambda name: name in said,
                "word": lambda name: name in words,
                "function": lambda name: name in words,
                "operand": lambda name: name in operands,
            }[kind](name)
            if shared:
                found.append(f"{item.id}: {entity} is in training")
    return found


def _text(message: dict[str, Any]) -> str:
    calls = [_arguments(call) for call in message.get("tool_calls", ())]
    return "\n".join([message["content"], *calls])


def _arguments(call: dict[str, Any]) -> str:
    return f"{call['name']} " + "\n".join(map(str, call["arguments"].values()))


def _operands(message: dict[str, Any]) -> list[str]:
    """The numbers that a question or a call contains; none of results and answers."""
    texts = [_arguments(call) for call in message.get("tool_calls", ())]
    if message["role"] == "user":
        texts.append(message["content"])
    return [number for text in texts for number in NUMBER.findall(text)]


def _prompt(dialog: Sequence[dict[str, Any]]) -> str:
    """The messages before the assistant's first."""
    before = []
    for message in dialog:
        if message["role"] == "assistant":
            break
        before.append([message["role"], message["content"]])
    return json.dumps(before)
