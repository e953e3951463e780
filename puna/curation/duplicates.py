"""Duplicates: exact ones by the hash of the text, near ones by MinHash, and no document is dropped on suspicion.

Near-duplicates share most of their shingles (5-word n-grams). MinHash keeps, for each of `bands * rows` random orders of
all shingles, the first one in the document; two documents agree in one such value with probability J, their Jaccard
similarity |A ∩ B| / |A ∪ B|. Documents that agree in all `rows` values of at least one band are candidates:

    P(candidate) = 1 - (1 - J^rows)^bands        with 20 bands of 6 rows: 0.997 at J = 0.8, 0.27 at 0.5

A candidate is only a suspicion. It is compared with documents that *stay*, on the whole shingle sets, and dropped if the
exact similarity reaches the threshold; the kept document and the similarity go to the ledger. So A ~ B ~ C cannot remove
C for the sake of B, which is itself gone: the common way (connected components of candidates) was measured by others to
throw away more distinct documents than real duplicates.

Documents are taken longest first, ties by hash: what stays does not depend on the order of reading.
Shingles are 64-bit hashes kept in a file that is mapped, not loaded; in memory are the signatures (480 bytes a document).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from puna.config import require
from puna.curation.words import Words, shingles
from puna.errors import MissingExtra


@dataclass(frozen=True, kw_only=True)
class DuplicateConfig:
    """What counts as the same document twice."""

    min_jaccard: float = 0.8  # exact similarity of the shingle sets from which a document is a near-duplicate
    shingle_words: int = 5
    bands: int = 20
    rows: int = 6
    max_comparisons: int = 64  # a document is compared with at most so many kept ones, those sharing most bands first
    seed: int = 1

    def __post_init__(self) -> None:
        require(0 < self.min_jaccard <= 1, f"min_jaccard={self.min_jaccard} must be above 0 and at most 1")
        for name in ("shingle_words", "bands", "rows", "max_comparisons"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")


@dataclass(frozen=True, slots=True)
class Duplicate:
    """`index` repeats `kept`, which stays, with exact similarity `jaccard`."""

    index: int
    kept: int
    jaccard: float


def text_hash(text: str) -> int:
    """128-bit identity of a text, white space at its ends aside."""
    return xxhash.xxh3_128_intdigest(text.strip().encode())


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """The exact similarity of two sets given as sorted arrays without repeats."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    union = len(a) + len(b) - shared
    return shared / union if union else 1.0


class ShingleStore:
    """The shingle sets of many documents, one after another in a file; a document is addressed by its position."""

    def __init__(self, path: Path, config: DuplicateConfig):
        self.path, self.config = path, config
        self.offsets = [0]
        self.file = path.open("wb")
        self._mapped: np.ndarray | None = None

    def append(self, words: Words) -> None:
        grams = shingles(words.hashes, self.config.shingle_words)
        self.file.write(grams.tobytes())
        self.offsets.append(self.offsets[-1] + len(grams))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.mapped[self.offsets[index] : self.offsets[index + 1]]

    @property
    def mapped(self) -> np.ndarray:
        """All shingles, (total,) uint64; from the first use on, nothing can be appended."""
        if self._mapped is None:
            self.file.close()
            empty = self.offsets[-1] == 0
            self._mapped = np.zeros(0, np.uint64) if empty else np.memmap(self.path, dtype=np.uint64, mode="r")
        return self._mapped


def signatures(store: ShingleStore, *, batch: int = 2048) -> np.ndarray:
    """The MinHash signatures of all documents in the store, (N, bands * rows) uint32."""
    try:
        from rensa import RMinHash
    except ImportError:
        raise MissingExtra("rensa", "curation") from None
    size = store.config.bands * store.config.rows
    rows = np.zeros((len(store), size), dtype=np.uint32)
    for start in range(0, len(store), batch):
        offsets = np.array(store.offsets[start : start + batch + 1], dtype=np.uint64)
        flat = np.array(store.mapped[int(offsets[0]) : int(offsets[-1])])
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets - offsets[0], size, store.config.seed)
        rows[start : start + batch] = matrix.to_rows()
    return rows


def near_duplicates(
    store: ShingleStore, ranking: Iterable[int], *, groups: list[str] | None = None
) -> tuple[list[Duplicate], dict[str, int]]:
    """The documents of `store` that repeat one that stays, and counts of what was compared.

    `ranking` lists the positions to consider, those that may stay first. With `groups`, only documents of the same
    group are compared (the paper deduplicates within each language).
    """
    config = store.config
    bands = signatures(store).reshape(len(store), config.bands, config.rows)
    buckets: dict[tuple[str, int, bytes], list[int]] = defaultdict(list)
    found: list[Duplicate] = []
    counts = {"candidate_pairs": 0, "compared_pairs": 0, "rejected_pairs": 0}
    for index in ranking:
        if len(store[index]) == 0:
            continue
        group = groups[index] if groups else ""
        keys = [(group, band, bands[index, band].tobytes()) for band in range(config.bands)]
        agreeing = Counter(kept for key in keys for kept in buckets.get(key, ()))
        counts["candidate_pairs"] += len(agreeing)
        duplicate = _verify(store, index, agreeing, counts)
        if duplicate is not None:
            found.append(duplicate)
            continue
        for key in keys:
            buckets[key].append(index)
    return found, counts


def _verify(store: ShingleStore, index: int, agreeing: Counter[int], counts: dict[str, int]) -> Duplicate | None:
    """The first kept candidate that the document repeats indeed."""
    own = store[index]
    for kept, _ in sorted(agreeing.items(), key=lambda item: (-item[1], item[0]))[: store.config.max_comparisons]:
        counts["compared_pairs"] += 1
        similarity = jaccard(own, store[kept])
        if similarity >= store.config.min_jaccard:
            return Duplicate(index, kept, round(similarity, 4))
        counts["rejected_pairs"] += 1
    return None
