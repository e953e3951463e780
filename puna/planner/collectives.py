"""What ranks send each other in a step, and how long it takes on a described network.

A ring moves (n - 1)/n of the gathered bytes over every rank's link, for all-gather and reduce-scatter alike; an
all-reduce is both. A group inside a node has the node's links. Across nodes each node's members share out the adapters:
m members on a node reach at most m of them, so that a data group of one rank per node has one adapter's speed, and one
that fills its nodes has eight. Ranks are ordered tensor, context, pipeline, data (`Layout`), so a group's stride says
how many of its members a node holds.
"""

from dataclasses import dataclass
from typing import Literal

from puna.model.sizes import LlamaConfig
from puna.parallel.layout import Layout
from puna.planner.hardware import Device
from puna.planner.memory import rank_parameters
from puna.planner.work import Work, gathers_layers, layers_on, local_tokens, microbatches

REGATHER = "tensor: gather again, beside the gradient's product"
Kind = Literal["gather", "scatter", "reduce", "send"]


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other: how many, and how far apart in rank order."""

    name: str
    size: int
    stride: int

    def members_per_node(self, node: int) -> int:
        return max(1, min(self.size, node // self.stride)) if self.stride < node else 1


@dataclass(frozen=True)
class Traffic:
    """One kind of exchange of a rank in a step: how often, and how many bytes the whole group's result has."""

    name: str
    kind: Kind
    group: Group
    times: float
    bytes: float  # of the gathered tensor, each time

    @property
    def sent(self) -> float:
        """Bytes that one rank sends in a step."""
        n = self.group.size
        share = 1 if self.kind == "send" else (n - 1) / n * (2 if self.kind == "reduce" else 1)
        return self.times * self.bytes * share


def groups(layout: Layout) -> dict[str, Group]:
    """The groups a rank belongs to, by kind."""
    found, stride = {}, 1
    for name in ("tensor", "context", "pipeline", "shard", "replicate"):
        size = getattr(layout, name)
        found[name] = Group(name, size, stride)
        stride *= size
    if layout.context > 1:  # weights are cut over the context ranks as well, the nearest first
        found["shard"] = Group("shard", layout.shard * layout.context, layout.tensor)
    return found


def seconds(traffic: Traffic, device: Device) -> float:
    """How long one such exchange takes when nothing else uses the links."""
    group = traffic.group
    n, inside = group.size, group.members_per_node(device.node)
    if n == 1 or not traffic.bytes:
        return 0.0
    nodes = -(-n // inside)
    speed = device.link if nodes == 1 else min(device.link, inside * device.network)
    if traffic.kind == "send":
        near = group.stride < device.node and nodes == 1
        return traffic.bytes / (device.link if near else device.network) + device.network_latency_s
    rounds = 2 if traffic.kind == "reduce" else 1
    latency = device.link_latency_s if inside > 1 else 0.0
    latency += (nodes - 1) * device.network_latency_s if nodes > 1 else 0.0
    return rounds * (traffic.bytes * (n - 1) / n / speed + latency)


def traffic_per_step(config: LlamaConfig, layout: Layout, work: Work, pipeline_rank: int = 0) -> list[Traffic]:
    """What a rank exchanges in a step, by kind of parallelism."""
    return [
        *_tensor(config, layout, work, pipeline_rank),
        *_context(config, layout, work, pipeline_rank),
        *_pipeline(config, layout, work),
        *_data(config, layout, work, pipeline_rank),
    ]


def passes(work: Work) -> int:
    """Forward passes of a layer in a step: a second one where everything is recomputed."""
    return 2 if work.recompute == "full" else 1


def _tensor(config: LlamaConfig, layout: Layout, work: Work, rank: int) -> list[Traffic]:
    """Four exchanges of the stream in each pass of a layer: into and out of attention and feed-forward."""
    if layout.tensor == 1:
        return []
    group = groups(layout)["tensor"]
    size = work.activation_bytes * local_tokens(layout, work) * config.dim
    times = 2 * (passes(work) + 1) * layers_on(config, layout, work, rank) * microbatches(layout, work)
    # The cut inputs that were kept are gathered once more for the weights' gradients; recomputing does that anyway.
    again = 0 if work.recompute == "full" else times / (passes(work) + 1)
    if not layout.sequence_parallel:
        return [Traffic("tensor: sum of activations", "reduce", group, times, size)]
    return [
        Traffic("tensor: gather of activations", "gather", group, times, size),
        Traffic("tensor: sum of activations", "scatter", group, times, size),
        Traffic(REGATHER, "gather", group, again, size),
    ]


def _context(config: LlamaConfig, layout: Layout, work: Work, rank: int) -> list[Traffic]:
    """Keys and values of the whole sequence are gathered, their gradients summed (arXiv 2407.21783, 3.3.2)."""
    if layout.context == 1:
        return []
    group = groups(layout)["context"]
    keys = 2 * config.n_kv_heads * config.head_dim / layout.tensor
    size = work.activation_bytes * local_tokens(layout, work) * layout.context * keys
    times = layers_on(config, layout, work, rank) * microbatches(layout, work)
    return [
        Traffic("context: gather of keys and values", "gather", group, times * passes(work), size),
        Traffic("context: sum of their gradients", "scatter", group, times, size),
    ]


def _pipeline(config: LlamaConfig, layout: Layout, work: Work) -> list[Traffic]:
    if layout.pipeline == 1:
        return []
    cut = layout.tensor if layout.sequence_parallel else 1
    size = work.activation_bytes * local_tokens(layout, work) * config.dim / cut
    times = 2 * microbatches(layout, work) * layout.stages_per_rank
    return [Traffic("pipeline: activations and gradients", "send", groups(layout)["pipeline"], times, size)]


def _data(config: LlamaConfig, layout: Layout, work: Work, rank: int) -> list[Traffic]:
    """FSDP gathers weights and scatters gradients' sums; replicas then sum their shards."""
    held = rank_parameters(config, layout, work, rank)
    found = []
    group = groups(layout)["shard"]
    if group.size > 1:
        often = microbatches(layout, work) if gathers_layers(layout, work) else 1
        gathers = 2 * often if gathers_layers(layout, work) else 1
        found.append(Traffic("shard: gather of weights", "gather", group, gathers, work.activation_bytes * held))
        found.append(Traffic("shard: sum of gradients", "scatter", group, often, work.gradient_bytes * held))
    if layout.replicate > 1:
        size = work.gradient_bytes * held / group.size
        found.append(Traffic("replicate: sum of gradients", "reduce", groups(layout)["replicate"], 1, size))
    return found
