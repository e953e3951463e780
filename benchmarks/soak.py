"""A long run of the engine under everything at once: does it leak, and is every answer the one it gives alone?

    python benchmarks/soak.py                    10,000 requests
    python benchmarks/soak.py --requests 500     a small one

Requests of mixed length arrive at random at an engine whose cache holds a few of them and whose queue is short. Some are
given up half-way, some stop at a string, some are bad (too long, out of range), some find the queue full. At the end

    every answer     equals the one that its request gets alone, in an engine of its own, under greedy
    no block         is held, and the queue is empty
    memory           is what it was after the first requests: nothing was kept

The model is a small random one in float64, so that sums in another order never turn a token.
"""

import argparse
import gc
import random
import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import torch

from puna.chat import Completion, Request, Sampling
from puna.errors import BusyError, PunaError
from puna.inference.engine import Engine
from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig
from puna.tokenizer import Tokenizer

BLOCKS = 40  # of the cache: a few requests of the longest kind
WARM_SHARE = 0.3  # after this share of the requests memory is measured
GROWTH_BYTES = 16 << 20
CONFIG = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=512, context=256, rope_theta=5e5
)


@dataclass
class Report:
    """What happened."""

    counts: Counter = field(default_factory=Counter)
    wrong: list[tuple[Request, str, str]] = field(default_factory=list)  # request, its answer, the one it gets alone
    tokens: int = 0
    preemptions: int = 0
    most_at_once: int = 0
    blocks_held: int = 0
    waiting: int = 0
    growth_bytes: int = 0

    def faults(self) -> list[str]:
        """What should not have happened, in words."""
        found = [f"{len(self.wrong)} answers differ from those given alone: {self.wrong[:1]}"] if self.wrong else []
        found += [f"{self.blocks_held} blocks are still held"] if self.blocks_held else []
        found += [f"{self.waiting} requests still wait"] if self.waiting else []
        if self.growth_bytes > GROWTH_BYTES:
            found.append(f"memory grew by {self.growth_bytes:,} bytes")
        return found


def model_and_tokenizer(dtype: torch.dtype = torch.float64) -> tuple[Llama, Tokenizer]:
    """A random model whose distributions are sharp, over single bytes."""
    model = Llama(CONFIG).init_weights(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (w for w in model.parameters() if w.ndim == 2):
            weight.normal_(0.0, 0.3, generator=generator)
    return model.to(dtype), Tokenizer({bytes([i]): i for i in range(256)})


def any_request(rng: random.Random) -> Request:
    """One of some hundreds of requests, a few of them bad."""
    kind = rng.randrange(400)
    rng = random.Random(kind)
    if kind < 12:
        return Request(prompt="x" * rng.randrange(256, 600))
    if kind < 20:
        return Request(prompt="x", sampling=Sampling(top_p=7.0))
    length = rng.choice([1, 5, 20, 60, 150, 220])
    shared = "You are kind. " * 3 if rng.random() < 0.5 else ""
    prompt = (shared + "".join(rng.choice("abcdefgh ") for _ in range(length)))[:240]
    stop = ("e", "ab") if rng.random() < 0.3 else ()
    sampling = Sampling(max_tokens=rng.choice([1, 4, 16, 50, 90]), stop=stop, ignore_end=rng.random() < 0.3)
    return Request(prompt=prompt, sampling=sampling, owner=rng.choice(["", "ann"]), priority=rng.choice([0, 0, 0, 1]))


def soak(engine: Engine, alone: Engine, requests: int, seed: int = 0) -> Report:
    """Send `requests` requests to `engine`, and compare with `alone`."""
    rng, report = random.Random(seed), Report()
    streams: dict[int, tuple[Request, object]] = {}
    expected: dict[Request, Completion] = {}
    warm, sent = 0, 0
    while sent < requests or streams:
        if sent < requests and (not streams or rng.random() < 0.5):
            sent += 1
            request = any_request(rng)
            try:
                streams[sent] = (request, engine.stream(request))
            except PunaError:
                report.counts["refused"] += 1
            if not warm and sent >= requests * WARM_SHARE:
                warm = _resident()
        if not streams:
            continue
        place = rng.choice(list(streams))
        request, stream = streams[place]
        if rng.random() < 0.01:
            stream.close()
            del streams[place]
            report.counts["given up"] += 1
            continue
        try:
            completion = next(stream).completion
        except BusyError:
            report.counts["busy"] += 1
            del streams[place]
            continue
        report.most_at_once = max(report.most_at_once, len(engine._scheduler.running))
        if completion is not None:
            del streams[place]
            report.counts[f"ended: {completion.finish_reason}"] += 1
            report.tokens += completion.completion_tokens
            if request not in expected:
                [expected[request]] = alone.generate([request])
                alone.clear()
            if completion.text != expected[request].text:
                report.wrong.append((request, completion.text, expected[request].text))
    cache = engine._cache
    report.blocks_held, report.waiting = cache.blocks - cache.free, engine._scheduler.waiting
    report.preemptions = engine._scheduler.preemptions
    engine.clear()
    report.growth_bytes = _resident() - warm
    return report


def engines(runner: str = "torch") -> tuple[Engine, Engine]:
    """The one that is put under load, and one to compare with; the native runner computes in float32."""
    dtype = torch.float32 if runner == "native" else torch.float64
    model, tokenizer = model_and_tokenizer(dtype)
    cache_bytes = BLOCKS * 16 * CONFIG.kv_bytes_per_token(dtype.itemsize)
    busy = Engine(model, tokenizer, slots=8, cache_bytes=cache_bytes, step_tokens=48, queue=0, runner=runner)
    return busy, Engine(model, tokenizer, cache_bytes=cache_bytes, runner=runner)


def _resident() -> int:
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runner", default="torch", choices=["torch", "native", "invariant"])
    options = parser.parse_args()
    begin = time.monotonic()
    report = soak(*engines(options.runner), options.requests, options.seed)
    for what, count in sorted(report.counts.items()):
        print(f"{what:<20} {count:>8,}")
    print(f"{'tokens drawn':<20} {report.tokens:>8,}   in {time.monotonic() - begin:,.0f} s")
    print(f"{'preemptions':<20} {report.preemptions:>8,}   most at once {report.most_at_once}")
    print(f"{'memory grew by':<20} {report.growth_bytes / 2**20:>8.1f} MiB")
    faults = report.faults()
    print("\n".join(faults) or "no leak, and every answer is the one given alone")
    return len(faults) and 1


if __name__ == "__main__":
    sys.exit(main())
