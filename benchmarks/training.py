"""Training speed on a CPU, beside others, on the same shapes, the same rows and from the same first weights.

    python benchmarks/training.py --minutes 15                                          both shapes, all contenders
    python benchmarks/training.py --shapes 7m --minutes 1 --contenders ours plain       a look

A round gives each contender in turn a few steps of 16 x 256 tokens; the next round begins with another contender, so that
whatever slows the machine down slows all of them. A contender's figure is the median over its steps. Before each round
the machine's peak is measured (bfloat16 products of 2048^3), and shares of the peak are of the median of that. Rounds go
on until the time is up, but two at least; a third of the time is the small shape's.

    ours                  the training loop's placement: forward, backward, clip, fused AdamW
    plain                 a hand-written loop around the plain model: bf16 autocast, full logits, fused AdamW
    plain compiled        the same under torch.compile
    transformers          LlamaForCausalLM as Trainer runs it at its best: bf16 autocast, fused AdamW, SDPA
    transformers compiled the same under torch.compile
    litgpt                its GPT in its pretraining step, bf16 autocast
    litgpt compiled       the same under torch.compile
    nanochat              its GPT, of the same depth and widths (two matrices of 4 D where Llama has three), in bfloat16
    nanochat compiled     the same under torch.compile, as its own loop runs it

All do the same work in a step: 4,096 tokens of whole rows, gradients, clip at norm 1, fused AdamW. All are given the loop's
settings of memory (`hardware.prepare`: freed blocks are kept, large pages), which their own loops do not make. Losses of
the first steps are compared with the best peer's that computes the same model; nanochat's is another one.

litgpt comes by `pip install --no-deps --target DIR litgpt lightning lightning-utilities pytorch-lightning torchmetrics psutil`,
nanochat is no package: a checkout; both are found through PYTHONPATH. Who is not there is named with the reason. Writes
`benchmarks/results/training-DATE.json`; nothing else should run meanwhile.
"""

import argparse
import datetime
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import command, processor, revision
from torch import Tensor, nn

from puna.model import convert
from puna.model.llama import Llama, attend_with
from puna.model.sizes import LlamaConfig
from puna.parallel.whole import Whole
from puna.train import hardware
from puna.train.fused import fuse
from puna.train.objectives.rows import Rows, next_token_loss
from puna.train.optimizers import OptimizerConfig, optimizers

SHAPES = {
    "7m": LlamaConfig(
        dim=256, n_layers=6, n_heads=4, n_kv_heads=2, head_dim=64, ffn_dim=768, vocab_size=4096, context=256
    ),
    "42m": LlamaConfig(
        dim=512, n_layers=8, n_heads=8, n_kv_heads=4, head_dim=64, ffn_dim=1536, vocab_size=16384, context=256
    ),
}
ROWS, LENGTH, RATE = 16, 256, 1e-3
LEAST_ROUNDS = 2
Step = Callable[[Tensor], float]  # one update on tokens (ROWS, LENGTH + 1); the loss before it


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def start(config: LlamaConfig) -> Llama:
    """The first weights, the same for all."""
    return Llama(config).init_weights(0)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser that all are given: decay on matrices only, as in the paper."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)


