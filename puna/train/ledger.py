"""The account of samples: which numbers each step took, on which rank, and what was in them.

Each rank that holds data adds a line per step to its own file in the run's scratch. `audit` reads all of them and finds
a sample that came twice, one that never came, and sums up what the samples held in a number that does not depend on
how they were shared out: two runs with the same seed on different numbers of ranks must have the same sum.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from puna.errors import DataError
from puna.parallel.placement import Batch
from puna.train.journal import Journal

NAME = "samples-{rank:05d}.jsonl"
_SUMS = 1 << 64


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What a run consumed. `passed` are ranges [first, last) that were passed over on purpose."""

    samples: int
    content: str  # the sum over all samples, 16 hexadecimal digits
    repeated: tuple[int, ...]
    missing: tuple[int, ...]  # of those below the highest number, without `passed`


class Ledger:
    """One data rank's lines. Of the processes that share its samples one `keeps` them, the others write nothing."""

    def __init__(self, folder: Path, rank: int, ranks: int, *, keeps: bool = True):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rank, self.ranks = folder, rank, ranks
        self.path = folder / NAME.format(rank=rank)
        self._file = Journal(self.path) if keeps else None

    def take(self, step: int, numbers: range, batches: Sequence[Batch]) -> None:
        """Step `step` computes the samples `numbers`, which the batches hold in this order."""
        if self._file is None:
            return
        line = {"step": step, "first": numbers.start, "every": numbers.step, "count": len(numbers)}
        line["content"] = f"{content(numbers, batches):016x}"
        self._file.add(json.dumps(line).encode())

    def cut(self, step: int) -> None:
        """Forget what step `step` and later ones took, also on ranks that are no more."""
        if self._file is None:
            return
        self._file.cut(_before(self._file.read().splitlines(keepends=True), step))
        for path in sorted(self.folder.glob(NAME.format(rank=0).replace("00000", "*"))):
            if int(path.stem.split("-")[1]) % self.ranks == self.rank and path != self.path:
                with path.open("r+b") as file:
                    file.truncate(_before(file, step))

    def flush(self) -> None:
        """Bring the lines to the disk."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def content(numbers: Sequence[int], batches: Sequence[Batch]) -> int:
    """A sum over samples of a hash of each one's number and tokens; 0 for batches without rows of tokens."""
    rows = [row for batch in batches for row in getattr(batch, "tokens", ())]
    if len(rows) != len(numbers):
        return sum(xxhash.xxh3_64_intdigest(number.to_bytes(8, "little")) for number in numbers) % _SUMS
    hashes = (xxhash.xxh3_64_intdigest(np.ascontiguousarray(r.numpy()).data, n) for n, r in zip(numbers, rows))
    return sum(hashes) % _SUMS


def audit(folder: Path, passed: Sequence[Sequence[int]] = ()) -> Audit:
    """What the ledgers in `folder` say. Raises `DataError` if one cannot be read."""
    seen: list[np.ndarray] = []
    total = 0
    for path in sorted(folder.glob("samples-*.jsonl")):
        for number, text in enumerate(path.read_bytes().splitlines(), 1):
            try:
                line = json.loads(text)
                stop = line["first"] + line["every"] * line["count"]
                seen.append(np.arange(line["first"], stop, line["every"]))
                total += int(line["content"], 16)
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}:{number} is no line of a ledger: {error}") from None
    counts = np.bincount(np.concatenate(seen)) if seen else np.zeros(0, int)
    expected = np.ones(len(counts), bool)
    for first, last in passed:
        expected[first:last] = False
    return Audit(
        samples=int(counts.sum()),
        content=f"{total % _SUMS:016x}",
        repeated=tuple(np.flatnonzero(counts > 1).tolist()),
        missing=tuple(np.flatnonzero((counts == 0) & expected).tolist()),
    )


def _before(lines: Iterable[bytes], step: int) -> int:
    """The length of the lines before step `step`, without one that a kill left unfinished."""
    kept = 0
    for line in lines:
        if not line.endswith(b"\n") or json.loads(line)["step"] >= step:
            break
        kept += len(line)
    return kept
