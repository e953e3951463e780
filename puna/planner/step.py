"""The time of a step: what a rank computes, what it waits for, and how full the pipeline is.

    one micro-batch   products + attention + elementwise, and what tensor and context exchanges add
    the pipeline      (M + (P - 1) / v) micro-batches of the slowest rank, M of them useful: the bubble is (P - 1) / (v M)
    sends             a micro-batch's way through the stages takes P sends more than its computing; as many micro-batches
                      as there are ranks (N = P) leave no slack to hide them, a larger N does (2407.21783, 3.3.2)
    the data ranks    FSDP's gathers and sums run beside the computing, which they slow by the share of processors they
                      take; what does not fit beside it, the first gather and the last sum, is waited for
    the optimizer     bytes of this rank's share
    the slowest       of many equal devices sets the pace of all

Exchanges of tensor parallelism stand between products and are waited for; overlapped ("async"), a product and its
exchange go in as many pieces as there are ranks, and one piece at least stays visible.
Keys and values are gathered before attention and waited for (arXiv 2407.21783, 3.3.2).

No number here was fitted to a training run: see hardware.toml for what each is from, and docs/planning.md for how far
published runs lie from the result.
"""

from dataclasses import dataclass

from puna.model.sizes import LlamaConfig
from puna.parallel.layout import Layout
from puna.planner import collectives
from puna.planner.collectives import Traffic
from puna.planner.compute import (
    COPY_BYTES,
    Seconds,
    head_time,
    layer_time,
    optimizer_time,
)
from puna.planner.hardware import Device
from puna.planner.memory import rank_parameters, sharded
from puna.planner.work import Work, gathers_layers, layers_on, microbatches, stage_counts


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where the seconds of one optimizer step go, on the slowest rank."""

    products: float
    attention: float
    elementwise: float
    recomputed: float
    head: float
    tensor: float  # waited for
    context: float  # waited for
    slowed: float  # computing, slowed by collectives beside it
    bubble: float
    pipeline: float  # waiting for what neighbours send
    data: float  # FSDP's gathers and sums that nothing hides
    copies: float  # in and out of their buffers
    optimizer: float
    slowest: float  # waiting for the slowest of equal devices
    tokens: int
    world: int
    flops_per_token: tuple[int, int]  # causal, full
    peak: float  # of one device

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by name, largest first."""
        names = (
            "products", "attention", "elementwise", "recomputed", "head", "tensor", "context", "slowed", "bubble",
            "pipeline", "data", "copies", "optimizer", "slowest",
        )  # fmt: skip
        return dict(sorted(((n, getattr(self, n)) for n in names), key=lambda item: -item[1]))

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        """Of all devices."""
        return self.tokens / self.seconds

    @property
    def tokens_per_s_per_device(self) -> float:
        return self.tokens_per_s / self.world

    def flops(self, *, causal: bool = True) -> float:
        """Model FLOP/s of one device; `causal` counts the pairs that attention computes, else all of them."""
        return self.tokens_per_s_per_device * self.flops_per_token[0 if causal else 1]

    def mfu(self, *, causal: bool = True) -> float:
        return self.flops(causal=causal) / self.peak

    @property
    def bubble_share(self) -> float:
        return self.bubble / self.seconds


def step_time(config: LlamaConfig, layout: Layout, work: Work, device: Device) -> Step:
    """The time of one step. Raises `ConfigError` if model, layout and work do not fit together."""
    device.precision(work.precision)
    rank = _slowest_rank(config, layout, work, device)
    M, P, v = microbatches(layout, work), layout.pipeline, layout.stages_per_rank
    layers = layers_on(config, layout, work, rank)
    layer = layer_time(config, layout, work, device)
    head = head_time(config, layout, work, device) if rank == P - 1 else Seconds()
    tensor, context, slowed = _waits(config, layout, work, device, rank, M * layers * layer.products.forward)
    computed = M * (layers * layer.total.total + head.total)
    busy = computed + tensor + context
    bubble = busy * (P - 1) / (v * M)
    data, beside = _data(config, layout, work, device, rank, busy / M)
    held = rank_parameters(config, layout, work, rank)
    optimizer = optimizer_time(sharded(held, layout), work, device)
    return Step(
        products=M * layers * (layer.products.forward + layer.products.backward),
        attention=M * layers * (layer.attention.forward + layer.attention.backward),
        elementwise=M * layers * (layer.elementwise.forward + layer.elementwise.backward),
        recomputed=M * layers * layer.total.recomputed,
        head=M * head.total,
        tensor=tensor,
        context=context,
        slowed=slowed + beside,
        bubble=bubble,
        pipeline=_sends(config, layout, work, device, busy / M / v / 3),
        data=data,
        copies=_copied(config, layout, work, held) / device.read,
        optimizer=optimizer,
        slowest=(computed + bubble + optimizer) * (device.slowest(layout.world) - 1),
        tokens=work.tokens,
        world=layout.world,
        flops_per_token=tuple(config.train_flops_per_token(work.sequence_length, causal=c) for c in (True, False)),
        peak=device.peak[work.precision],
    )


