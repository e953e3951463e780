"""A user's own text, cut into excerpts that are measured one by one.

A file is one text. A long text is cut at the ends of its lines into pieces of at most `piece_bytes`; nothing is left
out. Each piece is read afresh, as in `heldout.py`, so that the pieces are what an interval can be taken over, and a
model with a short context is charged for the same text as one with a long one.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from puna.errors import DataError
from puna.evaluation.heldout import Excerpt

PIECE_BYTES = 2048  # as much as of a held-out document: enough pieces for an interval even of a short text


def read_files(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """(name, text) of UTF-8 files. Raises `DataError` for one that is missing, empty, or no text."""
    found = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            hint = "give plain text in UTF-8; iconv converts other encodings"
            raise DataError(f"{path} is not UTF-8 text (byte {error.start:,})", hint=hint) from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}", hint="check the spelling") from None
        if not text.strip():
            raise DataError(f"{path} holds no text", hint="give a file with some text to read")
        found.append((str(path), text))
    return found


def cut(texts: Iterable[tuple[str, str, str]], piece_bytes: int = PIECE_BYTES, most_bytes: int = 0) -> list[Excerpt]:
    """Excerpts of (id, source, text), in order, up to `most_bytes` in all (0: everything)."""
    found: list[Excerpt] = []
    total = 0
    for id, source, text in texts:
        for number, piece in enumerate(_pieces(text, piece_bytes)):
            excerpt = Excerpt(id=f"{id}#{number}", source=source, text=piece)
            total += excerpt.bytes
            if most_bytes and total > most_bytes:
                return found
            found.append(excerpt)
    return found


def _pieces(text: str, size: int) -> Iterator[str]:
    data = text.encode("utf-8", "replace")
    start = 0
    while start < len(data):
        stop = min(start + size, len(data))
        if stop < len(data):
            line = data.rfind(b"\n", start + size // 2, stop)
            stop = line + 1 if line >= 0 else _character_start(data, start, stop)
        if data[start:stop].strip():
            yield data[start:stop].decode()
        start = stop


def _character_start(data: bytes, start: int, stop: int) -> int:
    """The last place at or before `stop` where a character begins."""
    while stop > start + 1 and data[stop] & 0xC0 == 0x80:
        stop -= 1
    return stop
