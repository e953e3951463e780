"""Token shards: documents as ids on disk, read by memory mapping, any sample by its number.

`tokenise` writes each document as `<|begin_of_text|>` ids `<|end_of_text|>`, documents one after another, for each
split and each part of the input

    train-00000.tokens.npy       uint16 (uint32 above 65,536 ids), the ids
    train-00000.documents.npy    a row for each document: the end of its ids in the file, UTF-8 bytes, source
    tokens.json                  names of the sources, shards of each split, totals

A shard holds whole row groups of the input, chosen by their sizes alone. It is renamed into place when complete, so an
interrupted run continues with the first shard that is not there.

Training sees the shards of a split as one stream of ids. Sample `i` of length `n` is positions [i n, (i+1) n + 1): `n`
inputs and, one further, their targets, so samples overlap by one id and every id but the first is a target once. The
few ids after the last whole sample are in no sample of that length. A sample is a pure function of its number: nothing
is read in order, nothing is remembered between calls, so any worker resumes anywhere.

Each epoch visits the samples in another order. A permutation of a billion numbers is not stored but computed: a
four-round Feistel network over the smallest square power of two that holds them, walked until it lands inside.
"""

import functools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from puna import log
from puna.artifacts import Artifact, replacing, stage, write_atomic
from puna.config import require
from puna.errors import ArtifactError, DataError
from puna.tokenizer.load import AnyTokenizer, load_tokenizer
from puna.tokenizer.pretokens import pieces
from puna.tokenizer.texts import Text, group_bytes, read_texts, sources, text_count

SPLITS = ("train", "heldout")
INDEX = "tokens.json"
BATCH = 256  # documents encoded together
ROW = np.dtype([("end", "<u8"), ("bytes", "<u8"), ("source", "<u4")])


@dataclass(frozen=True, kw_only=True)
class TokeniseConfig:
    """How documents are cut into shards."""

    shard_bytes: int = 256_000_000  # of input, about; one shard's ids are held in memory while it is written

    def __post_init__(self) -> None:
        require(self.shard_bytes > 0, f"shard_bytes={self.shard_bytes} must be positive")


@stage("tokens")
def tokenise(config: TokeniseConfig, documents: Artifact, tokenizer: Artifact, *, out: Path) -> dict[str, Any]:
    """Encode `documents` with `tokenizer` into shards. Raises `DataError` if the training split has no document."""
    path = documents.file("documents.parquet")
    tokenizer.file("tokenizer.model")
    encoder = load_tokenizer(tokenizer.path)
    names = sources(path)
    parts = _parts(group_bytes(path), config.shard_bytes)
    with log.progress("tokenise", text_count(path), unit="documents") as task:
        for number, groups in enumerate(parts):
            for split in SPLITS:
                name = f"{split}-{number:05d}"
                if (out / f"{name}.documents.npy").exists():  # an earlier run's
                    task.advance(len(np.load(out / f"{name}.documents.npy", mmap_mode="r")))
                else:
                    _write_shard(out, name, encoder, read_texts(path, split, groups), names, task)
    splits = {split: _summary(out, split, len(parts), names) for split in SPLITS}
    if not splits["train"]["documents"]:
        raise DataError(f"{path} has no document in the split 'train'", hint="curate more text, or drop less of it")
    index = {"vocab_size": encoder.vocab_size, "sources": names, "splits": splits}
    write_atomic(out / INDEX, json.dumps(index, indent=1, ensure_ascii=False))
    return {split: {k: v for k, v in splits[split].items() if k != "shards"} for split in SPLITS}


def _parts(sizes: list[int], limit: int) -> list[list[int]]:
    """Consecutive row groups of the input, together about `limit` bytes."""
    parts: list[list[int]] = []
    size = limit
    for group, bytes_ in enumerate(sizes):
        if size + bytes_ > limit:
            parts.append([])
            size = 0
        parts[-1].append(group)
        size += bytes_
    return parts


