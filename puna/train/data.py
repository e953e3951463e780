"""What a step is fed: samples by their global number.

Every sample of a run has a number, counted over all phases. A step takes `rows` consecutive numbers; of R ranks that
hold data, rank r takes every R-th of them. What a number means is a pure function of the number, the recipe's position
and the seed, so a run goes on at another world size with the very next sample: nothing is remembered by a loader.

`Loader` makes the next step's batches in a thread while this step computes. It guesses that the next step follows on;
where that turns out wrong (a phase ended, samples were passed over) the guess is thrown away.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

from puna.parallel.placement import Batch, Objective, Placement
from puna.train.phases import Phase, Position


class Data(Objective, Protocol):
    """What an objective makes of artifacts."""

    notes: dict[str, Any]  # for the manifest

    def batch(self, numbers: Sequence[int], at: Position) -> Batch:
        """The samples of these global numbers, in the phase of `at`."""
        ...

    def validation(self, at: Position) -> list[Batch]:
        """Held-out batches, in the phase's form; empty for objectives that have none."""
        ...

    def prepare(self, placement: Placement) -> None:
        """Once, before the first step, also of a run that goes on: the placement has the weights that the run starts from."""
        ...

    def cursors(self, at: Position) -> dict[str, list[int]]:
        """How far each source has been read at `at`: what the next phase starts from."""
        ...


def share_of(first: int, count: int, rank: int, ranks: int) -> range:
    """The numbers of [first, first + count) that data rank `rank` of `ranks` takes."""
    return range(first + rank, first + count, ranks)


def micro_batches(numbers: Sequence[int], most: int) -> list[Sequence[int]]:
    """`numbers` in pieces of `most` (0: in one piece), the last one perhaps shorter."""
    most = most or max(1, len(numbers))
    return [numbers[i : i + most] for i in range(0, len(numbers), most)]


class Loader:
    """A step's micro-batches, made ahead of time."""

    def __init__(self, data: Data, rank: int, ranks: int, micro_batch: int):
        self.data, self.rank, self.ranks, self.micro_batch = data, rank, ranks, micro_batch
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: tuple[Any, Future] | None = None

    def step(self, phase: Phase, at: Position, first: int) -> tuple[range, list[Batch]]:
        """This rank's numbers of the step that begins at sample `first`, and their micro-batches."""
        key = (at.phase, first)
        if self._ahead is not None and self._ahead[0] == key:
            made = self._ahead[1].result()
        else:
            made = self._make(phase, at, first)
        coming = replace(at)
        self._ahead = (at.phase, first + phase.rows), self._pool.submit(self._make, phase, coming, first + phase.rows)
        return made

    def _make(self, phase: Phase, at: Position, first: int) -> tuple[range, list[Batch]]:
        numbers = share_of(first, phase.rows, self.rank, self.ranks)
        return numbers, [self.data.batch(part, at) for part in micro_batches(numbers, self.micro_batch)]

    def close(self) -> None:
        """End the thread; what it has made is dropped."""
        self._pool.shutdown(cancel_futures=True)
