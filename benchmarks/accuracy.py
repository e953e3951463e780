"""What quantising costs: our 8 and 4 bits beside llama.cpp's kinds, from the same checkpoint, on the same text.

    python benchmarks/accuracy.py CHECKPOINT TEXT [--tokens 8192] [--window 512] [--int4 FOLDER]

For each format: bits per weight of the whole model; the mean Kullback-Leibler divergence of its next-token distribution from
that of the unquantised weights in float32, in nats per token, with its standard error; how often the most likely token is
the same; and the ratio of the perplexities. All formats read the same windows of the text's tokens, each from an empty
context. Ours are quantised here by `puna.quant` (or given: a calibrated folder, say); the GGUF files by our own writer, whose
blocks are at least as close to the weights as llama.cpp's (`tests/model/gguf`), or given. llama.cpp computes its own rows,
activations in 8 bits and all, our native kernels ours.

Random weights say nothing here: take a trained model. Results go to `benchmarks/results/accuracy-DATE-NAME.json`.
"""

import argparse
import datetime
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import torch
from inference_peers.llamacpp import LlamaCpp
from inference_peers.ours import native_runner
from machine import processor, revision
from torch import Tensor

from puna import log
from puna.inference.native import NativeRunner
from puna.inference.spans import BLOCK_TOKENS, Span
from puna.model.conversion import convert
from puna.model.gguf.format import Container
from puna.model.opening import checkpoint_tokenizer
from puna.quant.forms import QuantConfig
from puna.quant.stage import quantise

RESULTS = Path(__file__).parent / "results"
LLAMACPP = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}  # by its own numbers
Reader = Callable[[list[int]], Tensor]  # tokens -> logits (tokens, V)


def windows(checkpoint: Path, text: Path, tokens: int, window: int) -> list[list[int]]:
    """The text's first tokens, cut up."""
    ids = checkpoint_tokenizer(checkpoint).encode(text.read_text(encoding="utf-8"))[:tokens]
    return [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)]


def native(runner: NativeRunner) -> Reader:
    def read(ids: list[int]) -> Tensor:
        blocks = list(range(-(-len(ids) // BLOCK_TOKENS)))
        return torch.from_numpy(runner.forward([Span(ids, 0, blocks, len(ids))]))

    return read


def llamacpp(path: Path, threads: int) -> Reader:
    engine = LlamaCpp(str(path), threads)
    engine.load()
    return lambda ids: torch.from_numpy(engine.logits(ids))


def compare(read: Reader, texts: list[list[int]], truth: list[Path]) -> dict[str, float]:
    """Divergence from the stored log-probabilities, agreement, and perplexity's ratio."""
    divergences, same, worse = [], [], []
    for ids, file in zip(texts, truth):
        p = torch.load(file, weights_only=True)
        q = read(ids)[:, : p.shape[1]].float().log_softmax(-1)
        divergences.append((p.exp() * (p - q)).sum(-1))
        same.append((p.argmax(-1) == q.argmax(-1)).float())
        following = torch.tensor(ids[1:])[:, None]
        worse.append((p[:-1].gather(1, following) - q[:-1].gather(1, following)).flatten())
    kl, agree, loss = (torch.cat(parts) for parts in (divergences, same, worse))
    return {
        "divergence": float(kl.mean()),
        "standard error": float(kl.std() / math.sqrt(len(kl))),
        "same top token": float(agree.mean()),
        "perplexity ratio": float(loss.mean().exp()),
    }


def stored_bits(path: Path, parameters: int) -> float:
    """Bits per weight, of all tensors."""
    if path.is_file():
        with Container(path) as file:
            return 8 * sum(info.bytes for info in file.tensors.values()) / parameters
    return 8 * (path / "model.safetensors").stat().st_size / parameters


def candidates(args: argparse.Namespace, scratch: Path) -> list[tuple[str, Path]]:
    """(name, where) of each format; what is not given is made in `scratch`."""
    found = []
    for bits in (8, 4):
        given = getattr(args, f"int{bits}")
        out = given or scratch / f"int{bits}"
        if given is None:
            quantise(QuantConfig(bits=bits, group_size=32, quality_tokens=0), args.checkpoint, out=out)
        found.append((f"ours int{bits}" + (f" ({given.name})" if given else " g32"), out))
    convert(args.checkpoint, scratch / "whole.gguf", "gguf", "F32")
    for kind, number in LLAMACPP.items():
        out = scratch / f"{kind}.gguf"
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = number, args.threads
        paths = [str(path).encode() for path in (scratch / "whole.gguf", out)]
        if llama_cpp.llama_model_quantize(*paths, settings):
            raise SystemExit(f"llama.cpp cannot quantise {args.checkpoint} to {kind}")
        found.append((f"llama.cpp {kind}", out))
        out = scratch / f"{kind}-ours.gguf"
        convert(args.checkpoint, out, "gguf", kind)
        found.append((f"llama.cpp {kind}, our file", out))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path, help="UTF-8; text that the model was not trained on")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    for name in ("int8", "int4"):
        parser.add_argument(f"--{name}", type=Path, help="a folder that was quantised before")
    args = parser.parse_args()
    texts = windows(args.checkpoint, args.text, args.tokens, args.window)
    if not texts:
        parser.error(f"{args.text} has fewer than {args.window} tokens")
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        scratch = Path(folder)
        whole = native_runner(args.checkpoint, args.threads, torch.float32)
        parameters, read = whole.config.parameters, native(whole)
        truth = []
        for number, ids in enumerate(texts):
            truth.append(scratch / f"{number}.pt")
            torch.save(read(ids).log_softmax(-1), truth[-1])
        for name, path in candidates(args, scratch):
            reader = native(native_runner(path, args.threads)) if path.is_dir() else llamacpp(path, args.threads)
            rows.append(
                {"format": name, "bits per weight": stored_bits(path, parameters)} | compare(reader, texts, truth)
            )
            log.info(f"{name}: {rows[-1]['divergence']:.5f}")
    print(
        f"{len(texts)} windows of {args.window} tokens\n{'format':30} bits   divergence (nats)     same top   perplexity"
    )
    for row in sorted(rows, key=lambda r: -r["bits per weight"]):
        print(
            f"{row['format']:30} {row['bits per weight']:4.2f}   {row['divergence']:.6f} ± {row['standard error']:.6f}"
            f"   {row['same top token']:7.2%}   x {row['perplexity ratio']:.4f}"
        )
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"accuracy-{datetime.date.today()}-{args.checkpoint.name}.json"
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": processor(),
        "revision": revision(),
        "formats": rows,
    }
    file.write_text(json.dumps(result, indent=1) + "\n")
    log.info(f"written to {file}")


if __name__ == "__main__":
    main()
