"""What `puna eval` asks of any checkpoint: text to read, multiple choice, and tasks whose answers are verified.

text     held-out text; of a checkpoint of ours, what its own run held out, found by its lineage; else a sample of the
         text that every machine with Python has (which a model from elsewhere may have read)
choice   multiple choice by likelihood: a user's file, or the facts of the checkpoint's own run
tasks    verified answers, with tools: the evaluation items of the checkpoint's own run, or, for a model from
         elsewhere, newly invented ones (a world's facts are left out: it cannot know them)
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna import artifacts
from puna.artifacts import Artifact
from puna.chat import Generator, Sampling
from puna.curation.embedded import embedded_sample
from puna.errors import DataError
from puna.evaluation.choice import choice_report, read_choices
from puna.evaluation.excerpts import cut, read_files
from puna.evaluation.heldout import Excerpt, HeldoutConfig, choose, sample_excerpts
from puna.inference.engine import Engine
from puna.posttrain.evaluation import verified_scores
from puna.posttrain.tasks.build import PLAN, DialogConfig, build_dialogs
from puna.posttrain.tasks.dialogs_io import read_items
from puna.posttrain.tasks.item import Item
from puna.posttrain.tasks.runner import run_items
from puna.posttrain.tasks.toolbox import Toolbox
from puna.posttrain.world import World, WorldConfig, build_world, load_world

OF_ONE_WORLD = ("facts", "unknown")  # tasks about people that only a run's own models have read of
MAX_TOKENS = 40  # of an answer, as in the recipe's evaluation


@dataclass(frozen=True, kw_only=True)
class SuiteText:
    """What text is read, and where it comes from, in words."""

    origin: str
    excerpts: Sequence[Excerpt]


def ancestor(path: Path, *, kind: str = "", made_by: str = "") -> Artifact | None:
    """The nearest artifact of a kind, or made by a stage, that the model at `path` comes from; None if it is not there."""
    if not (path / artifacts.MANIFEST).is_file():
        return None
    line = [(depth, a) for depth, _, _, a in artifacts.ancestry(artifacts.load(path)) if a is not None]
    found = [(depth, a) for depth, a in line if kind in ("", a.kind) and made_by in ("", a.stage)]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def documents_of(path: Path) -> Artifact | None:
    """The documents that the model at `path` was pretrained on, if they are still where they were."""
    tokens = ancestor(path, kind="tokens")
    return tokens and ancestor(tokens.path, kind="documents")


def text_for(path: Path, files: Sequence[Path], config: HeldoutConfig) -> SuiteText:
    """The given files, whole, in pieces of `config.excerpt_bytes`; or a held-out sample for the model at `path`."""
    if files:
        texts = ((name, Path(name).name, text) for name, text in read_files(files))
        return SuiteText(origin=", ".join(map(str, files)), excerpts=cut(texts, config.excerpt_bytes))
    documents = documents_of(path)
    if documents:
        return SuiteText(
            origin=f"held out from its own run ({documents.path})", excerpts=sample_excerpts(documents, config)
        )
    sample = ((d.id, d.source, d.text) for d in embedded_sample("heldout"))
    return SuiteText(
        origin="a sample of the text that comes with Python and its packages", excerpts=choose(sample, config)
    )


def choices_for(generator: Generator, path: Path, file: Path | None) -> dict[str, Any]:
    """`choice_report` by group. Raises `DataError` where there are no items."""
    if file is None:
        dialogs = ancestor(path, made_by="build_dialogs")
        if dialogs is None:
            raise DataError(
                f"no multiple choice belongs to {path}", hint="give items of your own with --choice FILE.jsonl"
            )
        file = dialogs.file("choice.jsonl")
    return {name: choice_report(generator, name, items) for name, items in read_choices(file).items()}


def tasks_for(engine: Engine, path: Path, limit: int, seed: int = 0) -> dict[str, Any]:
    """`evaluation.verified_scores` of greedy answers to at most `limit` items of each task, and the items' `origin`."""
    own = ancestor(path, made_by="build_dialogs")
    world = own and ancestor(own.path, made_by="build_world")
    with tempfile.TemporaryDirectory() as scratch:
        if own is None or world is None:
            origin = f"invented for this measurement, seed {seed}"
            places, items = _invented(Path(scratch), limit, seed)
        else:
            origin = f"the evaluation items of its own run ({own.path})"
            places, items = load_world(world), read_items(own.file("eval.jsonl"))
    with Toolbox(places) as tools:
        sampling = Sampling(max_tokens=MAX_TOKENS)
        outcomes = run_items(engine, _first(items, limit), tools_for=tools, sampling=sampling, label="tasks")
    return {"origin": origin, **verified_scores(outcomes)}


def _invented(scratch: Path, limit: int, seed: int) -> tuple[World, list[Item]]:
    world = build_world(WorldConfig(seed=seed), out=scratch / "world")
    nothing = dict.fromkeys(PLAN, 0)
    asked = {task: 0 if task in OF_ONE_WORLD else min(limit, row[3]) for task, row in PLAN.items()}
    config = DialogConfig(seed=seed, demonstrations=nothing, prompts=nothing, dev=nothing, evaluation=asked, choices=0)
    dialogs = build_dialogs(config, world, out=scratch / "dialogs")
    return load_world(world), read_items(dialogs.file("eval.jsonl"))


def _first(items: Sequence[Item], limit: int) -> list[Item]:
    counts: dict[str, int] = {}
    chosen = []
    for item in items:
        counts[item.task] = counts.get(item.task, 0) + 1
        if counts[item.task] <= limit:
            chosen.append(item)
    return chosen
