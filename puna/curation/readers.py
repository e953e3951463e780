"""Readers: a file or a folder becomes a stream of documents, and of faults for what could not be read.

    .txt .md .rst …     text; a long file is cut at blank lines into pieces of about `piece_bytes`
    .py .java .c …      source code, whole
    .jsonl              one JSON object a line with a string `text`; `source` and `url` are used if they are strings
    .parquet            the same as columns
    .warc               web pages: the main content of HTTP 200 text/html responses (`warc.py`)
    .gz, .zst           after any of these but Parquet

A `Fault` is counted and kept in the ledger like a dropped document; the rest of the file goes on where the format
allows it. Documents are named `file` or `file:number`, by path in the folder, so that anybody can find them again.
Sources are named by the `source` field, else by the file (for files that hold many documents), else by the folder.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from puna import log
from puna.config import require
from puna.curation.documents import Document
from puna.curation.languages import CODE_SUFFIXES, TEXT_SUFFIXES
from puna.curation.streams import COMPRESSED, Damaged, lines, open_bytes
from puna.errors import DataError

RECORD_SUFFIXES = {".jsonl", ".parquet", ".warc"}
ACCEPTED = ".txt .md .rst .jsonl .parquet .warc, source code such as .py, and .gz or .zst of them"


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """What one document may weigh."""

    max_document_bytes: int = 1_000_000  # more text than this in one document is a counted drop
    max_record_bytes: int = 8_000_000  # the same for a raw line of JSON or a page of HTML, before it is taken apart
    piece_bytes: int = 50_000  # plain text files are cut at blank lines into pieces of about this size

    def __post_init__(self) -> None:
        ordered = 0 < self.piece_bytes <= self.max_document_bytes <= self.max_record_bytes
        require(ordered, "sizes must be positive, with piece_bytes <= max_document_bytes <= max_record_bytes")


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that was there to be read and could not be: one row of the ledger."""

    id: str
    source: str
    reason: str
    bytes: int
    evidence: str = ""
    url: str = ""
    unread: int = 0  # bytes of the file, as it lies on the disk, that damage kept from being read


Item = Document | Fault


def read(path: Path, config: ReaderConfig) -> Iterator[Item]:
    """Everything in a file or a folder (sorted by path; hidden files are passed over), documents and faults.

    Raises `DataError` if there is nothing to read: the path is missing, the folder empty, or the type not known.
    """
    if path.is_file():
        if _suffix(path) not in RECORD_SUFFIXES | TEXT_SUFFIXES | CODE_SUFFIXES.keys():
            raise DataError(f"{path} is of a type that is not read", hint=f"accepted: {ACCEPTED}")
        yield from _read_file(path, path.name, path.name.split(".")[0], config)
        return
    if not path.is_dir():
        raise DataError(f"{path} does not exist", hint="give a file or a folder")
    names = _files(path)
    if not names:
        raise DataError(f"{path} has no files", hint=f"accepted: {ACCEPTED}")
    with log.progress("reading", len(names), unit="files") as progress:
        for name in names:
            yield from _read_file(path / name, name, _source(name, path), config)
            progress.advance()


def _files(folder: Path) -> list[str]:
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        names += [(Path(root) / f).relative_to(folder).as_posix() for f in files if not f.startswith(".")]
    return sorted(names)


def _source(name: str, folder: Path) -> str:
    if _suffix(Path(name)) in RECORD_SUFFIXES:
        return Path(name).name.split(".")[0]
    return name.split("/")[0] if "/" in name else folder.resolve().name


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def _read_file(path: Path, name: str, source: str, config: ReaderConfig) -> Iterator[Item]:
    suffix = _suffix(path)
    try:
        if suffix == ".jsonl":
            yield from _guarded(path, name, source, _jsonl, config)
        elif suffix in TEXT_SUFFIXES or suffix in CODE_SUFFIXES:
            yield from _guarded(path, name, source, _code if suffix in CODE_SUFFIXES else _text, config)
        elif suffix == ".parquet":
            yield from _parquet(path, name, source, config)
        elif suffix == ".warc":
            from puna.curation.warc import read_warc

            yield from read_warc(path, name, source, config)
        else:
            yield Fault(name, source, "file type not read", path.stat().st_size, path.suffix or "no suffix")
    except OSError as error:
        log.warn(f"{name} cannot be read: {error.strerror or error}")
        yield Fault(name, source, "file cannot be opened or read", 0, str(error.strerror or error))


def _guarded(path: Path, name: str, source: str, parse, config: ReaderConfig) -> Iterator[Item]:
    """`parse` over the bytes of a file; a damaged stream ends it with a fault that says how much was not read."""
    with open_bytes(path) as (stream, raw):
        try:
            yield from parse(stream, name, source, config)
        except Damaged as error:
            size, position = path.stat().st_size, raw.tell()
            evidence = f"{error}, at byte {position:,} of {size:,}"
            log.warn(f"{name} is damaged ({evidence}): what comes after is not read")
            yield Fault(name, source, "damaged compressed file", 0, evidence, unread=size - position)


