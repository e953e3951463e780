"""`puna chat`: a conversation in the terminal.

    >>> Where is the market of Tarma?
    On the hill above the river.
    8 tokens, 212 tokens/s

A line is a message; three double quotes open and close one of several lines; a line that starts with `/` is a command
(`commands.py`). Ctrl-C stops an answer, and what was said stays; at the prompt it hints, and a second one leaves; Ctrl-D
leaves. When input comes from a pipe the same lines are read without prompts, and only answers go to stdout.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from puna.chat import Sampling, ToolCall, user
from puna.errors import PunaError
from puna.inference.setup import Setup
from puna.serve import commands, knobs
from puna.serve.conversation import Conversation, Ended, Event, Forgot, Said, Used
from puna.serve.screen import Screen
from puna.tokenizer.formats import NONE
from puna.tools.definition import Tool

PROMPT, CONTINUED = ">>> ", "... "
FENCE = '"""'
ReadLine = Callable[[str], str]  # given a prompt; raises EOFError and KeyboardInterrupt as `input` does


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How `puna chat` starts. With `prompt` it answers that, followed by what a pipe holds, and leaves."""

    system: str = ""
    prompt: str = ""
    sampling: Sampling = knobs.DEFAULT
    seed: int | None = None  # None draws each answer afresh

    def with_settings(self, **settings: str) -> "ChatOptions":
        """These options with settings as typed on a command line, seed=random among them. Raises `ConfigError`."""
        seed = settings.pop("seed", "random")
        sampling = self.sampling
        for name, text in settings.items():
            sampling = knobs.turn(sampling, name, text)
        if seed == "random":
            return replace(self, sampling=sampling)
        sampling = knobs.turn(sampling, "seed", seed)
        return replace(self, sampling=sampling, seed=sampling.seed)


def chat_command(
    path: Path,
    options: ChatOptions | None = None,
    *,
    name: str = "",
    tools: Sequence[Tool] = (),
    setup: Setup | None = None,
) -> int:
    """`puna chat PATH`: load the checkpoint or quantised artifact, talk, and return the exit code.

    `name` is what the model is called (the directory's name, if empty), `setup` how the engine is run. The chat begins
    with the first of its adapters.
    """
    engine = (setup or Setup()).open(path)
    return chat(engine, name=name or path.resolve().name, options=options, tools=tools)


def chat(
    engine: Any, *, name: str = "the model", options: ChatOptions | None = None, tools: Sequence[Tool] = ()
) -> int:
    """Talk to `engine` over stdin and stdout until the person leaves; returns the exit code.

    It is 0, or 1 if something typed into a pipe or given as `prompt` could not be answered. Raises `DataError` for a base
    model, which has no dialog format.
    """
    if engine.format.name == NONE:
        engine.format.render((user(""),))  # which says why not
    options = options or ChatOptions()
    conversation = Conversation(engine, system=options.system, sampling=options.sampling, tools=tools)
    conversation.seed = options.seed
    sys.stdout.reconfigure(errors="replace")
    screen = Screen(sys.stdout, sys.stderr)
    session = Session(conversation, screen)
    person = sys.stdin.isatty()
    if not person:
        sys.stdin.reconfigure(errors="replace")
    try:
        if options.prompt:
            piped = "" if person else sys.stdin.read()
            session.answer(conversation.ask("\n\n".join(filter(None, (options.prompt, piped.strip())))))
            return session.failures and 1
        if person:
            about = f"{engine.config.parameters:,} parameters, dialog format {engine.format.name}"
            screen.notice(f"{name}: {about}. /? for help.")
        session.talk(_typed if person else _piped, hints=person)
    except BrokenPipeError:  # `puna chat ... | head`: the reader has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0 if person else session.failures and 1


class Session:
    """Reads messages and commands, shows answers."""

    def __init__(self, conversation: Conversation, screen: Screen):
        self.conversation, self.screen = conversation, screen
        self.failures = 0

    def talk(self, read_line: ReadLine, *, hints: bool) -> None:
        """Until the input ends, `/bye`, or a second Ctrl-C in a row at the prompt (the first one hints)."""
        interrupted = False
        while True:
            try:
                message, is_command = read_message(read_line)
            except EOFError:
                if hints:
                    self.screen.say("\n")
                return
            except KeyboardInterrupt:
                self.screen.say("\n")
                if interrupted or not hints:
                    return
                interrupted = True
                self.screen.notice(f"Ctrl-C again leaves. {commands.LEAVING}")
                continue
            interrupted = False
            with suppress(KeyboardInterrupt):  # a second Ctrl-C while an answer does not stop at the first
                try:
                    self.take(message, is_command)
                except commands.Leave:
                    return

    def take(self, message: str, is_command: bool) -> None:
        """One message or command. Raises `Leave`."""
        with _stopping() as stopped:
            if not is_command:
                if message.strip():
                    self.answer(self.conversation.ask(message, stopped))
                return
            try:
                self.screen.notice(commands.run(self.conversation, message))
            except commands.Retry:
                self.answer(lambda: self.conversation.retry(stopped))
            except PunaError as error:
                self._fail(error)

    def answer(self, events: Iterator[Event] | Callable[[], Iterator[Event]]) -> None:
        """Show an answer as it comes."""
        try:
            for event in events() if callable(events) else events:
                self._show(event)
        except PunaError as error:
            self._fail(error)

    def _fail(self, error: PunaError) -> None:
        self.failures += 1
        self.screen.notice(str(error))

    def _show(self, event: Event) -> None:
        screen = self.screen
        if isinstance(event, Said):
            screen.say(event.text)
        elif isinstance(event, Used):
            screen.notice(f"[{shown_call(event.call)}]\n[= {event.result}]")
        elif isinstance(event, Forgot):
            screen.notice(
                f"the context of {self.conversation.engine.config.context:,} tokens is full: the oldest "
                f"{event.exchanges} exchange{'s are' if event.exchanges > 1 else ' is'} no longer seen by the model "
                "(/new starts afresh)"
            )
        else:
            self._show_end(event)

    def _show_end(self, event: Ended) -> None:
        self.screen.end_line()
        if event.reason == "length":
            self.screen.notice(self._why_cut(event))
        elif event.reason == "tool_calls":
            self.screen.notice("it asks for a tool, and gets none here (/tools on, or too many calls)")
        if self.screen.interactive:
            speed = f", {event.tokens_per_s:,.3g} tokens/s" if event.tokens_per_s else ""
            stopped = "stopped, " if event.reason == "stopped" else ""
            self.screen.notice(f"{stopped}{event.tokens:,} token{'' if event.tokens == 1 else 's'}{speed}\n")

    def _why_cut(self, event: Ended) -> str:
        limit = self.conversation.sampling.max_tokens
        if event.tokens >= limit:
            return f"cut at max_tokens={limit:,} (/set max_tokens N allows more)"
        return "cut: the context is full; the next question leaves the oldest exchanges out (/new starts afresh)"


def shown_call(call: ToolCall) -> str:
    """A tool call on a line or, for a program, on its own lines."""
    if call.dialect == "python":
        return f"{call.name}\n{call.arguments['code']}"
    arguments = ", ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in call.arguments.items())
    return f"{call.name}({arguments})"


def read_message(read_line: ReadLine) -> tuple[str, bool]:
    """The next message, and whether it is a command. Raises what `read_line` raises."""
    line = read_line(PROMPT)
    start = line.lstrip()
    if not start.startswith(FENCE):
        return line, start.startswith("/")
    lines = [start.removeprefix(FENCE)]
    while not lines[-1].rstrip().endswith(FENCE):
        try:
            lines.append(read_line(CONTINUED))
        except EOFError:  # the pipe ended inside: what is there is the message
            return "\n".join(lines).strip("\n"), False
    lines[-1] = lines[-1].rstrip().removesuffix(FENCE)
    return "\n".join(lines).strip("\n"), False


def _typed(prompt: str) -> str:
    """A line from the terminal; with readline, arrows edit it and recall earlier ones."""
    with suppress(ImportError):
        import readline  # noqa: F401  (importing it is what makes `input` use it)
    try:
        return input(prompt)
    except UnicodeDecodeError:
        return ""


def _piped(_prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Ctrl-C within asks to stop, between two tokens; the second one raises `KeyboardInterrupt`."""
    asked = False

    def ask(_signal: int, _frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
