"""The verbs `pretrain` and `train`: a run from a size or a file of settings, over one process or many; or, dry, who would
hold what. The first learns text from random weights; the second whatever its settings say, mostly from a checkpoint."""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna import artifacts, config
from puna.config import require
from puna.errors import ConfigError, PunaError
from puna.model.sizes import SIZES, LlamaConfig
from puna.parallel.layout import Layout

if TYPE_CHECKING:
    from puna.train.settings import TrainConfig

Add = Callable[..., argparse.ArgumentParser]
GENERATIONS = ("llama-3.1", "llama-3.2", "llama-3.3", "llama-3", "llama-2", "llama-1")  # in which `8b` is looked for
LONGEST = 8192  # tokens of a sequence, unless it is said: what Llama 3 starts with


DATA = {"lm": "tokens", "sft": "dialogs", "dpo": "preferences", "reward": "preferences"}  # what an objective reads


def add(commands: Any, add_command: Add) -> None:
    """Add the verbs to the command line."""
    _add_options(
        add_command(
            commands,
            "train",
            _train,
            "Train a model on text, dialogs or preferences, in one process or in many.",
            """examples:
  puna train sft.json --data out/dialogs --tokenizer out/tokenizer --base out/base --out out/sft
  puna train dpo.json --processes 2 --data out/preferences --tokenizer out/tokenizer --base out/sft --out out/dpo
  puna train reward.json --processes 4 --layout tensor=2 shard=2 --data out/preferences \\
      --tokenizer out/tokenizer --base out/base --out out/reward

The file says what is learnt: it has one of lm, sft, dpo, reward (`puna stage train --settings` shows the form).
Layouts, --processes and what happens after an interruption are as for `puna pretrain`.""",
        )
    )
    sub = add_command(
        commands,
        "pretrain",
        _pretrain,
        "Train a model from random weights, in one process or in many.",
        """examples:
  puna pretrain run.json --data out/tokens --tokenizer out/tokenizer --out out/base
  torchrun --nproc-per-node 8 -m puna.cli pretrain 1b lm.sequence_length=4096 steps=1000 \\
      --layout tensor=2 shard=4 --data out/tokens --tokenizer out/tokenizer --out out/base
  puna pretrain run.json --processes 4 --data out/tokens --tokenizer out/tokenizer --out out/base
  puna pretrain 405b lm.rows=2048 --layout tensor=8 pipeline=16 shard=128 --dry-run

A layout says how many ways the run is split: tensor, context, pipeline, shard, replicate; also sequence_parallel,
stages_per_rank, microbatches, in_flight, layers_per_stage. The product of the first five is the number of processes.
With --processes (one machine) or under torchrun the run survives faults by itself: docs/faults.md.
Interrupted, the same command continues where it was, with the same layout or another.""",
    )
    _add_options(sub)


def _add_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("what", help="a size (8b, llama-3.2-1b) or a JSON file with settings of the stage `train`")
    sub.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="any setting, e.g. steps=1000 lm.rows=64")
    sub.add_argument("--layout", nargs="+", default=[], metavar="NAME=VALUE", help="over how many processes, and how")
    sub.add_argument("--data", nargs="+", type=Path, default=[], help="what it learns from; several are put together")
    sub.add_argument("--tokenizer", type=Path, default=None)
    sub.add_argument("--base", type=Path, default=None, help="a checkpoint to go on from, instead of random weights")
    sub.add_argument("--out", type=Path, default=None, help="the checkpoint's folder")
    sub.add_argument(
        "--processes", type=int, default=0, help="start so many on this machine, watch them, and start them again"
    )
    sub.add_argument("--dry-run", action="store_true", help="say who would hold what, and run nothing")


def _pretrain(options: argparse.Namespace) -> int:
    settings = _settings(options)
    hint = f"`puna train {options.what}` trains on dialogs and preferences"
    require(settings.lm is not None, "pretraining has the objective lm", hint=hint)
    return _run(options, settings)


def _train(options: argparse.Namespace) -> int:
    return _run(options, _settings(options))


def _run(options: argparse.Namespace, settings: "TrainConfig") -> int:
    if options.dry_run:
        print("\n".join(dry_run(settings)))
        return 0
    for name in ("data", "tokenizer", "out"):
        require(
            bool(getattr(options, name)), f"--{name} is not given", hint=f"say where with --{name} PATH, or --dry-run"
        )
    from puna.train.processes import first, train_together
    from puna.train.resilience.ranks import train_watched

    watched = options.processes > 0
    if watched and settings.layout.world == 1:
        settings = replace(settings, layout=replace(settings.layout, replicate=options.processes))
    if watched:
        settings.layout.check_world(options.processes)

    [kind] = [kind for objective, kind in DATA.items() if getattr(settings, objective) is not None]
    data = [artifacts.load(path, kind) for path in options.data]
    tokenizer = artifacts.load(options.tokenizer, "tokenizer")
    base = artifacts.load(options.base, "checkpoint") if options.base else None
    try:
        run = train_watched if watched else train_together
        made = run(settings, data if len(data) > 1 else data[0], tokenizer, base, out=options.out)
    except PunaError as error:
        if first():
            raise
        return error.exit_code  # the first process has said it
    if first():
        print(made.path)
    return 0


def _settings(options: argparse.Namespace) -> "TrainConfig":
    from puna.train.settings import TrainConfig

    path = Path(options.what)
    if path.suffix == ".json":
        try:
            given = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{path} is not JSON: {error}", hint="`puna stage train --settings` shows the form"
            ) from None
        settings = config.from_json(TrainConfig, given)
    else:
        settings = _of_size(size(options.what))
    settings = config.override(settings, options.settings)
    return replace(settings, layout=config.override(settings.layout, options.layout))


