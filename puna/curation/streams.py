"""Bytes from a file that nobody vouches for: compressed or not, cut off, damaged, or one endless line.

Two promises. Memory stays bounded, however much a file claims to hold: lines are read up to a limit, and decompression
goes in small steps (256 bytes of zstd can become 8 MB at most: a whole bomb never opens at once). And a stream that ends too
early or does not decode raises `Damaged`, rather than looking like a shorter file: zstd's own reader takes a truncated
file for a complete one, so the frames are followed here.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zstandard

COMPRESSED = {".zst": "zstd", ".gz": "gzip"}
STEP_BYTES = 256
SKIP_BYTES = 1 << 20


class Damaged(Exception):
    """A compressed file is cut off or its content does not decode."""


@contextmanager
def open_bytes(path: Path) -> Iterator[tuple[io.BufferedReader, io.FileIO]]:
    """The decompressed content of `path`, and the raw file, whose position tells how far reading has come."""
    with path.open("rb", buffering=0) as raw:
        compression = COMPRESSED.get(path.suffix.lower())
        if compression == "zstd":
            yield io.BufferedReader(_Zstd(raw)), raw
        elif compression == "gzip":
            yield io.BufferedReader(_Gzip(raw)), raw
        else:
            yield io.BufferedReader(raw), raw


def lines(stream: io.BufferedReader, limit: int) -> Iterator[tuple[bytes | None, int]]:
    """Each line with its length in bytes; a line of more than `limit` bytes as None, its content thrown away."""
    while line := stream.readline(limit + 1):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line, len(line)
            continue
        length = len(line)
        while not line.endswith(b"\n") and (line := stream.readline(SKIP_BYTES)):
            length += len(line)
        yield None, length


class _Zstd(io.RawIOBase):
    """Concatenated zstd frames, each of which must end."""

    def __init__(self, raw: io.FileIO):
        self.raw, self.frame, self.inside, self.pending = raw, None, False, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.pending:
            block = self.raw.read(STEP_BYTES)
            if not block:
                if self.inside:
                    raise Damaged("the file ends inside a frame")
                return 0
            self.pending = memoryview(self._decompress(block))
        count = min(len(buffer), len(self.pending))
        buffer[:count] = self.pending[:count]
        self.pending = self.pending[count:]
        return count

    def _decompress(self, block: bytes) -> bytes:
        parts = []
        try:
            while block:
                if not self.inside:
                    self.frame, self.inside = zstandard.ZstdDecompressor().decompressobj(), True
                parts.append(self.frame.decompress(block))
                block = b""
                if self.frame.eof:
                    block, self.inside = self.frame.unused_data, False
        except zstandard.ZstdError as error:
            raise Damaged(str(error).removeprefix("zstd decompressor error: ")) from None
        return b"".join(parts)


class _Gzip(io.RawIOBase):
    """Concatenated gzip members, each with its checksum."""

    def __init__(self, raw: io.FileIO):
        self.file = gzip.GzipFile(fileobj=raw)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            data = self.file.read1(len(buffer))  # no more than is there: damage further on must not take it along
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise Damaged(str(error)) from None
        buffer[: len(data)] = data
        return len(data)
