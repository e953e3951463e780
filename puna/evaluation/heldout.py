"""Which held-out text a measurement is made on: excerpts, and the pieces of them that fit a context window.

The model, the n-gram models and the compressors must be charged for exactly the same bytes. So the text is chosen here,
once, from nothing but the documents and a seed:

    documents --hash order, until max_bytes--> excerpts --at most window_tokens each--> pieces = (context, text)

A document longer than `excerpt_bytes` is represented by a stretch of it that begins at a hash-chosen line: beginnings of
files are licences and tables of contents, easier than what follows. A piece's text is scored given its context; pieces
of one excerpt tile it without gap or overlap. The end of a document is never predicted, by anybody.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import xxhash

from puna.artifacts import Artifact
from puna.chat import Continuation
from puna.config import require
from puna.errors import DataError
from puna.tokenizer import Tokenizer

_LINE_SEARCH_BYTES = 256  # how far an excerpt's start may move to begin a line
_BOUNDARY_TOKENS = 8  # room for pieces that get a few tokens more when they are encoded on their own


@dataclass(frozen=True, kw_only=True)
class HeldoutConfig:
    """What of the held-out documents is measured, and through which window."""

    max_bytes: int = 200_000  # total text; evaluation time is proportional to it
    excerpt_bytes: int = 2048  # most of one document, so that many documents take part
    window_tokens: int = 512  # context length that the scored model is given: <|begin_of_text|>, context and text
    seed: int = 0  # of the choice of documents and excerpts, and of the bootstrap

    def __post_init__(self) -> None:
        require(self.excerpt_bytes >= 16, f"excerpt_bytes={self.excerpt_bytes} is too short to measure anything")
        require(self.max_bytes >= self.excerpt_bytes, "max_bytes must hold at least one excerpt (excerpt_bytes)")
        require(self.window_tokens >= 64, f"window_tokens={self.window_tokens} leaves no room for context and text")


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
    rows = [(_hash(config.seed, id), id, source, text) for id, source, text in read_texts(documents, "heldout")]
    if not rows:
        raise DataError(f"{documents.path} holds out no document", hint="give curation a held-out share above 0")
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


def pieces(text: str, tokenizer: Tokenizer, window_tokens: int) -> list[Continuation]:
    """`text` as continuations that each fit `window_tokens` with their context; joined, their texts are `text`.

    The first piece fills the window; each later one takes half of it and has the other half as context.
    """
    room = window_tokens - 1 - _BOUNDARY_TOKENS  # 1 for <|begin_of_text|>
    parts = [tokenizer.decode_bytes([id]) for id in tokenizer.encode(text)]
    ends = [0, *accumulate(len(p) for p in parts)]  # byte position of each token boundary
    data, result, start, size = text.encode(), [], 0, room
    while start < len(parts):
        stop = _cut(parts, start, start + size)
        context_from = _character_boundary(parts, max(0, start - (room - size)), start)
        context = data[ends[context_from] : ends[start]].decode()
        result.append(Continuation(text=data[ends[start] : ends[stop]].decode(), context=context))
        start, size = stop, room // 2
    return result


def _cut(parts: list[bytes], start: int, limit: int) -> int:
    """The last good token boundary in `(start, limit]`: before white space if there is one in the later half."""
    if limit >= len(parts):
        return len(parts)
    for boundary in range(limit, (start + limit) // 2, -1):
        if parts[boundary][:1] in (b" ", b"\n"):
            return boundary
    # A character has at most four bytes, hence at most four tokens.
    return next(b for b in range(limit, start, -1) if not _continues_character(parts[b]))


def _character_boundary(parts: list[bytes], start: int, stop: int) -> int:
    while start < stop and _continues_character(parts[start]):
        start += 1
    return start


def _continues_character(part: bytes) -> bool:
    return part[0] & 0b1100_0000 == 0b1000_0000
