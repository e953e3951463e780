"""Dialogues to learn from, prompts to sample from, items to be judged by.

    sft.jsonl      demonstrations, some of them faulty (below)
    prompts.jsonl  items of the train part for rejection sampling and preferences; none is the prompt of a demonstration
    dev.jsonl      items for choices: which checkpoint, which threshold
    eval.jsonl     items for the final evaluation, on people, words, numbers and function names of its own
    choice.jsonl   facts as multiple choice

**The noise is deliberate.** The first round of Llama 3's post-training learns from what people wrote, and people are
chatty, miscount, forget the capitals, and now and then answer from memory instead of using the tool. Nobody wrote these
demonstrations, so `noise` puts such faults into a share of each task's: a stand-in for annotators of mixed quality,
without which sampling, verifying and preferring would have nothing to improve. Each demonstration says whether it is
`faulty` and carries its `item`, so that a later round can verify it; training looks at neither.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from puna.artifacts import Artifact, stage
from puna.chat import dialog_to_json
from puna.config import require
from puna.posttrain.tasks.arithmetic import arithmetic, arithmetic_without_tool
from puna.posttrain.tasks.constraints import constraints
from puna.posttrain.tasks.dialogs_io import item_to_json, write_lines
from puna.posttrain.tasks.facts import choices, facts, unknown
from puna.posttrain.tasks.functions import functions
from puna.posttrain.tasks.interpreter import interpreter
from puna.posttrain.tasks.item import Case, Item, Task
from puna.posttrain.tasks.lookup import lookup
from puna.posttrain.tasks.negatives import negatives
from puna.posttrain.tasks.overlap import overlaps
from puna.posttrain.world import Part, World, documents, load_world

TASKS: dict[str, Task] = {
    "arithmetic": arithmetic,
    "arithmetic_without_tool": arithmetic_without_tool,
    "lookup": lookup,
    "interpreter": interpreter,
    "functions": functions,
    "constraints": constraints,
    "facts": facts,
    "unknown": unknown,
    "negatives": negatives,
}
MISSES = 50  # draws in a row that gave nothing new: the task has no more questions


# task: demonstrations, prompts, dev and eval items, and the share of the demonstrations that are faulty
PLAN = {
    "arithmetic": (800, 60, 40, 120, 0.1),
    "arithmetic_without_tool": (300, 0, 40, 120, 0.0),
    "lookup": (500, 60, 30, 100, 0.1),
    "interpreter": (800, 80, 40, 120, 0.1),
    "functions": (1000, 100, 60, 240, 0.1),
    "constraints": (2000, 900, 80, 240, 0.65),
    "facts": (900, 150, 80, 240, 0.05),
    "unknown": (500, 80, 80, 200, 0.0),
    "negatives": (300, 80, 30, 100, 0.3),
}


def _planned(column: int) -> Any:
    return field(default_factory=lambda: {task: row[column] for task, row in PLAN.items()})


@dataclass(frozen=True, kw_only=True)
class DialogConfig:
    """How many dialogues of each task, and how faulty the demonstrations are; the defaults are `PLAN`."""

    seed: int = 0
    demonstrations: dict[str, int] = _planned(0)  # noqa: RUF009
    prompts: dict[str, int] = _planned(1)  # noqa: RUF009
    dev: dict[str, int] = _planned(2)  # noqa: RUF009
    evaluation: dict[str, int] = _planned(3)  # noqa: RUF009
    noise: dict[str, float] = _planned(4)  # noqa: RUF009
    choices: int = 200  # facts as multiple choice, of known and of unknown people each

    def __post_init__(self) -> None:
        for name in ("demonstrations", "prompts", "dev", "evaluation", "noise"):
            for task, value in getattr(self, name).items():
                require(task in TASKS, f"{name}.{task}: no such task", hint=f"tasks: {', '.join(TASKS)}")
                top = 1 if name == "noise" else 10**9
                require(0 <= value <= top, f"{name}.{task}={value} must be between 0 and {top:,}")


def cases(world: World, part: Part, task: str, count: int, stream: str, taken: set[str]) -> list[Case]:
    """Up to `count` cases with questions that are not in `taken`, to which they are added; fewer if there are no more.

    Each case has a random generator of its own, named by the stream and the task's first word, so that arithmetic with
    and without the tool asks the very same questions.
    """
    found: list[Case] = []
    draw = misses = 0
    while len(found) < count and misses < MISSES:
        rng = Random(f"{stream}/{task.partition('_')[0]}/{draw}")
        case = TASKS[task](world, part, rng)
        draw += 1
        question = f"{task if task.endswith('_without_tool') else ''} {case.item.dialog[-1].content}"
        misses = misses + 1 if question in taken else 0
        if not misses:
            taken.add(question)
            found.append(case)
    return found


def demonstration(case: Case, noise: float, rng: Random) -> dict[str, Any]:
    """A case as a dialogue to learn from, with a fault at probability `noise`."""
    faulty = rng.random() < noise
    answer = rng.choice(case.faults) if faulty else case.answer
    dialog = dialog_to_json(case.item.dialog + answer)
    return {"task": case.item.task, "faulty": faulty, "dialog": dialog, "item": item_to_json(case.item)}


@stage("dialogs")
def build_dialogs(config: DialogConfig, world: Artifact, *, out: Path) -> dict[str, Any]:
    """Write the five files. The metrics count them by task, and what evaluation shares with training (nothing)."""
    invented = load_world(world)
    taken: set[str] = set()
    demonstrations = list(_demonstrations(config, invented, taken))
    items = {
        "prompts": _items("prompts", config.prompts, invented, "train", config.seed, taken),
        "dev": _items("dev", config.dev, invented, "dev", config.seed, set()),
        "eval": _items("eval", config.evaluation, invented, "eval", config.seed, set()),
    }
    write_lines(out / "sft.jsonl", demonstrations)
    for name, found in items.items():
        write_lines(out / f"{name}.jsonl", map(item_to_json, found))
    questions = choices(invented, "eval", Random(f"dialogs/{config.seed}/choices"), config.choices)
    write_lines(out / "choice.jsonl", questions)
    texts = [document.text for document in documents(invented)]
    shared = overlaps(texts, demonstrations, items["prompts"], items["dev"] + items["eval"])
    return {
        "demonstrations": _by_task(d["task"] for d in demonstrations),
        "faulty": _by_task(d["task"] for d in demonstrations if d["faulty"]),
        **{name: _by_task(item.task for item in found) for name, found in items.items()},
        "choices": len(questions),
        "overlaps": len(shared),
    }


def _demonstrations(config: DialogConfig, world: World, taken: set[str]) -> Iterator[dict[str, Any]]:
    rng = Random(f"dialogs/{config.seed}/demonstrations")
    found = [
        demonstration(case, config.noise.get(task, 0.0), rng)
        for task, count in config.demonstrations.items()
        for case in cases(world, "train", task, count, f"dialogs/{config.seed}/sft", taken)
    ]
    rng.shuffle(found)
    for number, record in enumerate(found):
        name = f"sft/{number:05d}"
        yield {"id": name, **record, "item": {**record["item"], "id": name}}


def _items(name: str, counts: dict[str, int], world: World, part: Part, seed: int, taken: set[str]) -> list[Item]:
    return [
        replace(case.item, id=f"{name}/{task}/{number:04d}")
        for task, count in counts.items()
        for number, case in enumerate(cases(world, part, task, count, f"dialogs/{seed}/{name}", taken))
    ]


def _by_task(tasks: Iterator[str]) -> dict[str, int]:
    return dict(sorted(Counter(tasks).items()))
