"""The loop around a model that calls tools.

    dialog -> model -> a call?  -> run the tool -> append its result (role `ipython`) -> model -> ...
                     -> no call -> that was the answer

Many dialogs go through it together: each turn is one batch for the generator, of the dialogs that are still going on.
What a dialog becomes does not depend on the others. Each turn draws with its own seed, a hash of the dialog's seed and
the turn's number, so sampling repeats exactly, and the second turn does not replay the first one's luck.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import xxhash

from puna.chat import Completion, Dialog, Generator, Message, Request, Sampling, ToolCall, tool_result
from puna.config import require
from puna.tools.definition import Tool


@dataclass(frozen=True, kw_only=True)
class Execution:
    """One call and what came of it; `accepted` says that the tool was offered and its schema took the arguments."""

    call: ToolCall
    result: str
    accepted: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A dialog after the loop, with everything that the model and the tools added.

    `finish_reason` is the last completion's; `tool_calls` means that the model still asked for a tool after `max_calls`,
    or ended its message as if it had. `logprob` is the sum over its completions.
    """

    dialog: Dialog
    executions: tuple[Execution, ...]
    finish_reason: Literal["stop", "length", "tool_calls"]
    turns: int
    completion_tokens: int
    logprob: float

    @property
    def valid(self) -> bool:
        """The model came to an answer, and every call on the way named an offered tool with arguments it accepts."""
        return self.finish_reason == "stop" and all(execution.accepted for execution in self.executions)

    @property
    def answer(self) -> str:
        """The text of the last message, empty if the dialog did not end in an answer."""
        return self.dialog[-1].content if self.finish_reason == "stop" else ""


def run_dialogs(
    generator: Generator,
    dialogs: Sequence[Dialog],
    tools: Sequence[Tool] | Sequence[Sequence[Tool]],
    *,
    sampling: Sampling | Sequence[Sampling] | None = None,
    max_calls: int = 4,
) -> list[Outcome]:
    """Continue each dialog until the model answers without a call, or has made `max_calls`.

    `tools` are offered to all dialogs, or one sequence for each. With one `sampling`, dialog i draws with a seed made of
    `sampling.seed` and i; with one for each dialog, with that one's seed, so that the same dialog can be run again
    among others. A message with more calls than are left runs none of them.
    """
    require(max_calls >= 0, f"max_calls={max_calls} must not be negative")
    running = [
        _Running(dialog, offered, drawn)
        for dialog, offered, drawn in zip(
            dialogs, _offered(tools, len(dialogs)), _samplings(sampling, len(dialogs)), strict=True
        )
    ]
    active = running
    while active:
        completions = generator.generate([one.request() for one in active])
        for one, completion in zip(active, completions, strict=True):
            one.take(completion, max_calls)
        active = [one for one in active if not one.done]
    return [one.outcome() for one in running]


def execute(call: ToolCall, tools: Sequence[Tool]) -> Execution:
    """Run one call with the tool of its name among `tools`; a wrong name or argument gives a result `error: ...`."""
    tool = next((tool for tool in tools if tool.name == call.name), None)
    if tool is None:
        names = ", ".join(tool.name for tool in tools) or "none"
        return Execution(call=call, result=f"error: no function {call.name!r}; available: {names}", accepted=False)
    return Execution(call=call, result=tool.call(call.arguments), accepted=not tool.problem(call.arguments))


def derive_seed(*parts: int) -> int:
    """A seed from seeds: the same for the same parts, unrelated for others. 63 bits."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode()) >> 1


class _Running:
    """One dialog on its way."""

    def __init__(self, dialog: Dialog, tools: Sequence[Tool], sampling: Sampling):
        self.messages: list[Message] = list(dialog)
        self.tools, self.sampling = tools, sampling
        self.executions: list[Execution] = []
        self.finish_reason: Literal["stop", "length", "tool_calls"] = "stop"
        self.turns = self.completion_tokens = 0
        self.logprob = 0.0
        self.done = False

    def request(self) -> Request:
        seed = derive_seed(self.sampling.seed, self.turns)
        return Request(dialog=tuple(self.messages), sampling=replace(self.sampling, seed=seed))

    def take(self, completion: Completion, max_calls: int) -> None:
        """Append the model's message and, if it calls and may, the results."""
        self.messages.append(completion.message)
        self.turns += 1
        self.completion_tokens += completion.completion_tokens
        self.logprob += completion.logprob
        calls = completion.message.tool_calls
        truncated = completion.finish_reason == "length"  # a call that was cut off is not the call that was meant
        self.finish_reason = "tool_calls" if calls and not truncated else completion.finish_reason
        if truncated or not calls or len(self.executions) + len(calls) > max_calls:
            self.done = True
            return
        for call in calls:
            self.executions.append(execute(call, self.tools))
            self.messages.append(tool_result(self.executions[-1].result))

    def outcome(self) -> Outcome:
        return Outcome(
            dialog=tuple(self.messages),
            executions=tuple(self.executions),
            finish_reason=self.finish_reason,
            turns=self.turns,
            completion_tokens=self.completion_tokens,
            logprob=self.logprob,
        )


def _offered(tools: Sequence[Tool] | Sequence[Sequence[Tool]], count: int) -> list[Sequence[Tool]]:
    if all(isinstance(tool, Tool) for tool in tools):
        return [tools] * count  # also where there are none
    require(len(tools) == count, f"{len(tools)} sets of tools were given for {count} dialogs")
    return list(tools)


def _samplings(sampling: Sampling | Sequence[Sampling] | None, count: int) -> list[Sampling]:
    sampling = sampling or Sampling()
    if isinstance(sampling, Sampling):
        return [replace(sampling, seed=derive_seed(sampling.seed, i)) for i in range(count)]
    require(len(sampling) == count, f"{len(sampling)} samplings were given for {count} dialogs")
    return list(sampling)