def _of_size(shape: LlamaConfig) -> "TrainConfig":
    from puna.train.objectives.lm import LmObjective
    from puna.train.settings import TrainConfig

    return TrainConfig(model=shape, lm=LmObjective(sequence_length=min(LONGEST, shape.context)))


def size(name: str) -> LlamaConfig:
    """A published size by its name or the name's end: `8b` is Llama 3.1's."""
    known = [generation for generation in GENERATIONS if f"{generation}-{name.lower()}" in SIZES]
    if name.lower() not in SIZES and not known:
        raise ConfigError(f"{name!r} is no size and no .json file", hint=f"sizes are {', '.join(SIZES)}")
    return SIZES.get(name.lower()) or SIZES[f"{known[0]}-{name.lower()}"]


def dry_run(settings: "TrainConfig") -> list[str]:
    """Who holds what, memory per rank and communication per step, by formula: nothing is allocated."""
    shape, layout = settings.model, settings.layout
    require(shape is not None, "a dry run needs a size", hint="name one, or set `model` in the file")
    require(settings.lm is not None, "only pretraining (lm) is laid out before it runs", hint="set `lm`")
    lines = [f"{shape.parameters:,} parameters over {layout.world:,} processes: {layout}"]
    lines += _seats(layout)
    for phase in settings.phases:
        layout.check_model(shape, phase.sequence_length)
        lines += ["", f"phase {phase.name}: {phase.rows:,} sequences of {phase.sequence_length:,} tokens per step"]
        lines += _held(shape, layout, phase.sequence_length, phase.rows, settings.speed.recompute)
    return lines


def _seats(layout: Layout) -> list[str]:
    """How ranks are counted."""
    lines, stride = [], 1
    what = {
        "tensor": "cut each matrix of a layer; neighbours in rank",
        "context": "cut each sequence",
        "pipeline": f"hold {layout.stages_per_rank} of {layout.stages} stages each",
        "shard": "have rows of their own, and cut the weights further (with the context ranks)",
        "replicate": "are whole copies of all that",
    }
    for name in ("tensor", "context", "pipeline", "shard", "replicate"):
        count = getattr(layout, name)
        if count > 1:
            lines.append(f"  {name:<10}{count:>5,} ranks, every {stride:,}: {what[name]}")
        stride *= count
    return lines


def _held(shape: LlamaConfig, layout: Layout, sequence_length: int, rows: int, recompute: str) -> list[str]:
    from puna.planner.choice import OURS
    from puna.planner.collectives import traffic_per_step
    from puna.planner.memory import memory_per_rank, rank_parameters, sharded
    from puna.planner.work import Work

    # what the trainer does: products in bfloat16 by autocast, nothing fused
    kept = {ours: planned for planned, ours in OURS.items()}[recompute]
    work = Work(
        sequence_length=sequence_length, rows=rows, autocast=True, compiled=False, chunked_loss=True, recompute=kept
    )
    lines = ["", "memory of a rank, GB"]
    for rank, count in _alike(shape, layout).items():
        kinds = memory_per_rank(shape, layout, work, rank)
        own = sharded(rank_parameters(shape, layout, work, rank), layout)
        shares = ", ".join(f"{kind} {value / 1e9:.2f}" for kind, value in kinds.by_kind().items())
        lines.append(f"  {_stages(shape, layout, rank, count)}")
        lines.append(f"    {own:,.0f} parameters; {kinds.total / 1e9:.2f} = {shares}")
    lines += ["", "communication of a rank per step"]
    traffic = [t for t in traffic_per_step(shape, layout, work, 0) if t.sent]
    for exchange in traffic:
        n = exchange.group.size
        lines.append(f"  {exchange.name:<42}{exchange.sent / 1e9:>12,.3f} GB in {exchange.times:,.0f} among {n:,}")
    if not traffic:
        lines.append("  none")
    return lines


def _alike(shape: LlamaConfig, layout: Layout) -> dict[int, int]:
    """Pipeline ranks to show, and how many in a row hold as much as each: the first, the last, and what lies between."""
    layers = layout.stage_layers(shape.n_layers)
    found: dict[int, int] = {}
    for rank in range(layout.pipeline):
        held = [len(layers[stage]) for stage in layout.stages_of(rank)]
        ends = rank in (0, layout.pipeline - 1)
        before = rank - 1
        if not ends and before > 0 and [len(layers[s]) for s in layout.stages_of(before)] == held:
            found[next(reversed(found))] += 1
        else:
            found[rank] = 1
    return found


def _stages(shape: LlamaConfig, layout: Layout, rank: int, count: int) -> str:
    """Which layers a pipeline rank holds, and which part of each."""
    layers = layout.stage_layers(shape.n_layers)
    held = [f"{layers[s].start} to {layers[s].stop - 1}" for s in layout.stages_of(rank)]
    ends = ["embedding"] * (rank == 0) + ["output"] * (rank == layout.pipeline - 1)
    who = f"pipeline rank {rank}" + (f" (so do the {count - 1} after it, with their layers)" if count > 1 else "")
    part = f", 1/{layout.tensor} of each matrix" if layout.tensor > 1 else ""
    cut = layout.shard * layout.context
    rows = f", cut over {cut} ranks" if cut > 1 else ""
    return f"{who}: layers {', '.join(held)}{' and ' + ' and '.join(ends) if ends else ''}{part}{rows}"