def _write_shard(
    out: Path, name: str, encoder: AnyTokenizer, texts: Iterator[Text], names: list[str], task: log.Progress
) -> None:
    """Write the shard `name`. The file of documents comes last, so its presence means complete."""
    dtype = np.uint16 if encoder.vocab_size <= 1 << 16 else np.uint32
    number = {source: i for i, source in enumerate(names)}
    blocks, rows, end = [np.zeros(0, dtype)], [], 0

    def encoded(text: Text) -> np.ndarray:
        # Piece by piece, since a list of Python's integers takes ten times the memory of an array.
        ids = (np.array(encoder.encode(piece), dtype) for piece in pieces(text.text))
        return np.concatenate([np.array([encoder.bos], dtype), *ids, np.array([encoder.eos], dtype)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in _batches(texts):
            for text, ids in zip(batch, pool.map(encoded, batch)):
                blocks.append(ids)
                end += len(ids)
                rows.append((end, len(text.text.encode()), number[text.source]))
            task.advance(len(batch))
    for kind, array in (("tokens", np.concatenate(blocks)), ("documents", np.array(rows, ROW))):
        with replacing(out / f"{name}.{kind}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)


def _batches(texts: Iterator[Text]) -> Iterator[list[Text]]:
    batch: list[Text] = []
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _summary(out: Path, split: str, shards: int, names: list[str]) -> dict[str, Any]:
    """The non-empty shards of a split and their totals."""
    kept, tokens, documents, bytes_ = [], 0, 0, 0
    by_source = np.zeros(len(names), np.int64)
    for name in (f"{split}-{i:05d}" for i in range(shards)):
        rows = np.load(out / f"{name}.documents.npy")
        if not len(rows):
            continue
        kept.append(name)
        tokens += int(rows["end"][-1])
        documents += len(rows)
        bytes_ += int(rows["bytes"].sum())
        lengths = np.diff(rows["end"].astype(np.int64), prepend=0)
        by_source += np.bincount(rows["source"], lengths, len(names)).astype(np.int64)
    return {
        "shards": kept,
        "tokens": tokens,
        "documents": documents,
        "bytes": bytes_,
        "tokens_by_source": dict(zip(names, by_source.tolist())),
    }


class Document(NamedTuple):
    """One document: its ids with BOS and EOS (int64), the UTF-8 bytes of its text, its source."""

    tokens: np.ndarray
    bytes: int
    source: str


class TokenShards:
    """One split of a tokens artifact. `tokens`, `documents` and `bytes` are its totals."""

    def __init__(self, arrays: list[np.ndarray], rows: list[np.ndarray], source_names: list[str]):
        self._arrays = arrays
        self._starts = np.cumsum([0, *(len(a) for a in arrays)])  # of each shard in the stream, and the end of all
        # The end of each document in the stream: eight bytes a document, kept in memory.
        self._ends = np.concatenate(
            [np.zeros(0, np.int64), *(r["end"].astype(np.int64) + start for r, start in zip(rows, self._starts))]
        )
        self._rows = rows
        self._first_rows = np.cumsum([0, *(len(r) for r in rows)])
        self._source_names = source_names
        self.tokens = int(self._starts[-1])
        self.documents = len(self._ends)
        self.bytes = int(sum(r["bytes"].sum() for r in rows))

    @classmethod
    def load(cls, artifact: Artifact, split: str = "train") -> "TokenShards":
        """The shards of `split` ("train" or "heldout"), mapped, not read. Raises `ArtifactError` if they do not fit."""
        index = json.loads(artifact.file(INDEX).read_text())
        if split not in index["splits"]:
            raise ArtifactError(f"{artifact.path} has no split {split!r}", hint=f"its splits are {', '.join(SPLITS)}")

        def mapped(name: str) -> np.ndarray:
            return np.load(artifact.file(name), mmap_mode="r", allow_pickle=False)

        shards = index["splits"][split]["shards"]
        arrays = [mapped(f"{name}.tokens.npy") for name in shards]
        return cls(arrays, [mapped(f"{name}.documents.npy") for name in shards], index["sources"])

    def samples(self, length: int) -> int:
        """How many samples of `length` inputs there are."""
        return max(0, self.tokens - 1) // length

    def sample(self, index: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions [index * length, (index + 1) * length + 1) of the stream: ids (int64) and documents (int32).

        Documents are numbered from 0 within the sample. Where the number changes from one position to the next, the
        next id is another document's BOS, which nothing predicts. Raises `IndexError` past the last sample.
        """
        if not 0 <= index < self.samples(length):
            raise IndexError(f"sample {index} of {self.samples(length)} samples of {length} tokens")
        start = index * length
        stop = start + length + 1
        documents = np.searchsorted(self._ends, np.arange(start, stop), side="right")
        return self._read(start, stop), (documents - documents[0]).astype(np.int32)

    def shuffled(self, index: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The sample at place `index` of an endless shuffled order: every epoch visits each sample once."""
        total = self.samples(length)
        if not total:
            raise DataError(
                f"{self.tokens:,} tokens do not make one sample of {length}",
                hint="give more text, or set a shorter sequence length",
            )
        epoch, place = divmod(index, total)
        return self.sample(permuted(place, total, f"{seed}/{epoch}"), length)

    def document(self, index: int) -> Document:
        """The document at place `index` of the split."""
        start = int(self._ends[index - 1]) if index else 0
        shard = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        row = self._rows[shard][index - self._first_rows[shard]]
        return Document(
            self._read(start, int(self._ends[index])), int(row["bytes"]), self._source_names[int(row["source"])]
        )

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop) of the stream, from as many shards as they lie in."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left"))
        parts = []
        for array, offset in zip(self._arrays[first:last], self._starts[first:last]):
            parts.append(array[max(0, start - offset) : stop - offset])
        return np.concatenate(parts).astype(np.int64)


ROUNDS = 4


def permuted(index: int, total: int, key: str) -> int:
    """Where `index` goes in the permutation of range(`total`) that `key` names."""
    half = max(1, ((total - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = _round_keys(key)
    while True:
        left, right = index >> half, index & mask
        for round_key in keys:
            left, right = right, left ^ (xxhash.xxh3_64_intdigest(right.to_bytes(8, "little"), round_key) & mask)
        index = left << half | right
        if index < total:
            return index


@functools.lru_cache(maxsize=64)
def _round_keys(key: str) -> tuple[int, ...]:
    return tuple(xxhash.xxh3_64_intdigest(f"{key}/{r}".encode()) for r in range(ROUNDS))
