"""Items in, verdicts out: the model answers, tools are run, the answer is verified.

Each sample of an item draws with a seed of its own, made of the given seed, the item's id and the sample's number, so
that a verdict does not depend on which other items are asked. Dialogues go to the generator in groups, so that long
runs show how far they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import xxhash

from puna import log
from puna.chat import Dialog, Generator, Sampling
from puna.posttrain.tasks.item import Item
from puna.posttrain.tasks.verify import refused, verify
from puna.tools import agent
from puna.tools.agent import derive_seed, run_dialogs
from puna.tools.definition import Tool

GROUP = 256  # dialogues


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one sample of an item."""

    item: Item
    sample: int
    dialog: Dialog  # the prompt and everything after it
    passed: bool
    finished: bool  # it ended with an answer, before the limit of tokens or calls
    calls: int  # how many tools it called
    valid_call: bool | None  # some call, and each one understood by its tool; None where no tool should be called
    refused: bool
    completion_tokens: int
    logprob: float  # of all that the model wrote, in nats


def run_items(
    generator: Generator,
    items: Sequence[Item],
    *,
    tools_for: Callable[[Item], Sequence[Tool]],
    sampling: Sampling,
    samples: int = 1,
    label: str = "items",
) -> list[Outcome]:
    """`samples` outcomes of each item, those of one item together, in order."""
    asked = [(item, sample) for item in items for sample in range(samples)]
    outcomes: list[Outcome] = []
    with log.progress(label, len(asked), unit="answers") as progress:
        for start in range(0, len(asked), GROUP):
            group = asked[start : start + GROUP]
            seeds = [derive_seed(sampling.seed, xxhash.xxh3_64_intdigest(i.id.encode()), sample) for i, sample in group]
            done = run_dialogs(
                generator,
                [item.dialog for item, _ in group],
                [list(tools_for(item)) for item, _ in group],
                sampling=[replace(sampling, seed=seed) for seed in seeds],
            )
            outcomes += [_outcome(item, sample, run) for (item, sample), run in zip(group, done)]
            progress.advance(len(group))
    return outcomes


def by_task(outcomes: Sequence[Outcome]) -> dict[str, list[bool]]:
    """Whether each outcome passed, by `task/variant`, in order: what `evaluation.scores.tasks` takes."""
    found: dict[str, list[bool]] = {}
    for outcome in outcomes:
        found.setdefault(f"{outcome.item.task}/{outcome.item.variant}", []).append(outcome.passed)
    return dict(sorted(found.items()))


def chances(items: Sequence[Item]) -> dict[str, float]:
    """The mean chance level by `task/variant`."""
    found: dict[str, list[float]] = {}
    for item in items:
        found.setdefault(f"{item.task}/{item.variant}", []).append(item.chance)
    return {name: sum(values) / len(values) for name, values in sorted(found.items())}


def _outcome(item: Item, sample: int, run: agent.Outcome) -> Outcome:
    finished = run.finish_reason == "stop"
    understood = all(e.accepted and not e.result.startswith("error: ") for e in run.executions)
    wanted = bool(item.tools) and not item.check.get("no_calls")
    return Outcome(
        item=item,
        sample=sample,
        dialog=run.dialog,
        passed=finished and verify(item, run.dialog),
        finished=finished,
        calls=sum(len(message.tool_calls) for message in run.dialog[len(item.dialog) :]),
        valid_call=bool(run.executions) and understood if wanted else None,
        refused=finished and refused(run.dialog),
        completion_tokens=run.completion_tokens,
        logprob=run.logprob,
    )
