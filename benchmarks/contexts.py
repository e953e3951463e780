"""How fast the engine decodes and reads behind long contexts, and what the cache takes: 1K, 8K, 32K and 128K tokens.

    python benchmarks/contexts.py                          the 1B shape, 4-bit weights, both kinds of cache
    python benchmarks/contexts.py --contexts 1024 8192     less of it

A context's keys and values are random: what they are takes no part in how long reading them takes. For each length the
cache is filled, then, in turns over the rounds: `--tokens` single steps (tokens per second; the bytes of weights and of
cache that a step reads over the bandwidth of a probe just before), and one piece of 512 tokens of a prompt behind that
context. What the cache was planned to take (blocks times their size) stands beside what the process grew by. Results go to
`benchmarks/results/contexts-DATE-SHAPE.json`. Nothing else should run on the machine meanwhile.
"""

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path

import numpy as np
from inference_peers import weights
from inference_peers.exchange import prompt
from inference_peers.probe import Probe
from machine import command, processor, revision

from puna import log
from puna.inference.native import NativeRunner
from puna.inference.spans import BLOCK_TOKENS, Span

RESULTS = Path(__file__).parent / "results"
PIECE = 512


def resident() -> int:
    """Bytes of this process in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


class Context:
    """A runner whose cache holds `length` random positions."""

    def __init__(self, path: Path, threads: int, kv: str, length: int):
        self.length, self.room = length, PIECE + 64
        self.blocks = list(range(-(-(length + self.room) // BLOCK_TOKENS)))
        self.runner = NativeRunner.load(path, dtype="bfloat16", threads=threads, kv=kv, blocks=len(self.blocks))
        self.runner.forward([Span(prompt(8), 0, self.blocks[:1], 1)])  # the weights are in memory from here on
        before = resident()
        self._fill()
        self.grown = resident() - before

    @property
    def planned(self) -> int:
        """Bytes of the blocks that hold the context."""
        return self.runner.cache.block_bytes * -(-self.length // BLOCK_TOKENS)

    def _fill(self) -> None:
        config, step = self.runner.config, 8192
        dice = np.random.default_rng(0)
        keys = dice.standard_normal((2, step, config.n_kv_heads, config.head_dim), dtype=np.float32)
        table = np.array(self.blocks, dtype=np.int32)
        for layer in range(config.n_layers):
            for start in range(0, self.length, step):
                count = min(step, self.length - start)
                self.runner.cache.write(layer, table, start, keys[0, :count], keys[1, :count])

    def decode(self, steps: int) -> float:
        """Seconds of a step; always the same positions."""
        seconds, token = [], 1
        for i in range(steps):
            began = time.perf_counter()
            logits = self.runner.forward([Span([token], self.length + i, self.blocks, 1)])
            token = int(logits[0].argmax())
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    def read(self) -> float:
        """Seconds for a piece of a prompt behind the context."""
        began = time.perf_counter()
        self.runner.forward([Span(prompt(PIECE), self.length, self.blocks, 1)])
        return time.perf_counter() - began


def measured(args: argparse.Namespace, kv: str, length: int, probe: Probe) -> dict:
    """One row."""
    context = Context(args.folder / args.form, args.threads, kv, length)
    context.decode(2)
    steps, pieces, bandwidths = [], [], []
    for _ in range(args.rounds):
        bandwidths.append(probe())
        steps.append(context.decode(args.tokens))
        pieces.append(context.read())
    step, bandwidth = statistics.median(steps), statistics.median(bandwidths)
    read = weights.read_per_token(args.folder / args.form) + context.planned
    row = {
        "cache": kv if kv == "int8" else "bfloat16", "context": length, "decode tok/s": round(1 / step, 2),
        "prompt tok/s": round(PIECE / statistics.median(pieces), 1), "bytes read per step": read,
        "probe GB/s": round(bandwidth, 1), "share of probe": round(read / step / bandwidth / 1e9, 3),
        "cache planned MB": round(context.planned / 1e6, 1), "process grew MB": round(context.grown / 1e6, 1),
    }  # fmt: skip
    log.info(", ".join(f"{key} {value}" for key, value in row.items()))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(weights.SHAPES), default="1b")
    parser.add_argument("--form", choices=["hf", "int8", "int4"], default="int4")
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192, 32768, 131072 - PIECE - 64])
    parser.add_argument("--caches", nargs="+", choices=["model", "int8"], default=["model", "int8"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--into", type=Path, default=Path("out/benchmarks/inference"), help="where the weights lie")
    args = parser.parse_args()
    args.folder = args.into / args.shape
    weights.write(weights.shape(args.shape), args.form, args.folder / args.form)
    probe = Probe(args.threads)
    rows = [measured(args, kv, length, probe) for length in args.contexts for kv in args.caches]
    print(f"{'context':>8} {'cache':9} {'decode':>8} {'prompt':>8}  {'share':>6}  {'planned':>9} {'grew':>9}")
    for row in rows:
        print(
            f"{row['context']:8,} {row['cache']:9} {row['decode tok/s']:8.1f} {row['prompt tok/s']:8.1f}"
            f"  {row['share of probe']:6.0%}  {row['cache planned MB']:6,.0f} MB {row['process grew MB']:6,.0f} MB"
        )
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"contexts-{datetime.date.today()}-{args.shape}.json"
    record = {"command": command(), "machine": processor(), "revision": revision(), "form": args.form, "rows": rows}
    file.write_text(json.dumps(record, indent=1) + "\n")
    log.info(f"written to {file}")


if __name__ == "__main__":
    main()