def stepping(model: nn.Module, loss_of: Callable[[Tensor], Tensor]) -> Step:
    """The customary step around a loss."""
    optimizer = adamw(model)

    def step(tokens: Tensor) -> float:
        optimizer.zero_grad()
        with autocast():
            loss = loss_of(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


class Objective:
    loss = staticmethod(next_token_loss)


def ours(config: LlamaConfig) -> Step:
    placement = Whole(fuse(start(config)))
    made = optimizers(placement, OptimizerConfig(), RATE)

    def step(tokens: Tensor) -> float:
        documents = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
        weights = torch.ones(ROWS, LENGTH)
        rows = Rows(tokens=tokens[:, :-1], targets=tokens[:, 1:], documents=documents, weights=weights)
        loss, _ = placement.backward(Objective, [rows])
        placement.clip(1.0)
        for optimizer in made:
            optimizer.step()
        placement.updated()
        return loss

    return step


def plain(config: LlamaConfig, *, compiled: bool = False) -> Step:
    model = start(config)
    positions, attend = torch.arange(LENGTH)[None], attend_with(None)

    def loss_of(tokens: Tensor) -> Tensor:
        logits = model(tokens[:, :-1], positions, attend)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return stepping(model, torch.compile(loss_of) if compiled else loss_of)


def transformers(config: LlamaConfig, *, compiled: bool = False) -> Step:
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    theirs = TheirConfig(
        hidden_size=config.dim, intermediate_size=config.ffn_dim, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim,
        vocab_size=config.vocab_size, max_position_embeddings=config.context, rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, tie_word_embeddings=False,
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(theirs).float()
    model.load_state_dict(convert.to_hf(start(config).state_dict(), config.head_dim))
    model.train()

    def loss_of(tokens: Tensor) -> Tensor:
        logits = model(input_ids=tokens[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return stepping(model, torch.compile(loss_of) if compiled else loss_of)


def litgpt(config: LlamaConfig, *, compiled: bool = False) -> Step:
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    theirs = Config(
        name="shape", block_size=config.context, vocab_size=config.vocab_size, padded_vocab_size=config.vocab_size,
        n_layer=config.n_layers, n_head=config.n_heads, n_query_groups=config.n_kv_heads, n_embd=config.dim,
        head_size=config.head_dim, rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", norm_eps=config.norm_eps, mlp_class_name="LLaMAMLP",
        intermediate_size=config.ffn_dim, rope_base=int(config.rope_theta),
    )  # fmt: skip
    model = GPT(theirs)
    _take_weights(model, start(config))

    def loss_of(tokens: Tensor) -> Tensor:
        return chunked_cross_entropy(model(tokens[:, :-1].contiguous()), tokens[:, 1:].contiguous(), chunk_size=0)

    return stepping(model, torch.compile(loss_of) if compiled else loss_of)


def nanochat(config: LlamaConfig, *, compiled: bool = False) -> Step:
    os.environ.setdefault("NANOCHAT_DTYPE", "bfloat16")  # by itself it takes float32 on a CPU
    from nanochat.gpt import GPT, GPTConfig

    theirs = GPTConfig(
        sequence_len=LENGTH, vocab_size=config.vocab_size, n_layer=config.n_layers, n_head=config.n_heads,
        n_kv_head=config.n_kv_heads, n_embd=config.dim, window_pattern="L",
    )  # fmt: skip
    model = GPT(theirs)
    model.init_weights()
    model.float()  # its embeddings, too, so that one fused optimiser serves all
    model.cos, model.sin = model.cos.bfloat16(), model.sin.bfloat16()
    through = torch.compile(model, dynamic=False) if compiled else model
    return stepping(model, lambda tokens: through(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))


@torch.no_grad()
def _take_weights(model: nn.Module, source: Llama) -> None:
    """Our weights in litgpt's modules."""
    E = source.config.head_dim
    model.transformer.wte.weight.copy_(source.tok_embeddings.weight)
    model.lm_head.weight.copy_(source.output.weight)
    model.transformer.ln_f.weight.copy_(source.norm.weight)
    for theirs, layer in zip(model.transformer.h, source.layers, strict=True):
        a, f = layer.attention, layer.feed_forward
        q, k = (convert.to_hf_rows(m.weight, E) for m in (a.wq, a.wk))
        theirs.attn.qkv.weight.copy_(torch.cat((q, k, a.wv.weight)))
        theirs.attn.proj.weight.copy_(a.wo.weight)
        theirs.mlp.fc_1.weight.copy_(f.w1.weight)
        theirs.mlp.fc_2.weight.copy_(f.w3.weight)
        theirs.mlp.proj.weight.copy_(f.w2.weight)
        theirs.norm_1.weight.copy_(layer.attention_norm.weight)
        theirs.norm_2.weight.copy_(layer.ffn_norm.weight)


CONTENDERS: dict[str, Callable[[LlamaConfig], Step]] = {
    "ours": ours,
    "plain": plain,
    "plain compiled": lambda config: plain(config, compiled=True),
    "transformers": transformers,
    "transformers compiled": lambda config: transformers(config, compiled=True),
    "litgpt": litgpt,
    "litgpt compiled": lambda config: litgpt(config, compiled=True),
    "nanochat": nanochat,
    "nanochat compiled": lambda config: nanochat(config, compiled=True),
}
OF_THIS_PROJECT = {"ours", "plain", "plain compiled"}
OTHER_MODEL = {"nanochat", "nanochat compiled"}


def made(names: list[str], config: LlamaConfig) -> tuple[dict[str, Step], dict[str, str]]:
    """The contenders that can run here, and why others cannot."""
    found, missing = {}, {}
    for name in names:
        if name.endswith("compiled") and not any(map(shutil.which, ("g++", "clang++"))):
            missing[name] = "no C++ compiler on this machine"
            continue
        try:
            found[name] = CONTENDERS[name](config)
        except ImportError as error:
            missing[name] = f"not installed: {error}"
    return found, missing


def peak(size: int = 2048) -> float:
    """FLOP/s of a bfloat16 product, the best of three."""
    a, b = (torch.randn(size, size).bfloat16() for _ in range(2))
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def text(config: LlamaConfig, step: int) -> Tensor:
    """Rows that can be learnt: each token is one of eight that its predecessor allows."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.empty(ROWS, LENGTH + 1, dtype=torch.int64)
    tokens[:, 0] = torch.randint(0, config.vocab_size, (ROWS,), generator=generator)
    choices = torch.randint(0, 8, (ROWS, LENGTH), generator=generator)
    for i in range(LENGTH):
        tokens[:, i + 1] = (tokens[:, i] * 31 + choices[:, i] * 97 + 7) % (config.vocab_size // 8)
    return tokens


def measure(config: LlamaConfig, names: list[str], until: float, steps: int, curve: int) -> dict:
    """All contenders on one shape, in rounds until the moment `until`."""
    contenders, missing = made(names, config)
    losses: dict[str, list[float]] = {name: [] for name in contenders}
    for name, step in list(contenders.items()):
        started = time.perf_counter()
        try:
            for number in range(curve):
                losses[name].append(step(text(config, number)))
        except Exception as error:  # a peer that fails is no result, and must not take the others with it
            if name == "ours":
                raise
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            del contenders[name], losses[name]
        print(f"  {name}: {curve} steps for the curve in {time.perf_counter() - started:.0f} s", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    processor_s: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: list[float] = []
    order = list(contenders)
    lasted = 0.0
    while len(peaks) < LEAST_ROUNDS or time.monotonic() + lasted < until:
        number, began = len(peaks), time.monotonic()
        peaks.append(peak())
        for name in order[number % len(order) :] + order[: number % len(order)]:
            for extra in range(steps):
                tokens = text(config, 1000 + number * steps + extra)
                started, used = time.perf_counter(), time.process_time()
                contenders[name](tokens)
                seconds[name].append(time.perf_counter() - started)
                processor_s[name].append(time.process_time() - used)
        speeds = {name: round(ROWS * LENGTH / statistics.median(seconds[name])) for name in order}
        lasted = time.monotonic() - began
        print(f"  round {number + 1}, {lasted:.0f} s: {speeds}", flush=True)
    return summary(config, seconds, processor_s, losses, peaks) | {"missing": missing}


def summary(config: LlamaConfig, seconds: dict, processor_s: dict, losses: dict, peaks: list[float]) -> dict:
    """Figures of a shape."""
    tokens, usual = ROWS * LENGTH, statistics.median(peaks)
    flops = tokens * config.train_flops_per_token(LENGTH)
    found = {}
    for name, times in seconds.items():
        middle = statistics.median(times)
        found[name] = {
            "tokens_per_s": round(tokens / middle),
            "least and most": [round(tokens / max(times)), round(tokens / min(times))],
            "tokens per second of processor time": round(tokens / statistics.median(processor_s[name])),
            "share of bf16 peak, causal": round(flops / middle / usual, 3),
            "first losses": [round(loss, 4) for loss in losses[name]],
        }
    result = {"parameters": config.parameters, "bf16 peak, Gop/s": round(usual / 1e9), "rounds": len(peaks)}
    result["contenders"] = found
    if "ours" in found:
        for name in found.keys() - {"ours"}:
            found[name]["ours over it"] = round(found["ours"]["tokens_per_s"] / found[name]["tokens_per_s"], 2)
        for kind, own in (("best peer", OF_THIS_PROJECT), ("best of all others", {"ours"})):
            if others := {name: found[name]["tokens_per_s"] for name in found.keys() - own}:
                result[kind] = best = max(others, key=others.get)
                result[f"ours / {kind}"] = found[best]["ours over it"]
        same = {name: found[name]["tokens_per_s"] for name in found.keys() - {"ours"} - OTHER_MODEL}
        if same:
            fastest = max(same, key=same.get)
            pairs = zip(found["ours"]["first losses"], found[fastest]["first losses"])
            result["largest difference of the first losses"] = round(max(abs(a - b) for a, b in pairs), 4)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--minutes", type=float, default=15, help="for all of it, compiling included")
    parser.add_argument("--steps", type=int, default=3, help="of each contender in each round")
    parser.add_argument("--curve", type=int, default=5, help="steps whose losses are compared; they warm up, too")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/training-DATE.json")
    options = parser.parse_args()
    hardware.prepare(options.threads)
    results, until = {}, time.monotonic()
    shares = {"7m": 1, "42m": 2}
    for shape in options.shapes:
        print(shape, flush=True)
        until += 60 * options.minutes * shares[shape] / sum(shares[s] for s in options.shapes)
        results[shape] = measure(SHAPES[shape], options.contenders, until, options.steps, options.curve)
        print(json.dumps(results[shape], indent=1))
    record = {
        "command": command(),
        "revision": revision(),
        "processor": f"{processor()}, {options.threads} threads",
        "torch": torch.__version__,
        "batch": [ROWS, LENGTH],
        "shapes": results,
    }
    default = Path(__file__).parent / "results" / f"training-{datetime.date.today()}.json"
    (options.out or default).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
