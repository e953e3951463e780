"""The `/` commands of the chat: a table, from which `/help` is made.

Each is a function of the conversation and the rest of the line, and gives the text to show. What it refuses is a
`PunaError`. The few that concern the session itself, `/retry` and `/bye`, are signals to it.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from puna.errors import PunaError
from puna.serve import knobs
from puna.serve.conversation import Conversation


class Leave(Exception):
    """The person wants to go."""


class Retry(Exception):
    """The person wants another answer to the last question."""


@dataclass(frozen=True)
class Command:
    """How a command is written, what it does in a few words, and the function."""

    usage: str
    meaning: str
    run: Callable[[Conversation, str], str]


def run(conversation: Conversation, line: str) -> str:
    """Carry out a line that starts with `/`; returns what to show. Raises `PunaError`, `Leave` or `Retry`."""
    name, _, argument = line.strip().partition(" ")
    name = ALIASES.get(name, name)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, [*COMMANDS, *ALIASES], n=1)
        start = f"did you mean {near[0]}? " if near else ""
        raise PunaError(
            f"{name} is not a command", hint=f'{start}/help lists them; """ around a message sends it as it is'
        )
    return COMMANDS[name].run(conversation, argument.strip())


def _help(_conversation: Conversation, _argument: str) -> str:
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"  {command.usage:<{width}}  {command.meaning}" for command in COMMANDS.values()]
    return "\n".join(
        [*lines, "", '  """ opens and closes a message of several lines.', f"  Ctrl-C stops an answer. {LEAVING}"]
    )


def _system(conversation: Conversation, argument: str) -> str:
    conversation.system = argument
    return "the system message is set" if argument else "there is no system message now"


def _set(conversation: Conversation, argument: str) -> str:
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    if not name:
        return _settings(conversation)
    if not value.strip() and name != "stop":
        raise PunaError(f"/set {name} needs a value", hint="e.g. /set temperature 0.7")
    conversation.set(name, value.strip())
    return _settings(conversation)


def _settings(conversation: Conversation) -> str:
    shown = {name: getattr(conversation.sampling, name) for name in knobs.KNOBS}
    shown["seed"] = "random" if conversation.seed is None else conversation.seed
    lines = [f"  {name:<12} {value!s:<8} {knobs.KNOBS[name].meaning}" for name, value in shown.items()]
    return "\n".join([*lines, f"  {'stop':<12} {' '.join(conversation.sampling.stop) or '(none)'}"])


def _show(conversation: Conversation, _argument: str) -> str:
    context = conversation.engine.config.context
    tools = ", ".join(tool.name for tool in conversation.tools) or "none"
    state = "on" if conversation.tools_on else "off"
    facts = {
        "parameters": f"{conversation.engine.config.parameters:,}",
        "context": f"{conversation.tokens:,} of {context:,} tokens used",
        "messages": str(len(conversation.messages)),
        "system": conversation.system or "(none)",
        "dialog": conversation.engine.format.name,
        "adapter": conversation.adapter or "(none)",
        "tools": f"{tools} ({state})" if conversation.tools else tools,
    }
    return "\n".join([*(f"  {name:<12} {value}" for name, value in facts.items()), _settings(conversation)])


def _clear(conversation: Conversation, _argument: str) -> str:
    conversation.clear()
    return "a new conversation"


def _retry(_conversation: Conversation, _argument: str) -> str:
    raise Retry


def _save(conversation: Conversation, argument: str) -> str:
    path = _path(argument, "/save")
    conversation.save(path)
    return f"saved to {path}"


def _load(conversation: Conversation, argument: str) -> str:
    path = _path(argument, "/load")
    conversation.load(path)
    return f"loaded {len(conversation.messages)} messages from {path}"


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise PunaError(f"{command} needs the name of a file", hint=f"e.g. {command} chat.json")
    return Path(argument).expanduser()


def _tools(conversation: Conversation, argument: str) -> str:
    if argument not in ("", "on", "off"):
        raise PunaError(f"/tools {argument}: not understood", hint="/tools on, or /tools off")
    if argument == "on" and not conversation.tools:
        raise PunaError("there are no tools here", hint="start the chat with tools")
    if argument:
        conversation.tools_on = argument == "on"
    names = ", ".join(tool.name for tool in conversation.tools)
    return f"tools are {'on: ' + names if conversation.tools_on else 'off'}"


def _adapter(conversation: Conversation, argument: str) -> str:
    known = conversation.engine.adapters
    if argument and argument not in (*known, "off"):
        hint = f"loaded: {', '.join(known)}; or off" if known else "start the chat with --adapter NAME=FOLDER"
        raise PunaError(f"there is no adapter {argument!r}", hint=hint)
    if argument:
        conversation.adapter = None if argument == "off" else argument
    return f"adapter: {conversation.adapter or 'off'} (loaded: {', '.join(known) or 'none'})"


def _bye(_conversation: Conversation, _argument: str) -> str:
    raise Leave


LEAVING = "Ctrl-D or /bye leaves."
COMMANDS = {
    "/help": Command("/help", "this list (also /?)", _help),
    "/new": Command("/new", "start a new conversation (also /clear)", _clear),
    "/retry": Command("/retry", "answer the last question again", _retry),
    "/system": Command("/system TEXT", "set the system message; without TEXT, none", _system),
    "/set": Command("/set NAME VALUE", "change a setting, e.g. /set temperature 0.7; alone, list them", _set),
    "/tools": Command("/tools on|off", "let the model use tools, or not", _tools),
    "/adapter": Command("/adapter NAME|off", "answer with this adapter, or without; alone, list them", _adapter),
    "/show": Command("/show", "the model, the context, the settings", _show),
    "/save": Command("/save FILE", "write the conversation to a file", _save),
    "/load": Command("/load FILE", "go on with a saved conversation", _load),
    "/bye": Command("/bye", "leave (also /exit)", _bye),
}
ALIASES = {"/?": "/help", "/clear": "/new", "/exit": "/bye", "/quit": "/bye"}
