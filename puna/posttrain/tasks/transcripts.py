"""Dialogues as plain text, for pretraining: what a conversation with tools looks like before any chat format is known.

    user:
    Calculate 248 + 150.
    assistant:
    wolfram_alpha.call(query="248 + 150")
    ipython:
    398
    assistant:
    398

A general corpus has forums, interviews and logs of this kind by the million; the embedded one is Python's sources, and
has none, so the recipe writes them. They are about people, words, numbers and functions of the train part only, hold no
special token, and their answers are faultless. Fine-tuning then has to teach the format and when to refuse, not what a
call is. They also give the vocabulary its role names and tools.
"""

from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from puna.artifacts import Artifact, stage
from puna.chat import Dialog, Message
from puna.config import require
from puna.curation.documents import Document, write_documents
from puna.posttrain.tasks.build import TASKS, cases
from puna.posttrain.world import World, load_world
from puna.tokenizer.calls import write_call

SOURCE = "dialogs"
PLAN = {
    "arithmetic": 400,
    "lookup": 400,
    "interpreter": 800,
    "functions": 1500,
    "constraints": 2600,
}


@dataclass(frozen=True, kw_only=True)
class TranscriptConfig:
    """How many transcripts of each task."""

    seed: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict(PLAN))

    def __post_init__(self) -> None:
        for task, count in self.counts.items():
            require(task in TASKS, f"counts.{task}: no such task", hint=f"tasks: {', '.join(TASKS)}")
            require(count >= 0, f"counts.{task}={count} must not be negative")


@stage("documents")
def build_transcripts(config: TranscriptConfig, world: Artifact, *, out: Path) -> dict[str, Any]:
    """Write `documents.parquet`: a transcript per document, of the source `dialogs`."""
    written = transcripts(load_world(world), config)
    write_documents(out / "documents.parquet", written)
    return {"documents": len(written), "bytes": sum(len(document.text.encode()) for document in written)}


def transcripts(world: World, config: TranscriptConfig) -> list[Document]:
    """The documents, shuffled; none repeats the question of another one of its task."""
    texts = [transcript(dialog) for dialog in pretraining_dialogs(world, config)]
    Random(f"transcripts/{config.seed}").shuffle(texts)
    return [
        Document(id=f"{SOURCE}/{number:05d}", text=text, source=SOURCE, lang="en") for number, text in enumerate(texts)
    ]


def pretraining_dialogs(world: World, config: TranscriptConfig) -> list[Dialog]:
    """The dialogues that the transcripts tell, task after task."""
    return [
        case.dialog
        for task, count in config.counts.items()
        for case in cases(world, "train", task, count, f"transcripts/{config.seed}", set())
    ]


def transcript(dialog: Dialog) -> str:
    """Who, and on lines of its own, as in the chat format, what. Calls are written as there, without tags."""
    return "".join(f"{message.role}:\n{_said(message)}\n" for message in dialog)


def _said(message: Message) -> str:
    return "; ".join([message.content] * bool(message.content) + [write_call(call) for call in message.tool_calls])
