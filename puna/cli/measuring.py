"""The verbs that judge and shrink any checkpoint: `eval` and `quantize`."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from puna.cli.paths import model_path
from puna.errors import ArtifactError, ConfigError

Add = Callable[..., argparse.ArgumentParser]
SUITES = ("text", "choice", "tasks")
LARGE = 6_000_000_000  # parameters from which groups of 64 are the default: 8B then fits 8.5 GB, or 5 GB at 4 bits


def add(commands: Any, add_command: Add) -> None:
    """Add the verbs to the command line."""
    _add_eval(commands, add_command)
    _add_quantize(commands, add_command)


def _add_eval(commands: Any, add_command: Add) -> None:
    sub = add_command(
        commands,
        "eval",
        _eval,
        "Measure a checkpoint of any format: how well it reads, chooses, and does tasks.",
        """suites:
  text     bits per byte and perplexity on your text, or on a held-out sample
  choice   multiple choice by likelihood: --choice FILE, or what belongs to the checkpoint's own run
  tasks    answers that are verified, with tools; needs a Llama 3 that can chat

examples:
  puna eval models/Llama-3.2-1B                          text alone
  puna eval llama.Q4_K_M.gguf --text book.txt notes.md   your text
  puna eval out/tiny --suite text choice tasks --json

