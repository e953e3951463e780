"""Which held-out text a measurement is made on.

The model, the n-gram models and the compressors must be charged for exactly the same bytes. So the text is chosen here,
once, from nothing but the documents and a seed: documents in the order of a hash, an excerpt of each, until `max_bytes`.

A document longer than `excerpt_bytes` is represented by a stretch of it that begins at a hash-chosen line: beginnings of
files are licences and tables of contents, easier than what follows. Each excerpt starts afresh, with nothing but the
start symbol before it, and its end is not predicted, by anybody.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import xxhash

from puna.artifacts import Artifact
from puna.config import require
from puna.errors import DataError

_LINE_SEARCH_BYTES = 256  # how far an excerpt's start may move to begin a line


@dataclass(frozen=True, kw_only=True)
class HeldoutConfig:
    """What of the held-out documents is measured."""

    max_bytes: int = 200_000  # total text; evaluation time is proportional to it
    excerpt_bytes: int = 2048  # most of one document, so that many documents take part
    seed: int = 0  # of the choice of documents and excerpts, and of the bootstrap

    def __post_init__(self) -> None:
        require(self.excerpt_bytes >= 16, f"excerpt_bytes={self.excerpt_bytes} is too short to measure anything")
        require(self.max_bytes >= self.excerpt_bytes, "max_bytes must hold at least one excerpt (excerpt_bytes)")


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """A stretch of one held-out document."""

    id: str
    source: str
    text: str

    @property
    def bytes(self) -> int:
        return len(self.text.encode())


def read_texts(documents: Artifact, split: str) -> Iterator[tuple[str, str, str]]:
    """`(id, source, text)` of every document of a split, in file order."""
    import pyarrow.parquet as parquet

    file = parquet.ParquetFile(documents.file("documents.parquet"))
    for batch in file.iter_batches(batch_size=1024, columns=["id", "source", "text", "split"]):
        for row in batch.to_pylist():
            if row["split"] == split and row["text"]:
                yield row["id"], row["source"], row["text"]


def sample_excerpts(documents: Artifact, config: HeldoutConfig) -> list[Excerpt]:
    """Held-out excerpts, in the order of a seeded hash of the documents' ids, up to `max_bytes` in all.

    The order does not depend on the file's order. Raises `DataError` if no document is held out.
    """
    chosen = choose(read_texts(documents, "heldout"), config)
    if not chosen:
        raise DataError(f"{documents.path} holds out no document", hint="give curation a held-out share above 0")
    return chosen


def choose(texts: Iterable[tuple[str, str, str]], config: HeldoutConfig) -> list[Excerpt]:
    """Excerpts of (id, source, text), chosen as `sample_excerpts` does."""
    rows = [(_hash(config.seed, id), id, source, text) for id, source, text in texts]
    chosen, total = [], 0
    for order, id, source, text in sorted(rows):
        excerpt = Excerpt(id=id, source=source, text=_excerpt(text, order, config.excerpt_bytes))
        if total + excerpt.bytes > config.max_bytes:
            break
        chosen.append(excerpt)
        total += excerpt.bytes
    return chosen


def _hash(seed: int, id: str) -> int:
    return xxhash.xxh3_64_intdigest(id.encode(), seed=seed)


def _excerpt(text: str, order: int, size: int) -> str:
    data = text.encode()
    if len(data) <= size:
        return text
    start = order % (len(data) - size + 1)
    newline = data.find(b"\n", start, min(start + _LINE_SEARCH_BYTES, len(data) - size))
    start = newline + 1 if newline >= 0 else start
    return data[start : start + size].decode(errors="ignore")  # drops the parts of characters cut at either end
