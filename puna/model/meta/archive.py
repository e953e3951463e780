"""The zip archive that `torch.save` writes, opened without trusting it.

    local header, name, padding, bytes       x/data.pkl       which tensor lies where (`unpickle.py`)
    local header, name, padding, bytes       x/data/0         the numbers of one storage, little-endian
    ...                                      x/data/1 ...     one entry for each further storage
    central directory                        name, size, CRC and place of every entry
    end record                               where the central directory lies; preceded by a wider one above 4 GiB

Nothing is ever unpacked: an entry is a range of the file, which is why compressed entries are refused. The directory is
believed only where it fits the file: every entry lies before the directory, no two overlap, names stay inside the
archive, and what is read from front to back has the checksum that the directory states. So a claim can cost no more
memory than the file is long.
"""

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from puna.artifacts import open_regular
from puna.errors import ArtifactError

_END = struct.Struct("<4s4H2IH")
_WIDE_POINTER = struct.Struct("<4sIQI")
_WIDE_END = struct.Struct("<4sQ2H2I4Q")
_RECORD = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_WIDE_EXTRA = 1  # the id of the extra field that holds numbers of 64 bits
_IN_EXTRA = 0xFFFFFFFF  # "look in the extra field"
_MOST_ENTRIES = 100_000  # the 405B model in one file has about 1,200
_MOST_DIRECTORY_BYTES = 32 << 20
_HINT = "the file is damaged or was not copied completely: fetch it again"
_RESAVE = "write it again: torch.save(torch.load(file, weights_only=True), file), with PyTorch 1.6 or later"


@dataclass(frozen=True)
class Entry:
    """A range of the file: `begin` and `size` in bytes; `crc` is zero where the writer computed none."""

    begin: int
    size: int
    crc: int