def _slowest_rank(config: LlamaConfig, layout: Layout, work: Work, device: Device) -> int:
    """The pipeline rank that computes longest."""
    layer = layer_time(config, layout, work, device).total.total
    head = head_time(config, layout, work, device).total

    def load(rank: int) -> float:
        return layers_on(config, layout, work, rank) * layer + (head if rank == layout.pipeline - 1 else 0)

    counts = stage_counts(config, layout, work)
    held = {sum(counts[rank :: layout.pipeline]): rank for rank in range(layout.pipeline - 1)}
    return max([layout.pipeline - 1, *held.values()], key=load)


def _waits(
    config: LlamaConfig, layout: Layout, work: Work, device: Device, rank: int, products: float
) -> tuple[float, float, float]:
    """Seconds of a step waited for tensor and for context exchanges, and by which hidden ones slow the computing.

    `products` are the forward products of the step, beside which exchanges may run.
    """
    found = {"tensor": 0.0, "context": 0.0}
    hidden = 0.0
    for traffic in collectives.traffic_per_step(config, layout, work, rank):
        took = traffic.times * collectives.seconds(traffic, device)
        if traffic.name == collectives.REGATHER:
            hidden += took
        elif traffic.group.name in found:
            found[traffic.group.name] += took
    tp = layout.tensor
    beside = products * (collectives.passes(work) + 2) * (tp - 1) / tp
    overlapped = min(work.tensor_hidden * found["tensor"], found["tensor"] * (tp - 1) / tp, beside)
    return found["tensor"] - overlapped, found["context"], (hidden + overlapped) * device.comm_share


def _sends(config: LlamaConfig, layout: Layout, work: Work, device: Device, piece: float) -> float:
    """Seconds that stages wait for what neighbours send; `piece` is the forward time of one stage's micro-batch."""
    sends = [t for t in collectives.traffic_per_step(config, layout, work) if t.kind == "send"]
    if not sends:
        return 0.0
    M, P = microbatches(layout, work), layout.pipeline
    N = min(layout.in_flight or P, M)
    way = P * collectives.seconds(sends[0], device)
    rounds = layout.stages_per_rank * M / N
    stalls = [max(0.0, way - max(0, N - P) * passes * piece) for passes in (1, 2)]  # forward, backward
    return rounds * sum(stalls)


def _data(
    config: LlamaConfig, layout: Layout, work: Work, device: Device, rank: int, microbatch: float
) -> tuple[float, float]:
    """Seconds waited for the data ranks' exchanges, and those by which they slow the computing beside them.

    Exchanges go layer by layer beside a pass: gathers beside the forward pass (and, layer by layer, the backward pass
    too), sums beside the backward pass. The first layer's gather, the last one's sum, and what is longer than the pass
    stay visible.
    """
    layers = max(1, layers_on(config, layout, work, rank))
    waited = hidden = 0.0
    for traffic in collectives.traffic_per_step(config, layout, work, rank):
        if traffic.group.name not in ("shard", "replicate"):
            continue
        piece = Traffic(traffic.name, traffic.kind, traffic.group, 1, traffic.bytes / layers)
        each = layers * collectives.seconds(piece, device)
        both = gathers_layers(layout, work) and traffic.kind == "gather"
        beside = microbatch * (1 / 2 if both else 1 / 3 if traffic.kind == "gather" else 2 / 3)
        visible = each / layers + traffic.times * max(0.0, each - beside)
        waited += visible
        hidden += traffic.times * each - visible
    return waited, max(0.0, hidden) * device.comm_share


def _copied(config: LlamaConfig, layout: Layout, work: Work, held: float) -> float:
    """Bytes that FSDP copies out of gathered buffers and into reduced ones, and that summing micro-batches moves."""
    M = microbatches(layout, work)
    often = M if gathers_layers(layout, work) else 1
    moved = 0.0
    shards = layout.shard * layout.context
    if shards > 1:
        gathers = 2 * often if gathers_layers(layout, work) else 1
        moved += held * COPY_BYTES * gathers + held * 2 * COPY_BYTES * often
    if M > 1:  # gradients of a micro-batch are added to the sum: read and written
        share = shards if gathers_layers(layout, work) else 1
        moved += held / share * 2 * work.gradient_bytes * M
    return moved
