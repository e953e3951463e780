"""Whole matrices where layouts cut them, each with one owner: for what needs a matrix whole, as Muon does.

The n ranks that cut one copy of a stage among them (FSDP's and tensor parallelism's) hold parts of the same matrices. They
take turns of n matrices, and in each turn every rank owns one: all send it their parts, it changes the matrix, and sends
the parts back. Both ways are one all-to-all. So no matrix is computed twice within a copy, a rank holds one whole matrix
at a time, and per step it sends (and gets) what it holds of all matrices, twice, whatever n is. In bfloat16 that is four
bytes for each of its weights; FSDP gathers and sums eight bytes for each weight of the whole stage.

Copies (`replicate`) do the same each: their numbers stay equal without an exchange. In a last turn with fewer matrices than
ranks some have nothing to do, and where ranks outnumber matrices most have not: then a step takes as long as one matrix.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from puna.parallel.mesh import Mesh
from puna.parallel.weights import Named, region

Change = Callable[[Tensor], Tensor]


def through_owners(
    pieces: Iterable[Named], shapes: Mapping[str, tuple[int, ...]], change: Change, mesh: Mesh
) -> Iterator[Named]:
    """This rank's pieces of the changed matrices, in the order of `pieces`, which is the same on all ranks of a copy.

    `shapes` are those of whole matrices. Turns are fastest where neighbours have one shape. Run to its end by all together.
    """
    cutting, coming = mesh.rows * mesh.layout.tensor, iter(pieces)
    while turn := list(itertools.islice(coming, cutting)):
        names = [name for name, _ in turn]
        if cutting == 1:
            yield from ((name, change(piece)) for name, piece in turn)
        else:
            changed = _turn([piece for _, piece in turn], _places(names, shapes, mesh), change, mesh.copy_group)
            yield from zip(names, changed, strict=True)


Places = list[list[tuple[slice, ...]]]  # of each matrix, where each rank's piece lies in it


def _places(names: list[str], shapes: Mapping[str, tuple[int, ...]], mesh: Mesh) -> Places:
    ranks = list(itertools.product(range(mesh.rows), range(mesh.layout.tensor)))  # in the order of the group
    return [[region(name, shapes[name], mesh, *rank) for rank in ranks] for name in names]


def _turn(pieces: list[Tensor], places: Places, change: Change, group: dist.ProcessGroup) -> list[Tensor]:
    """One matrix to each rank, as far as there are any, and back."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    idle = [0] * (ranks - len(pieces))
    given = [piece.numel() for piece in pieces] + idle
    taken = [_size(place) for place in places[rank]] if rank < len(pieces) else [0] * ranks
    sent = torch.cat([piece.reshape(-1) for piece in pieces])
    gathered = sent.new_empty(sum(taken))
    dist.all_to_all_single(gathered, sent, taken, given, group=group)
    if rank < len(pieces):
        whole = sent.new_empty([max(place[d].stop for place in places[rank]) for d in range(pieces[rank].ndim)])
        for place, part in zip(places[rank], gathered.split(taken), strict=True):
            whole[place] = part.view([s.stop - s.start for s in place])
        changed = change(whole)
        gathered = torch.cat([changed[place].reshape(-1) for place in places[rank]])
    dist.all_to_all_single(sent, gathered, given, taken, group=group)
    return [part.view(piece.shape) for part, piece in zip(sent.split(given), pieces)]


def _size(place: tuple[slice, ...]) -> int:
    size = 1
    for s in place:
        size *= s.stop - s.start
    return size