class StoredZip:
    """An open archive whose entries are stored as they are. Use as a context.

    Raises `ArtifactError` for a file that is none, or whose directory does not fit it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = open_regular(path)
        self._running: dict[str, tuple[int, int]] = {}  # entry -> where a read from its front has come to, CRC so far
        try:
            self.entries = self._read_entries(os.fstat(self._file.fileno()).st_size)
        except struct.error:
            self.close()
            raise self._fault("has a broken zip directory") from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "StoredZip":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back; reading ends."""
        self._file.close()

    def read(self, name: str, most_bytes: int) -> bytes:
        """A whole small entry. Raises `ArtifactError` if it is longer than `most_bytes`, or damaged."""
        size = self.entries[name].size
        if size > most_bytes:
            raise self._fault(f"has {size:,} bytes in {name!r}, at most {most_bytes:,} are read there")
        content = bytearray(size)
        self.read_into(name, 0, memoryview(content))
        return bytes(content)

    def read_into(self, name: str, offset: int, wanted: memoryview) -> None:
        """Fill `wanted` with the bytes of an entry from `offset` on.

        Reads that follow each other from an entry's front to its end are compared with its checksum.
        """
        entry = self.entries[name]
        if offset < 0 or offset + len(wanted) > entry.size:
            raise self._fault(f"has no bytes {offset:,} to {offset + len(wanted):,} in {name!r}")
        self._file.seek(entry.begin + offset)
        if self._file.readinto(wanted) != len(wanted):
            raise self._fault("ended while it was read")
        come, crc = (0, 0) if offset == 0 else self._running.get(name, (-1, 0))
        if come == offset:
            come, crc = offset + len(wanted), zlib.crc32(wanted, crc)
            self._running[name] = come, crc
            if come == entry.size and entry.crc not in (0, crc):
                raise self._fault(f"is damaged: the checksum of {name!r} is another")

    def _fault(self, what: str, hint: str = _HINT) -> ArtifactError:
        return ArtifactError(f"{self.path} {what}", hint=hint)

    def _take(self, begin: int, length: int) -> bytes:
        self._file.seek(begin)
        return self._file.read(length)

    def _read_entries(self, size: int) -> dict[str, Entry]:
        begin, length, count = self._find_directory(size)
        directory = self._take(begin, length)
        entries: dict[str, Entry] = {}
        position = 0
        for _ in range(count):
            name, entry, position = self._read_record(directory, position, begin)
            if name in entries:
                raise self._fault(f"has the entry {name!r} twice")
            entries[name] = entry
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
            if entry.begin < end:
                raise self._fault(f"has overlapping entries, {name!r} is one of them")
            end = entry.begin + entry.size
        return entries

    def _find_directory(self, size: int) -> tuple[int, int, int]:
        """Where the central directory begins, its length, and how many entries it has."""
        self._refuse_other_formats(self._take(0, 16))
        tail = self._take(max(0, size - _END.size), _END.size)
        if len(tail) < _END.size or tail[:4] != b"PK\5\6":
            raise self._fault("is cut off: it does not end as a zip archive does")
        _, _, _, _, count, length, begin, _ = _END.unpack(tail)
        end = size - _END.size
        pointer = self._take(max(0, end - _WIDE_POINTER.size), _WIDE_POINTER.size)
        if end >= _WIDE_POINTER.size and pointer[:4] == b"PK\6\7":
            end = _WIDE_POINTER.unpack(pointer)[2]
            wide = self._take(end, _WIDE_END.size) if end < size else b""
            if wide[:4] != b"PK\6\6":
                raise self._fault("has a broken zip directory")
            count, length, begin = _WIDE_END.unpack(wide)[-3:]
        if begin + length > end or length > _MOST_DIRECTORY_BYTES or count > _MOST_ENTRIES:
            claim = f"claims {count:,} entries in a zip directory of {length:,} bytes at {begin:,}"
            raise self._fault(f"{claim}; the file has {size:,} bytes")
        return begin, length, count

    def _refuse_other_formats(self, start: bytes) -> None:
        if start.startswith(b"version https"):
            raise self._fault("is a pointer that stands for the weights", "fetch the file itself, with Git LFS")
        if start.startswith(b"\x80"):
            raise self._fault("is a pickle in PyTorch's old form, without a zip archive", _RESAVE)
        if not start.startswith(b"PK\3\4"):
            raise self._fault("is not a file of torch.save: it does not begin as a zip archive does")

    def _read_record(self, directory: bytes, position: int, limit: int) -> tuple[str, Entry, int]:
        """One entry of the directory, and where the next one begins; data must end before `limit`."""
        record = _RECORD.unpack_from(directory, position)
        magic, flags, method, crc = record[0], record[3], record[4], record[7]
        packed, size, name_bytes, extra_bytes, comment_bytes = record[8:13]
        start = position + _RECORD.size
        end = start + name_bytes + extra_bytes
        if magic != b"PK\1\2" or end + comment_bytes > len(directory):
            raise self._fault("has a broken zip directory")
        raw = directory[start : start + name_bytes]
        name = self._safe_name(raw)
        if method != 0 or flags & 1:
            how = "is encrypted" if flags & 1 else "is compressed"
            raise self._fault(f"has an entry {name!r} that {how}; only stored entries are read", _RESAVE)
        size, packed, header = _widened(directory[start + name_bytes : end], [size, packed, record[-1]])
        begin = self._data_begin(header, raw, limit)
        if packed != size or begin + size > limit:
            raise self._fault(f"claims {size:,} bytes for {name!r}, which do not fit the file")
        return name, Entry(begin, size, crc), end + comment_bytes

    def _data_begin(self, header: int, raw_name: bytes, limit: int) -> int:
        local = self._take(header, _LOCAL.size + len(raw_name)) if header < limit else b""
        if len(local) < _LOCAL.size or local[:4] != b"PK\3\4" or local[_LOCAL.size :] != raw_name:
            raise self._fault("has a zip directory that does not fit its entries")
        *_, name_bytes, extra_bytes = _LOCAL.unpack_from(local)
        return header + _LOCAL.size + name_bytes + extra_bytes

    def _safe_name(self, raw: bytes) -> str:
        name = raw.decode("utf-8", "backslashreplace")
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in PurePosixPath(name).parts:
            raise self._fault(f"has an entry whose name leaves the archive: {name[:80]!r}")
        return name


def _widened(extra: bytes, numbers: list[int]) -> list[int]:
    """`numbers` with those that did not fit 32 bits taken from the extra field, in their order."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == _WIDE_EXTRA:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, position + 4))
            return [next(wide, n) if n == _IN_EXTRA else n for n in numbers]
        position += 4 + length
    return numbers
