"""The verbs that talk to a model: `chat` in the terminal, `serve` for programs and the page; and how its engine is run."""

import argparse
import typing
from pathlib import Path
from typing import Any

from puna import config
from puna.cli.asking import amount_of
from puna.cli.paths import model_path
from puna.errors import ConfigError

DIALOG_HELP = (
    "how the model is spoken to: meta, huggingface, function, pythonic, llama3, llama2, or raw, which continues what is "
    "typed (default: as the checkpoint says)"
)


def add(commands: Any, add_command: Any) -> None:
    """Add this file's commands to the parser."""
    chat = add_command(
        commands,
        "chat",
        _chat,
        "Talk to a model in the terminal.",
        """examples:
  puna chat out/tiny                         the run's final model
  puna chat out/tiny/10-int4                 any checkpoint or quantised checkpoint
  puna chat out/tiny "What is 17 + 25?"      one answer, then leave (a pipe's text is added to the question)
  echo "What is 17 + 25?" | puna chat out/tiny
  puna chat models/8B --kv int8 --draft models/1B --adapter pirate=adapters/pirate

In the chat: /help lists the commands, Ctrl-C stops an answer, /bye leaves.""",
    )
    chat.add_argument("path", type=Path, help="a run's folder, a checkpoint, or a quantised checkpoint")
    chat.add_argument("prompt", nargs="*", help="a question to answer, instead of a conversation")
    chat.add_argument("--system", default="", help="the system message")
    chat.add_argument("--temperature", default="0.6")
    chat.add_argument("--top-p", default="0.9")
    chat.add_argument("--max-tokens", default="1024", help="longest answer, in tokens")
    chat.add_argument("--seed", default="random", help="a number makes answers repeatable")
    chat.add_argument("--no-tools", action="store_true", help="do not let the model use the run's tools")
    chat.add_argument("--dialog", default="", metavar="FORMAT", help=DIALOG_HELP)
    adapters = "a LoRA adapter in peft's form; the chat begins with the first one, /adapter changes it (repeatable)"
    _add_engine(chat, adapters)
    _add_serve(commands, add_command)


def _add_serve(commands: Any, add_command: Any) -> None:
    serve = add_command(
        commands,
        "serve",
        _serve,
        "Answer OpenAI's API, and show a chat page, on this machine.",
        """examples:
  puna serve out/tiny                        http://127.0.0.1:8000, page at /, API at /v1
  puna serve out/tiny --port 9000 --api-key secret
  puna serve models/8B --cache 8GB --kv int8 --slots 32
  puna serve models/8B --adapter pirate=adapters/pirate --adapter poet=adapters/poet

Then, with the official client: OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").
An adapter is chosen by its name as `model`, the model without one by its own; /v1/models lists them.
/metrics says how large the cache is, how much of it is held, and how many guesses were right.""",
    )
    serve.add_argument("path", type=Path, help="a run's folder, a checkpoint, or a quantised checkpoint")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--api-key", default=None, help="required from every client, if given")
    serve.add_argument("--name", default="", help="what clients call the model (default: the folder's name)")
    serve.add_argument("--no-tools", action="store_true", help="do not let the page's model use the run's tools")
    serve.add_argument("--dialog", default="", metavar="FORMAT", help=DIALOG_HELP)
    adapters = "a LoRA adapter in peft's form, which clients ask for by `model`: NAME (repeatable)"
    engine = _add_engine(serve, adapters)
    engine.add_argument("--slots", metavar="N", help="answers written at the same time (default: 16)")
    engine.add_argument(
        "--queue", metavar="N", help="requests that may wait; more are told to come later (default: 64)"
    )


def _add_engine(sub: argparse.ArgumentParser, adapters: str) -> Any:
    engine = sub.add_argument_group("the engine")
    engine.add_argument("--threads", metavar="N", help="processor threads to compute with (default: one for each core)")
    engine.add_argument(
        "--cache",
        metavar="SIZE",
        help="memory for keys and values, e.g. 4GB; it bounds the context and how many answers run at once "
        "(default: 2 GiB, or a full context's if that is more, at most half of the machine's memory)",
    )
    engine.add_argument("--cache-tokens", metavar="N", help="the same in tokens of all answers together, e.g. 32768")
    engine.add_argument(
        "--kv",
        metavar="KIND",
        help="how keys and values are kept: model, as it computes them (default), or int8, in about half the memory of "
        "16 bits, at a small loss",
    )
    engine.add_argument(
        "--lookahead",
        metavar="N",
        help="guess N tokens ahead, by what followed the last words earlier in the text; answers stay the same, and come "
        "sooner where they repeat their question (default: 0, off; 4 with --draft)",
    )
    engine.add_argument(
        "--draft", type=Path, metavar="PATH", help="a smaller model of the same vocabulary that guesses"
    )
    engine.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER", help=adapters)
    return engine


def _setup(options: argparse.Namespace) -> Any:
    """The engine's settings as given. Raises `ConfigError`."""
    from puna.inference.setup import Setup

    hints = typing.get_type_hints(Setup)
    given: dict[str, Any] = {"dialog": options.dialog, "draft": options.draft and model_path(options.draft)}
    for name in ("threads", "kv", "lookahead", "slots", "queue"):
        text = getattr(options, name, None)
        if text is not None:
            given[name] = config.parse(hints[name], text, f"--{name}")
    if options.cache is not None:
        given["cache_bytes"] = _whole("--cache", options.cache, "4GB or 500MB")
    if options.cache_tokens is not None:
        given["cache_tokens"] = _whole("--cache-tokens", options.cache_tokens, "32768")
    return Setup(**given, adapters=tuple(_adapter(text) for text in options.adapter))


def _whole(flag: str, text: str, example: str) -> int:
    try:
        return int(amount_of(text))
    except ConfigError:
        raise ConfigError(f"{flag} {text!r} is not a size above 0", hint=f"write {flag} {example}") from None


def _adapter(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals or not folder:
        raise ConfigError(f"--adapter {text!r} is not NAME=FOLDER", hint="e.g. --adapter pirate=adapters/pirate")
    return name, Path(folder).expanduser()


def _chat(options: argparse.Namespace) -> int:
    from puna.serve.terminal import ChatOptions, chat_command

    setup, path = _setup(options), model_path(options.path)
    chosen = ChatOptions(system=options.system, prompt=" ".join(options.prompt)).with_settings(
        temperature=options.temperature, top_p=options.top_p, max_tokens=options.max_tokens, seed=options.seed
    )
    tools = ()
    if not options.no_tools:
        from puna.serve.companion import Companion

        tools = Companion.read(options.path).tools()
    return chat_command(path, chosen, name=options.path.resolve().name, tools=tools, setup=setup)


def _serve(options: argparse.Namespace) -> int:
    from puna.serve.companion import Companion
    from puna.serve.http import serve

    setup, companion = _setup(options), Companion.read(options.path)
    serve(
        model_path(options.path),
        host=options.host,
        port=options.port,
        api_key=options.api_key,
        name=options.name or options.path.resolve().name,
        examples=companion.examples,
        tools=() if options.no_tools else companion.tools(),
        setup=setup,
    )
    return 0