A line of --choice FILE: {"context": "The sky is", "options": [" blue.", " green."], "answer": 0}""",
    )
    sub.add_argument("path", type=Path, help="a run's folder, or a checkpoint of any format, quantised or not")
    sub.add_argument(
        "--suite", nargs="+", choices=SUITES, default=None, help="default: text, and choice if given a file"
    )
    sub.add_argument("--text", nargs="+", type=Path, default=(), metavar="FILE", help="text to read, UTF-8")
    sub.add_argument("--choice", type=Path, default=None, metavar="FILE", help="multiple-choice items")
    sub.add_argument(
        "--max-bytes", type=int, default=200_000, help="of the held-out sample; your own text is read whole"
    )
    sub.add_argument(
        "--piece", type=int, default=2048, metavar="BYTES", help="text read at a time, from nothing before it"
    )
    sub.add_argument("--limit", type=int, default=40, help="items of each task")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="what is computed in")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--threads", type=int, default=None)
    sub.add_argument("--json", action="store_true", help="all numbers, to stdout")


def _eval(options: argparse.Namespace) -> int:
    import torch

    from puna.evaluation.heldout import HeldoutConfig
    from puna.posttrain import suites

    path = model_path(options.path)
    wanted = options.suite or (["text"] if options.text or not options.choice else []) + ["choice"] * bool(
        options.choice
    )
    if options.limit < 1:
        raise ConfigError(f"--limit {options.limit} must be positive", hint="0 items measure nothing")
    _compute_with(options.threads)
    heldout = HeldoutConfig(max_bytes=options.max_bytes, excerpt_bytes=options.piece, seed=options.seed)
    material = suites.text_for(path, options.text, heldout) if "text" in wanted else None
    model = _loaded(path, getattr(torch, options.dtype), answers="tasks" in wanted)
    found: dict[str, Any] = {"checkpoint": str(path)}
    if material is not None:
        found["text"] = {"origin": material.origin, **_read(model, material.excerpts, options.seed)}
    if "choice" in wanted:
        found["choice"] = suites.choices_for(model, path, options.choice)
    if "tasks" in wanted:
        found["tasks"] = suites.tasks_for(model, path, options.limit, options.seed)
    print(json.dumps(found, indent=1, ensure_ascii=False) if options.json else "\n".join(_told(found)))
    return 0


def _loaded(path: Path, dtype: Any, *, answers: bool) -> Any:
    """An engine if answers are asked for, else what can only read, which more checkpoints can."""
    from puna.inference.engine import Engine
    from puna.inference.scorer import Scorer

    return Engine.load(path, dtype=dtype) if answers else Scorer.load(path, dtype=dtype)


def _read(model: Any, excerpts: Any, seed: int) -> dict[str, Any]:
    from puna.evaluation.perplexity import text_report

    return text_report(model, excerpts, lambda text: len(model.tokenizer.encode(text)), seed)


def _told(found: dict[str, Any]) -> list[str]:
    lines = [found["checkpoint"]]
    if "text" in found:
        text = found["text"]
        lines += [
            f"text: {text['documents']:,} excerpts, {text['bytes']:,} bytes, {text['tokens']:,} tokens; {text['origin']}",
            f"  bits per byte   {_interval(text['overall'], '.4f')}",
            f"  perplexity      {_interval(text['perplexity'], '.3f')} per token of {text['bytes_per_token']:.2f} bytes",
        ]
        if len(text["by_source"]) > 1:
            lines += [f"    {name:<20}{_interval(part, '.4f')}" for name, part in text["by_source"].items()]
        lines.append(f"  read {text['tokens_per_s']:,.0f} tokens/s, {text['seconds']:.1f} s")
    for name, group in found.get("choice", {}).items():
        lines.append(f"choice, {name}: {group['items']} items, by chance {group['raw']['chance']:.0%}")
        lines.append(f"  raw             {_interval(group['raw'], '.1%')}")
        lines.append(f"  per byte        {_interval(group['per_byte'], '.1%')}")
    if "tasks" in found:
        tasks = found["tasks"]
        lines.append(f"tasks: {tasks['verified']['total']} items; {tasks['origin']}")
        for name, task in tasks["tasks"].items():
            lines.append(f"  {name:<26}{_interval(task, '.1%')}  {task['passed']} of {task['total']}")
        lines.append(f"  {'valid tool calls':<26}{_interval(tasks['valid_calls'], '.1%')}")
    return lines


def _compute_with(threads: int | None) -> None:
    """Let PyTorch use so many threads, as many as it likes for None. Raises `ConfigError` below one."""
    import torch

    if threads is None:
        return
    if threads < 1:
        raise ConfigError(f"--threads {threads} must be positive", hint="without it, one for each core")
    torch.set_num_threads(threads)


def _interval(estimate: dict[str, Any], form: str) -> str:
    if estimate["value"] is None:
        return "no items"
    value, low, high = (format(x, form) if x is not None else "?" for x in map(estimate.get, ("value", "low", "high")))
    return f"{value}  [{low}, {high}]" if low != "?" else f"{value}  (one excerpt: no interval)"


def _add_quantize(commands: Any, add_command: Add) -> None:
    sub = add_command(
        commands,
        "quantize",
        _quantize,
        "Write a smaller form of a checkpoint of any format: weights as integers with a scale for each group.",
        """examples:
  puna quantize models/Llama-3.1-8B small                     4 bits, 8 for the embedding
  puna quantize llama.gguf small --bits 8 --group 128
  puna quantize models/Llama-3.1-8B small --calibrate text.txt
  puna quantize models/Llama-3.1-8B small --budget 4.8GB      more bits where they matter most

