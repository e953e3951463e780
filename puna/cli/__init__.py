"""The command line: `puna run`, `chat`, `serve`, `show`, and `stage` for any single stage.

Settings are `name=value`, typed and checked: an unknown one is answered with the nearest known. A user's error is shown
as what happened and what to do next, without a traceback; the exit code is not 0.
"""

import argparse
import errno
import importlib
import inspect
import io
import json
import os
import sys
import typing
from pathlib import Path
from typing import Any

from puna import __version__, artifacts, config, log
from puna.artifacts import Artifact
from puna.cli import checkpoints, measuring, planning, pretraining, running, scaling, simulating, talking
from puna.cli.paths import model_path
from puna.errors import ConfigError, PunaError

RECIPES = {"tiny": "a 3M-parameter Llama 3.1 made from raw text on a laptop CPU in about a quarter of an hour"}

STAGES = {
    "curate": "puna.curation.curate",
    "mix": "puna.curation.mix",
    "train_tokenizer": "puna.tokenizer.train",
    "tokenise": "puna.tokenizer.shards",
    "train": "puna.train.loop",
    "build_world": "puna.posttrain.world",
    "build_dialogs": "puna.posttrain.tasks.build",
    "sample": "puna.posttrain.sampling",
    "prefer": "puna.posttrain.preferences",
    "reject": "puna.posttrain.rejection",
    "average": "puna.posttrain.averaging",
    "evaluate": "puna.posttrain.evaluation",
    "measure_bits": "puna.posttrain.evaluation",
    "measure_baselines": "puna.evaluation.baselines",
    "check_contamination": "puna.posttrain.evaluation",
    "quantise": "puna.quant",
    "fit_scaling": "puna.scaling.stage",
    "write_report": "puna.evaluation.report",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code. Installed as `puna`."""
    options = parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files are bytes, and not always text
    try:
        return options.command(options) or 0
    except PunaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        again = "starts over" if options.verb in _FROM_THE_START else "continues where it was"
        print(f"\ninterrupted; the same command {again}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError:
        print("error: there is not enough memory\nhint: give a smaller model, or close other programs", file=sys.stderr)
        return 6
    except OSError as error:
        if error.errno not in _DISK:
            raise
        print(f"error: {error.strerror}: {error.filename or 'the output'}\nhint: {_DISK[error.errno]}", file=sys.stderr)
        return 6


_FROM_THE_START = ("convert", "verify", "inspect", "eval", "chat", "serve", "show")  # they keep nothing half-done

_DISK = {
    errno.ENOSPC: "free some space, then run the same command again: it continues where it was",
    errno.EDQUOT: "free some of your quota, then run the same command again: it continues where it was",
    errno.EROFS: "the disk is read-only: choose another place with out=PATH",
    errno.EFBIG: "files of this size are not allowed there: choose another place, or raise the limit (ulimit -f)",
    errno.ENOENT: "check the spelling",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EISDIR: "a folder is in the way: choose another place",
    errno.EIO: "the disk does not answer: look at the system's messages",
    errno.EACCES: "you may not read or write there: choose another place, or change the permissions",
    errno.ENOTDIR: "a file is in the way: choose another place with out=PATH",
    errno.EEXIST: "a file is in the way: choose another place with out=PATH",
    errno.EPERM: "you may not write there: choose another place with out=PATH",
}


def parser() -> argparse.ArgumentParser:
    """The commands and their help."""
    top = argparse.ArgumentParser(
        prog="puna",
        description="The whole Llama 3.1 system: raw text in, a chatting, evaluated, quantised model out.",
        epilog="Start with `puna run tiny`; then `puna chat out/tiny`. Each command has its own --help.",
    )
    top.add_argument("--version", action="version", version=f"puna {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", dest="verb", required=True)
    _add_run(commands)
    talking.add(commands, _add)
    _add_show(commands)
    _add_stage(commands)
    checkpoints.add(commands, _add)
    measuring.add(commands, _add)
    pretraining.add(commands, _add)
    running.add(commands, _add)
    simulating.add(commands, _add)
    scaling.add(commands, _add)
    planning.add(commands, _add)
    return top


def _add(commands: Any, name: str, command: Any, summary: str, epilog: str) -> argparse.ArgumentParser:
    sub = commands.add_parser(
        name, help=summary, description=summary, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sub.set_defaults(command=command)
    return sub


def _add_run(commands: Any) -> None:
    sub = _add(
        commands,
        "run",
        _run,
        "Run a recipe: every stage from raw text to the report.",
        """examples:
  puna run tiny                       the embedded corpus, into out/tiny
  puna run tiny data=~/texts          your own .txt .md .jsonl(.zst) .parquet .warc.gz
  puna run tiny out=out/second seed=1 another seed, another place
  puna run tiny rounds=2              two rounds of post-training
  puna run tiny --settings            print every setting and its value, run nothing

Interrupted (Ctrl-C, kill -9, power), the same command continues where it was.
Run again when complete, it does nothing and says so.""",
    )
    sub.add_argument("recipe", choices=RECIPES, help="; ".join(f"{k}: {v}" for k, v in RECIPES.items()))
    sub.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="out, data, seed, rounds, or any setting")
    sub.add_argument("--settings", action="store_true", dest="print_settings", help="print all settings, run nothing")


def _run(options: argparse.Namespace) -> int:
    recipe = importlib.import_module(f"puna.recipes.{options.recipe}")
    arguments, rest = _split(options.settings, inspect.signature(recipe.recipe).parameters)
    out = Path(arguments.pop("out", None) or Path("out") / options.recipe)
    settings = config.override(recipe.recipe(**_typed(recipe.recipe, arguments)), rest)
    if options.print_settings:
        print(json.dumps(config.to_json(settings), indent=1))
        return 0
    recipe.run(settings, out)
    return 0


def _split(assignments: list[str], own: typing.Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Settings that are the recipe's (or stage's) own arguments, and those of its configuration."""
    mine, rest = {}, []
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if equals and name in (*own, "out"):
            mine[name] = value
        else:
            rest.append(assignment)
    return mine, rest


def _typed(function: Any, arguments: dict[str, str]) -> dict[str, Any]:
    hints = typing.get_type_hints(function)
    return {name: config.parse(hints[name], text, name) for name, text in arguments.items()}


def _add_show(commands: Any) -> None:
    sub = _add(
        commands,
        "show",
        _show,
        "Say what an artifact is, and where it comes from, back to the raw data.",
        "example:\n  puna show out/tiny/06-base",
    )
    sub.add_argument("path", type=Path)
    sub.add_argument("--json", action="store_true", help="the whole manifest")


def _show(options: argparse.Namespace) -> int:
    path = model_path(options.path)
    artifact = artifacts.load(path)
    if options.json:
        print(json.dumps(artifact.manifest, indent=1, ensure_ascii=False))
        return 0
    manifest = artifact.manifest
    size = sum(f["size"] for f in manifest["files"].values())
    print(f"{path}: {artifact.kind}, made by {artifact.stage}")
    print(f"  created  {manifest['created']} in {log.duration(manifest['seconds'])}, by puna {manifest['code']}")
    print(f"  digest   {artifact.digest}")
    print(f"  files    {len(manifest['files'])}, {size:,} bytes")
    for name, record in manifest["files"].items():
        print(f"    {record['size']:>14,}  {name}")
    for title, values in (("settings", artifact.config), ("metrics", artifact.metrics)):
        print(f"  {title}")
        for name, value in _flat(values):
            print(f"    {name} = {value}")
    print("  lineage")
    for depth, role, recorded, parent in artifacts.ancestry(artifact):
        what = f"{parent.kind}, made by {parent.stage}" if parent else "raw data, or not there any more"
        print(f"  {'  ' * depth}{role}: {recorded} ({what})")
    return 0


def _flat(values: dict[str, Any], prefix: str = "") -> typing.Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            text = json.dumps(value, ensure_ascii=False)
            yield f"{prefix}{name}", text if len(text) <= 100 else f"{text[:97]}..."


def _add_stage(commands: Any) -> None:
    names = ", ".join(STAGES)
    sub = _add(
        commands,
        "stage",
        _stage,
        "Run a single stage, as recipes do.",
        f"""Inputs and settings are NAME=VALUE; an input is a path (several: separated by commas).
stages: {names}

examples:
  puna stage curate pages=~/texts out=out/text
  puna stage train_tokenizer documents=out/text out=out/tokenizer vocab_size=8192
  puna stage curate --settings""",
    )
    sub.add_argument("name", choices=STAGES, metavar="STAGE")
    sub.add_argument("settings", nargs="*", metavar="NAME=VALUE")
    sub.add_argument("--config", type=Path, help="a JSON file with the stage's settings, e.g. from a manifest")
    sub.add_argument("--settings", action="store_true", dest="print_settings", help="print all settings, run nothing")


def _stage(options: argparse.Namespace) -> int:
    function = getattr(importlib.import_module(STAGES[options.name]), options.name)
    plain = inspect.unwrap(function)
    roles = [name for name in inspect.signature(plain).parameters if name not in ("config", "out")]
    hints = typing.get_type_hints(plain)
    given, rest = _split(options.settings, roles)
    start = json.loads(options.config.read_text()) if options.config else {}
    try:
        settings = config.override(config.from_json(hints["config"], start), rest)
    except TypeError as error:
        raise ConfigError(str(error), hint="give these settings by --config FILE.json") from None
    if options.print_settings:
        print(json.dumps(config.to_json(settings), indent=1))
        return 0
    if "out" not in given:
        raise ConfigError("no place to write to", hint="give out=PATH")
    inputs = [_input(hints[role], role, given.get(role)) for role in roles]
    made = function(settings, *inputs, out=Path(given["out"]))
    print(f"{made.path}: {made.kind}")
    return 0


def _input(hint: Any, role: str, text: str | None) -> Any:
    if text is None:
        if type(None) in typing.get_args(hint):
            return None
        raise ConfigError(f"the input {role!r} is missing", hint=f"give {role}=PATH")
    if typing.get_origin(hint) is list or ("," in text and list[Artifact] in typing.get_args(hint)):
        return [artifacts.load(p) for p in text.split(",")]
    return artifacts.load(text) if Artifact in (hint, *typing.get_args(hint)) else Path(text).expanduser()
