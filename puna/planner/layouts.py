"""The search for a layout: every way to split a run over the devices, each with its memory and its time.

Tensor ranks stay inside a node; context ranks are for long sequences; pipeline stages need a layer each; what is left
are data ranks, sharded over all of them or in groups (HSDP). Recomputation is tried in the order of its price: nothing,
every second product, everything. What does not fit the memory, less what the runtime keeps for itself, is left out. The
fastest wins; the others say what they would cost, and why.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from puna.config import require
from puna.errors import ConfigError
from puna.model.sizes import LlamaConfig
from puna.parallel.layout import Layout
from puna.planner.amounts import bytes_, count
from puna.planner.hardware import Device
from puna.planner.memory import Memory, memory_per_rank
from puna.planner.step import Step, step_time
from puna.planner.work import Work

USABLE = 0.92  # of the memory: the rest is the runtime's, its libraries' and the allocator's gaps
RECOMPUTE = ("none", "selective", "full")
LONG = 32_768  # tokens from which sequences may be cut


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout with what it needs and takes."""

    layout: Layout
    work: Work
    memory: Memory
    step: Step

    def __str__(self) -> str:
        recompute = "" if self.work.recompute == "none" else f" recompute={self.work.recompute}"
        return f"{self.layout}{recompute}"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found: the winner, then the best of each other way to split, fastest first."""

    best: Candidate
    others: tuple[Candidate, ...]
    tried: int
    too_large: int

    def reasons(self) -> list[str]:
        """Why each of the others lost."""
        return [why(self.best, other) for other in self.others]


def search(
    config: LlamaConfig,
    world: int,
    work: Work,
    device: Device,
    *,
    others: int = 4,
    quick: bool = False,
    recompute: Sequence[str] = RECOMPUTE,
) -> Found:
    """The fastest layout of `world` devices that fits. Raises `ConfigError`, saying how much is lacking, if none does.

    `quick` leaves out ways that are seldom the best by more than a few percent: data ranks in groups, and micro-batches
    of more than one row. `recompute` are the modes that may be used, the cheapest first.
    """
    device.precision(work.precision)
    fits: list[Candidate] = []
    tried = too_large = 0
    least = math.inf
    for layout in layouts(config, world, work, device, quick=quick):
        for mode in recompute:
            how = replace(work, recompute=mode)
            memory = memory_per_rank(config, layout, how)
            tried += 1
            if memory.total <= USABLE * device.memory_bytes:
                fits.append(
                    Candidate(layout=layout, work=how, memory=memory, step=step_time(config, layout, how, device))
                )
                break
            too_large += 1
            least = min(least, memory.total)
    if not fits:
        raise _nothing_fits(config, world, device, least, tried)
    fits.sort(key=lambda c: c.step.seconds)
    best = fits[0]
    return Found(best=best, others=tuple(_different(fits[1:], best, others)), tried=tried, too_large=too_large)


def layouts(config: LlamaConfig, world: int, work: Work, device: Device, *, quick: bool = False) -> Iterator[Layout]:
    """Every sensible way to split a run over `world` devices."""
    inside = math.gcd(world, device.node) if world > device.node else world
    for tensor in _powers(min(inside, config.n_kv_heads)):
        if any(n % tensor for n in (world, config.n_heads, config.n_kv_heads, config.ffn_dim, config.vocab_size)):
            continue
        for context in _contexts(world // tensor, tensor, work):
            for pipeline in _powers(min(world // tensor // context, config.n_layers)):
                data, left = divmod(world, tensor * context * pipeline)
                if left or not data or data > work.rows:
                    continue
                split = Layout(tensor=tensor, context=context, pipeline=pipeline)
                yield from _schedules(config, split, data, work, device, quick)


def _contexts(most: int, tensor: int, work: Work) -> list[int]:
    if work.sequence_length < LONG:
        return [1]
    return [c for c in _powers(min(most, 16)) if work.sequence_length % (2 * c * tensor) == 0]


def _schedules(
    config: LlamaConfig, split: Layout, data: int, work: Work, device: Device, quick: bool
) -> Iterator[Layout]:
    """Sharding groups, micro-batches and interleaving for one way to split."""
    if work.rows % data:
        return
    rows = work.rows // data
    counts = [m for m in (rows, rows // 2, rows // 4, rows // 8) if m and rows % m == 0]
    if split.pipeline == 1:
        counts += [1]
    if quick:
        counts = counts[:1]
    interleaved = [
        v for v in ((1, 4) if quick else (1, 2, 4, 8)) if split.pipeline > 1 and split.pipeline * v <= config.n_layers
    ] or [1]
    near = device.node // split.tensor
    for shard in sorted({data, data if quick else math.gcd(data, max(1, near))}):
        for microbatches in sorted(set(counts)):
            if split.pipeline > 1 and microbatches < split.pipeline:
                continue
            for stages in interleaved:
                yield replace(
                    split, shard=shard, replicate=data // shard, microbatches=microbatches, stages_per_rank=stages
                )


def why(best: Candidate, other: Candidate) -> str:
    """What makes `other` slower than `best`: the part of the step that grew most."""
    slower = other.step.seconds / best.step.seconds - 1
    per_token = {name: other.step.parts[name] - seconds for name, seconds in best.step.parts.items()}
    worst = max(per_token, key=lambda name: per_token[name])
    return f"{slower:+.0%}: {WORDS[worst]} {_ms(best.step.parts[worst])} -> {_ms(other.step.parts[worst])} a step"


WORDS = {
    "products": "matrix products",
    "attention": "attention",
    "elementwise": "elementwise operations",
    "recomputed": "recomputing",
    "head": "output and loss",
    "tensor": "waiting for tensor exchanges",
    "context": "waiting for keys and values",
    "slowed": "computing slowed by exchanges beside it",
    "bubble": "the pipeline's bubble",
    "pipeline": "waiting for neighbouring stages",
    "data": "waiting for weights and gradients",
    "copies": "copying weights and adding gradients",
    "optimizer": "the optimizer",
    "slowest": "waiting for the slowest device",
}


def _different(fits: list[Candidate], best: Candidate, most: int) -> Iterator[Candidate]:
    """The fastest of each other split into tensor, context and pipeline ranks, or recomputation."""
    seen = {_split(best)}
    for candidate in fits:
        if _split(candidate) not in seen and len(seen) <= most:
            seen.add(_split(candidate))
            yield candidate


def _split(candidate: Candidate) -> tuple[int, int, int]:
    layout = candidate.layout
    return layout.tensor, layout.context, layout.pipeline


def _nothing_fits(config: LlamaConfig, world: int, device: Device, least: float, tried: int) -> ConfigError:
    if not tried:
        hint = "give a number of devices with many divisors (a power of two), or more rows a step"
        return ConfigError(f"{world} devices cannot be laid out for this model and batch", hint=hint)
    have = USABLE * device.memory_bytes
    return ConfigError(
        f"{count(config.parameters)} parameters do not fit {world} x {device.name}: the leanest of {tried} layouts needs "
        f"{bytes_(least)} a device, {bytes_(have)} are usable",
        hint="more devices, a smaller model, or fewer tokens in a row",
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds < 10 else f"{seconds:,.1f} s"


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    require(most >= 1, "nothing to split")
    return [1 << i for i in range(most.bit_length())]
