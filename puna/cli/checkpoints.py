"""The verbs for checkpoints from elsewhere: `pull`, `inspect`, `verify`, `convert`."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from puna.cli.paths import model_path

Add = Callable[..., argparse.ArgumentParser]


def add(commands: Any, add_command: Add) -> None:
    """Add the verbs to the command line."""
    _add_pull(commands, add_command)
    _add_inspect(commands, add_command)
    _add_verify(commands, add_command)
    _add_convert(commands, add_command)


def _add_pull(commands: Any, add_command: Add) -> None:
    sub = add_command(
        commands,
        "pull",
        _pull,
        "Fetch a checkpoint from the hub, and check it.",
        """examples:
  puna pull meta-llama/Llama-3.2-1B-Instruct            into models/Llama-3.2-1B-Instruct
  puna pull meta-llama/Llama-3.1-8B --original          Meta's own folder
  puna pull owner/model-GGUF --files '*Q4_K_M.gguf'     one file

Interrupted, the same command continues. HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are respected.""",
    )
    sub.add_argument("name", metavar="OWNER/MODEL")
    sub.add_argument("out", type=Path, nargs="?", help="folder; models/MODEL by default")
    sub.add_argument("--revision", default="main", help="branch, tag or commit")
    sub.add_argument("--original", action="store_true", help="Meta's own format instead of Hugging Face's")
    sub.add_argument("--files", nargs="+", default=(), metavar="PATTERN", help="exactly these files")


def _pull(options: argparse.Namespace) -> int:
    from puna.model.pull import PullConfig, pull

    config = PullConfig(revision=options.revision, original=options.original, files=tuple(options.files))
    out = options.out or Path("models") / options.name.rpartition("/")[2]
    print(pull(options.name, out, config))
    return 0


def _add_inspect(commands: Any, add_command: Add) -> None:
    sub = add_command(
        commands,
        "inspect",
        _inspect,
        "Say what a checkpoint is, and what it takes to run it, from its headers alone.",
        "example:\n  puna inspect models/Llama-3.1-8B-Instruct",
    )
    sub.add_argument("path", type=Path)
    sub.add_argument("--json", action="store_true")


def _inspect(options: argparse.Namespace) -> int:
    from puna.model.inspect import inspect
    from puna.model.opening import open_checkpoint

    path = model_path(options.path)
    with open_checkpoint(path) as opened:
        found, notes = inspect(opened.kind, opened.config, opened.weights), opened.notes
    if options.json:
        print(json.dumps(asdict(found), indent=1))
        return 0
    c = found.config
    print(f"{path}: {found.family or 'a Llama of a size of its own'} ({found.kind})")
    print(f"  {found.parameters:,} parameters in {found.tensors} tensors")
    print(f"  {c.n_layers} layers, width {c.dim}, feed-forward {c.ffn_dim}, vocabulary {c.vocab_size:,}")
    print(f"  {c.n_heads} heads of {c.head_dim}, {c.n_kv_heads} for keys and values; context {c.context:,} tokens")
    scaling = f", stretched {c.rope_scaling.factor:g}x" if c.rope_scaling else ""
    print(f"  rotary base {c.rope_theta:,.0f}{scaling}; output {'tied to' if c.tied else 'apart from'} the embedding")
    for form, (tensors, size) in found.forms.items():
        print(f"  stored   {tensors:>6,} tensors {form:>5}  {_size(size):>9}")
    print("  memory to run it, weights and cache, for a context of")
    lengths = list(next(iter(found.memory.values())))
    print("           " + "".join(f"{n:>12,}" for n in lengths))
    for form, sizes in found.memory.items():
        print(f"    {form:>5}  " + "".join(f"{_size(size):>12}" for size in sizes.values()))
    for note in (*notes, *found.oddities):
        print(f"  note: {note}")
    return 0


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"


def _add_verify(commands: Any, add_command: Add) -> None:
    sub = add_command(
        commands,
        "verify",
        _verify,
        "Say whether two checkpoints compute the same, and if not, from which layer on.",
        "example:\n  puna verify models/original models/converted\n\nExit code 0: they do; 1: they do not.",
    )
    sub.add_argument("a", type=Path)
    sub.add_argument("b", type=Path)
    sub.add_argument("--prompts", type=int, default=4)
    sub.add_argument("--tokens", type=int, default=128, help="of each prompt")
    sub.add_argument("--tolerance", type=float, default=1e-3, help="of the relative difference of a layer")
    sub.add_argument("--seed", type=int, default=0)


def _verify(options: argparse.Namespace) -> int:
    from puna.model.opening import load_checkpoint
    from puna.model.verify import VerifyConfig, compare

    asked = VerifyConfig(prompts=options.prompts, tokens=options.tokens, tolerance=options.tolerance, seed=options.seed)
    found = compare(load_checkpoint(model_path(options.a)), load_checkpoint(model_path(options.b)), asked)
    for note in found.notes:
        print(f"note: {note}")
    for number, difference in enumerate(found.layers):
        print(f"{f'layer {number}' if number else 'embedding':>10}  relative difference {difference:.2e}")
    print(f"{'logits':>10}  relative difference {found.logits:.2e}, largest {found.largest_logit_difference:.2e}")
    print(f"both prefer the same token at {found.same_choice:.2%} of {asked.prompts * asked.tokens:,} places")
    if found.same:
        print(f"the same, within {found.tolerance:g}")
        return 0
    print(f"not the same: the first difference above {found.tolerance:g} is at {found.first_divergence}")
    return 1


def _add_convert(commands: Any, add_command: Add) -> None:
    sub = add_command(
        commands,
        "convert",
        _convert,
        "Write a checkpoint in another format.",
        """formats:
  huggingface   a folder, as transformers and vLLM read it          F32, F16, BF16
  meta          a folder, as Meta released it                       F32, F16, BF16
  gguf          a file, as llama.cpp reads it                       F32, F16, BF16, Q8_0, Q4_0, Q4_K_M

examples:
  puna convert models/Llama-3.2-1B llama.gguf --to gguf --form Q4_K_M
  puna convert llama.gguf models/again --to huggingface --form BF16""",
    )
    sub.add_argument("source", type=Path)
    sub.add_argument("out", type=Path)
    sub.add_argument("--to", required=True, choices=("huggingface", "meta", "gguf"))
    sub.add_argument("--form", default="", help="number format; by default the source's")
    sub.add_argument("--shards", type=int, default=1, help="files of Meta's format")


def _convert(options: argparse.Namespace) -> int:
    from puna.model.conversion import convert

    convert(model_path(options.source), options.out, options.to, options.form, options.shards)
    print(options.out)
    return 0