What it costs is measured on held-out text and kept with the result (`puna show`). `puna chat`, `serve` and `eval` take
the result as it is. Interrupted, the same command continues.""",
    )
    sub.add_argument("source", type=Path, help="a run's folder, or a checkpoint of any format")
    sub.add_argument("out", type=Path)
    sub.add_argument("--bits", type=int, choices=(4, 6, 8), default=4)
    sub.add_argument(
        "--group", type=int, choices=(32, 64, 128), default=None,
        help="weights that share a scale; 64 by default from six billion parameters on, else 32",
    )  # fmt: skip
    sub.add_argument(
        "--embedding-bits", type=int, choices=(4, 6, 8, 16), default=8,
        help="of the embedding and the output matrix; of 8, the default, half is read for most tokens",
    )  # fmt: skip
    sub.add_argument("--asymmetric", action="store_true", help="an offset beside each scale")
    sub.add_argument(
        "--calibrate", nargs="?", const="", default=None, metavar="FILE",
        help="correct rounding by what a text puts into each matrix; without FILE, a sample of text",
    )  # fmt: skip
    sub.add_argument("--tokens", type=int, default=131_072, help="of the calibration text")
    sub.add_argument(
        "--budget",
        default="",
        metavar="SIZE",
        help="4.8GB (all files) or 4.5bpw (bits per weight): choose each matrix's bits",
    )
    sub.add_argument("--heldout", type=Path, default=None, metavar="FILE", help="text to measure the loss on")
    sub.add_argument("--quality-tokens", type=int, default=16_384, help="of that text; 0: do not measure")
    sub.add_argument("--threads", type=int, default=None)


def _quantize(options: argparse.Namespace) -> int:
    from puna.model.opening import open_checkpoint
    from puna.posttrain.suites import documents_of
    from puna.quant import QuantConfig, quantise

    source, out = model_path(options.source), options.out
    _compute_with(options.threads)
    _refuse_foreign(out)
    with open_checkpoint(source) as opened:
        group = options.group or (64 if opened.config.parameters >= LARGE else 32)
    config = QuantConfig(
        bits=options.bits,
        group_size=group,
        embedding_bits=options.embedding_bits,
        symmetric=not options.asymmetric,
        calibrate=options.calibrate is not None,
        calibration_tokens=options.tokens,
        budget=options.budget,
        quality_tokens=options.quality_tokens,
    )
    own = documents_of(source)
    calibration = Path(options.calibrate) if options.calibrate else own
    made = quantise(config, _input(source), calibration, options.heldout or own, out=out)
    print("\n".join(_made(out, made.metrics)))
    return 0


def _made(out: Path, metrics: dict[str, Any]) -> list[str]:
    from puna.quant.quality import in_words

    lines = _plan_lines(metrics) if "forms" in metrics else []
    size, before = _gigabytes(metrics["bytes"]), _gigabytes(metrics["checkpoint_bytes"])
    lines.append(f"{out}: {size} of weights, {metrics['bits_per_weight']:.2f} bits each (from {before})")
    if metrics["quality"]:
        lines.append(in_words(metrics["quality"]))
    return lines


def _plan_lines(metrics: dict[str, Any]) -> list[str]:
    """What each matrix got, a line for each layer, and what the next megabyte would have bought."""
    rows = metrics["forms"]
    owners: dict[str, list[str]] = {}
    for name, row in rows.items():
        layer, _, matrix = name.removesuffix(".weight").rpartition(".")
        owner = f"layer {layer.split('.')[1]}" if name.startswith("layers.") else matrix
        owners.setdefault(owner, []).append(f"{matrix} {row['form']}" if owner != matrix else row["form"])
    lines = ["bits/group of each matrix; the more predicted loss (KL) a megabyte saves there, the more it gets:"]
    for owner in sorted(owners, key=lambda o: (not o.startswith("layer"), len(o), o)):
        lines.append(f"  {owner:<15}" + "  ".join(owners[owner]))
    for title, key in (("worst served", "damage"), ("best use of another megabyte", "next_gain_per_mb")):
        name = max(rows, key=lambda n: rows[n][key])
        unit = "nats lost" if key == "damage" else "nats saved"
        lines.append(f"  {title}: {name} ({rows[name]['form']}), {rows[name][key]:.2g} {unit}")
    lines.append(f"  predicted KL {metrics['predicted_kl']:.5f} nats, if each matrix were rounded to the nearest")
    return lines


def _input(source: Path) -> Any:
    """The artifact at `source`, so that the result knows its lineage; else the path."""
    from puna import artifacts

    return artifacts.load(source) if (source / artifacts.MANIFEST).is_file() else source


def _refuse_foreign(out: Path) -> None:
    """Raises `ArtifactError` if `out` holds something that no interrupted or complete stage left there."""
    from puna.artifacts import BEGUN, MANIFEST

    if out.is_file() or (
        out.is_dir() and any(out.iterdir()) and not {BEGUN, MANIFEST} & {p.name for p in out.iterdir()}
    ):
        raise ArtifactError(f"{out} exists and is not a quantised model", hint="give a new name, or remove it")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
