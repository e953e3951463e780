"""What the ranks of a run tell each other about its safety: small plain values, over a group of its own.

The group is gloo's, on the CPU, also where training speaks NCCL: so a question can be asked while the GPUs are busy, and
its answer does not depend on them.
"""

import datetime
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from puna.errors import ConfigError


@dataclass(kw_only=True)
class Peers:
    """A rank's place in the run. Ranks with the same `part` hold equal tensors: they are its replicas."""

    rank: int = 0
    world: int = 1
    part: int = 0
    parts: int = 1
    replica: int = 0
    replicas: int = 1
    stages: tuple[int, ...] = ()  # rank -> stage of a pipeline: ranks of one stage do the same work

    def __post_init__(self) -> None:
        self.stages = self.stages or (0,) * self.world
        self.node = node_name()
        self.group = dist.new_group(backend="gloo") if self.world > 1 else None
        self.nodes = self.gather(self.node)

    @classmethod
    def of(cls, placement: Any) -> "Peers":
        """A placement's ranks. Copies (`replicate`) are outermost in a layout, so equal parts are a world of parts apart."""
        layout = getattr(placement, "layout", None)
        replicas = layout.replicate if layout else 1
        parts = placement.world // replicas
        replica, part = divmod(placement.rank, parts)
        stages = tuple(layout.coordinates(rank)["pipeline"] for rank in range(placement.world)) if layout else ()
        place = {"part": part, "parts": parts, "replica": replica, "replicas": replicas}
        return cls(rank=placement.rank, world=placement.world, stages=stages, **place)

    @classmethod
    def replicated(cls) -> "Peers":
        """Pure data parallelism over the default group, or a single process: every rank holds everything."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return cls(rank=rank, world=world, replica=rank, replicas=world)

    def gather(self, value: Any) -> list[Any]:
        """Everybody's `value`, by rank. Every rank must call it."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.group)
        return found

    def words(self, *values: float) -> list[bytes]:
        """Everybody's float64 numbers, by rank, as their bits: also two NaN are alike then."""
        mine = torch.tensor(values, dtype=torch.float64)
        if self.group is None:
            return [mine.numpy().tobytes()]
        found = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(found, mine, group=self.group)
        return [theirs.numpy().tobytes() for theirs in found]

    @property
    def first_on_node(self) -> bool:
        """Is this the first of its part's replicas on this node? That one keeps images there."""
        return not any(
            part == self.part and node == self.node for part, node in zip(self.all_parts[: self.rank], self.nodes)
        )

    @property
    def all_parts(self) -> list[int]:
        """Rank -> part."""
        if not hasattr(self, "_all_parts"):
            self._all_parts = self.gather(self.part)
        return self._all_parts

    def neighbour(self) -> tuple[int, int] | None:
        """(to, from): the ranks with which images are exchanged so that a lost node takes none along.

        None where all is on one node, or where another node has a replica of every part anyway.
        """
        places = {(part, node) for part, node in zip(self.all_parts, self.nodes)}
        alone = any(len({node for p, node in places if p == part}) == 1 for part in range(self.parts))
        if len(set(self.nodes)) == 1 or not alone:
            return None
        stride = self.nodes.count(self.nodes[0])  # ranks of a node are consecutive
        return (self.rank + stride) % self.world, (self.rank - stride) % self.world


def node_name() -> str:
    """What this machine is called: PUNA_NODE, or the host's name."""
    return os.environ.get("PUNA_NODE") or socket.gethostname()


def meet(backend: str = "gloo", timeout_s: float = 600.0) -> None:
    """Join the default process group, as the launcher or torchrun says where. Nothing is done in a run of one.

    Raises `ConfigError` where torchrun is told to start ranks again and could not.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    place = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    place["timeout"] = datetime.timedelta(seconds=timeout_s)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        dist.init_process_group(backend, store=_store_of_agent(place["timeout"]), **place)
    else:
        dist.init_process_group(backend, init_method=os.environ.get("PUNA_RENDEZVOUS", "env://"), **place)


def _store_of_agent(timeout: datetime.timedelta) -> dist.Store:
    """The store that torchrun's agent keeps for its ranks, in a room of its own for each start.

    PyTorch gives ranks that were started again the same room, in which they find the addresses of those that died
    (its issue 135712). An agent counts starts by itself, so with several agents the count is of no use.
    """
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        hint = "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on every node, or --max-restarts=0"
        raise ConfigError(
            "over several nodes, torchrun cannot start ranks again with a store that it shares", hint=hint
        )
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