def document(name: str, text: str, source: str, url: str, config: ReaderConfig) -> Item:
    """A document with unified line ends, or the fault that its text has."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
    try:
        size = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
        return Fault(name, source, "invalid UTF-8", len(text), "a lone surrogate", url)
    if "\0" in text:
        return Fault(name, source, "binary content", size, "a NUL character", url)
    if size > config.max_document_bytes:
        return Fault(name, source, f"document over {_megabytes(config.max_document_bytes)}", size, text[:200], url)
    if not text.strip():
        return Fault(name, source, "empty text", size, "", url)
    return Document(name, text, source, url)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:g} MB"


def _decoded(name: str, data: bytes, source: str, config: ReaderConfig) -> Item:
    try:
        return document(name, data.decode(), source, "", config)
    except UnicodeDecodeError as error:
        return Fault(name, source, "invalid UTF-8", len(data), f"byte {error.start:,}: 0x{data[error.start]:02x}")


def _code(stream, name: str, source: str, config: ReaderConfig) -> Iterator[Item]:
    data = stream.read(config.max_document_bytes + 1)
    if len(data) <= config.max_document_bytes:
        yield _decoded(name, data, source, config)
        return
    size, start = len(data), data[:200]
    while block := stream.read(1 << 20):
        size += len(block)
    reason = f"document over {_megabytes(config.max_document_bytes)}"
    yield Fault(name, source, reason, size, start.decode(errors="replace"))


def _text(stream, name: str, source: str, config: ReaderConfig) -> Iterator[Item]:
    waiting: Item | None = None  # the first piece keeps the plain file name if it stays the only one
    for number, piece in enumerate(_pieces(stream, name, source, config)):
        if number == 1 and waiting is not None:
            yield _renumbered(waiting, f"{name}:0")
        if number == 0:
            waiting = piece
        else:
            yield _renumbered(piece, f"{name}:{number}")
            waiting = None
    if waiting is not None:
        yield waiting


def _renumbered(item: Item, name: str) -> Item:
    values = {field: getattr(item, field) for field in type(item).__slots__}
    return type(item)(**{**values, "id": name})


def _pieces(stream, name: str, source: str, config: ReaderConfig) -> Iterator[Item]:
    held: list[bytes] = []
    size = 0
    for line, length in lines(stream, config.max_document_bytes):
        if line is None:
            yield Fault(name, source, f"line over {_megabytes(config.max_document_bytes)}", length)
            continue
        full = size >= config.piece_bytes and not line.strip()
        if held and (full or size + length > min(2 * config.piece_bytes, config.max_document_bytes)):
            yield _decoded(name, b"".join(held), source, config)
            held, size = [], 0
        held.append(line)
        size += length
    if held:
        yield _decoded(name, b"".join(held), source, config)


def _jsonl(stream, name: str, source: str, config: ReaderConfig) -> Iterator[Item]:
    for number, (line, length) in enumerate(lines(stream, config.max_record_bytes)):
        where = f"{name}:{number}"
        if line is None:
            yield Fault(where, source, f"line over {_megabytes(config.max_record_bytes)}", length)
        elif line.strip():
            yield _json(where, line, source, config)


def _json(where: str, line: bytes, source: str, config: ReaderConfig) -> Item:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Fault(where, source, "invalid UTF-8", len(line), f"byte {error.start:,}: 0x{line[error.start]:02x}")
    except (ValueError, RecursionError) as error:
        return Fault(where, source, "broken JSON", len(line), str(error)[:200])
    if not isinstance(record, dict):
        return Fault(where, source, "no text field", len(line), f"a {type(record).__name__}, not an object")
    return _record(where, record, source, len(line), config)


def _record(where: str, record: dict, source: str, size: int, config: ReaderConfig) -> Item:
    text, url = record.get("text"), record.get("url")
    if not isinstance(text, str):
        fields = ", ".join(sorted(map(str, record)))[:150]
        return Fault(where, source, "no text field", size, f"fields: {fields}".encode(errors="replace").decode())
    given = record.get("source")
    source = _printable(given) if isinstance(given, str) and given.strip() else source
    return document(where, text, source, _printable(url) if isinstance(url, str) else "", config)


def _printable(value: str) -> str:
    return value.encode(errors="replace").decode()


def _parquet(path: Path, name: str, source: str, config: ReaderConfig) -> Iterator[Item]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                fields = ", ".join(file.schema_arrow.names)[:150]
                yield Fault(name, source, "no text field", path.stat().st_size, f"columns: {fields}")
                return
            columns = [c for c in ("text", "source", "url") if c in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for record in batch.to_pylist():
                    yield _record(f"{name}:{number}", record, source, 0, config)
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        log.warn(f"{name} is damaged after {number:,} documents: what comes after is not read")
        yield Fault(name, source, "damaged Parquet file", 0, f"{error}"[:200], unread=path.stat().st_size)
