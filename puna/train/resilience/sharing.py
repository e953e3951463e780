"""A copy on another node: where a part has no replica elsewhere, each rank sends its image to the node after its own.

The copy lies in that node's shared memory like its own images. When a node is lost, `restore` finds the part there and
hands it to the rank that takes over.
"""

import json

import torch
import torch.distributed as dist
from torch import Tensor

from puna.train.resilience import image
from puna.train.resilience.image import Seal
from puna.train.resilience.memory import MemoryTier
from puna.train.resilience.peers import Peers


class Sharing:
    """Sends this rank's images to `to`, and keeps those of `source` in `store`."""

    def __init__(self, peers: Peers, store: MemoryTier, *, to: int, source: int):
        self.group = dist.new_group(backend="gloo")
        self.store, self.to, self.source = store, to, source

    def send(self, memory: MemoryTier, saved: tuple[int | None, Seal] | None) -> None:
        """Exchange images of one step. Every rank must call it; one that has none sends an empty one."""
        seal, mine = b"", torch.empty(0, dtype=torch.uint8)
        if saved is not None and saved[0] is not None:
            slot, sealed = saved
            seal = json.dumps(sealed.__dict__).encode()
            mine = image.mapped(memory.image_path(slot))
        sizes = self._swap(torch.tensor([len(seal), mine.numel()]), torch.empty(2, dtype=torch.int64))
        word = self._swap(_tensor(seal), torch.empty(int(sizes[0]), dtype=torch.uint8))
        theirs = self._swap(mine, torch.empty(int(sizes[1]), dtype=torch.uint8))
        if word.numel():
            self.store.keep(Seal(**json.loads(bytes(word.numpy()))), theirs)

    def _swap(self, mine: Tensor, theirs: Tensor) -> Tensor:
        requests = [dist.isend(mine, self.to, group=self.group), dist.irecv(theirs, self.source, group=self.group)]
        for request in requests:
            request.wait()
        return theirs


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
