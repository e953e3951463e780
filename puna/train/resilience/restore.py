"""Which state a run goes on from: the newest that every rank has, and that is what was saved.

The ranks first agree. Each says what its node's memory holds and what is right with it; a state counts if every part of
it is somewhere, whole. Whoever lacks a part (its node is new) gets it from a rank that has it. Memory comes before disk
where it is newer. A candidate that fails any rank's check is left out by all of them, and the next one is tried.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from puna import log
from puna.train.resilience import image, memory
from puna.train.resilience.durable import DurableTier, Saved
from puna.train.resilience.peers import Peers

Key = tuple[int, int]


@dataclass(kw_only=True)
class Found:
    """A valid state: tensors of this rank's part, or of the whole if it was saved on another layout."""

    key: Key
    tensors: dict[str, Tensor]
    record: dict[str, Any]
    whole: bool
    tier: str  # memory | disk


def newest(peers: Peers, node: Path, durable: DurableTier, *, layout: str, most: int | None = None) -> Found | None:
    """The newest valid state of at most `most` steps. Every rank must call it; all get the same state."""
    held = {
        part: {key: found for key, found in states.items() if found[0].record.get("layout", layout) == layout}
        for part, states in memory.available(node).items()
    }  # without pieces that another layout left there
    offers = peers.gather({part: sorted(states) for part, states in held.items()})
    everywhere = _everywhere(offers, peers)
    on_disk = _shared_listing(peers, durable)
    for key, disk in _candidates(everywhere, on_disk, most):
        found = _from_disk(peers, durable, disk, layout) if disk else _from_memory(peers, held, offers, key)
        if found is not None:
            return found
    return None


def _everywhere(offers: list[dict[int, list[Key]]], peers: Peers) -> set[Key]:
    """The states of which every part is in somebody's memory."""
    parts = [{key for offer in offers for key in offer.get(part, [])} for part in range(peers.parts)]
    return set.intersection(*parts)


def _shared_listing(peers: Peers, durable: DurableTier) -> list[Saved]:
    """Rank 0's listing, so that all go through the same one."""
    return peers.gather(durable.states() if peers.rank == 0 else None)[0]


def _candidates(in_memory: set[Key], on_disk: list[Saved], most: int | None) -> Iterator[tuple[Key, Saved | None]]:
    """Newest first; of the same state, memory's copy before the disk's."""
    found = [(key, 1, None) for key in in_memory] + [(saved.key, 0, saved) for saved in on_disk]
    for key, _, saved in sorted(found, key=lambda c: c[:2], reverse=True):
        if most is None or key[1] <= most:
            yield key, saved


def _from_memory(peers: Peers, held: dict, offers: list[dict[int, list[Key]]], key: Key) -> Found | None:
    givers = [_giver(peers, offers, rank, key) for rank in range(peers.world)]
    wanted = {peers.all_parts[rank] for rank, giver in enumerate(givers) if giver == peers.rank}
    images, problems = {}, []
    for part in wanted:
        seal, path = held[part][key]
        try:
            images[part] = memory.read(seal, path), seal.record
        except (OSError, ValueError) as error:
            problems.append(f"rank {peers.rank}: {error}")
    if said := [problem for of_rank in peers.gather(problems) for problem in of_rank]:
        if peers.rank == 0:
            log.warn(f"the copy of step {key[1]} in memory is damaged and not used: {'; '.join(said)}")
        return None
    mine, record = _hand_out(peers, givers, images)
    return Found(key=key, tensors=dict(image.tensors(mine)), record=record, whole=False, tier="memory")


def _giver(peers: Peers, offers: list[dict[int, list[Key]]], rank: int, key: Key) -> int:
    """From whose node's memory `rank` gets its part: its own, or that of a rank whose node has a copy."""
    part = peers.all_parts[rank]
    return next(r for r in (rank, *range(peers.world)) if key in offers[r].get(part, ()))


def _hand_out(
    peers: Peers, givers: list[int], images: dict[int, tuple[Tensor, dict[str, Any]]]
) -> tuple[Tensor, dict[str, Any]]:
    """Give their part to the ranks whose node does not hold it; this rank's part and record."""
    found = images.get(peers.part)
    sizes = peers.gather({part: (image.numel(), record) for part, (image, record) in images.items()})
    for rank, giver in enumerate(givers):
        part = peers.all_parts[rank]
        if rank == giver:
            continue
        if peers.rank == giver:
            dist.send(images[part][0].contiguous(), rank, group=peers.group)
        elif peers.rank == rank:
            size, record = sizes[giver][part]
            found = torch.empty(size, dtype=torch.uint8), record
            dist.recv(found[0], giver, group=peers.group)
    return found


def _from_disk(peers: Peers, durable: DurableTier, saved: Saved, layout: str) -> Found | None:
    """Each rank checks some of the parts; then each reads what it needs."""
    problems = ["state.json cannot be read"] if saved.parts == 0 and peers.rank == 0 else []
    problems += [p for part in range(peers.rank, saved.parts, peers.world) if (p := saved.check(part))]
    said = [p for of_rank in peers.gather(problems) for p in of_rank]
    if said:
        if peers.rank == 0:
            durable.quarantine(saved, said)
        peers.gather(None)  # nobody lists the folder before that is done
        return None
    record = saved.record
    whole = saved.parts != peers.parts or record.get("layout", layout) != layout
    tensors = saved.whole() if whole else saved.part(peers.part)
    return Found(key=saved.key, tensors=tensors, record=record, whole=whole, tier="disk")
