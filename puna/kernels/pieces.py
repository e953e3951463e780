"""Merging a text's characters into pieces, in C++ (`native/pieces.cpp`).

The reference is `puna.tokenizer.merging`, which joins the symbols of one word; here whole texts are cut up, joined and
looked up in one call. Needs no PyTorch.
"""

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import c_int32, c_int64, c_uint32, c_void_p
from functools import cache
from pathlib import Path

import numpy as np

_FILE = Path(__file__).with_name("native") / "libpuna.so"


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(_FILE))
        library.puna_pieces.restype = c_void_p
        arrays = (c_void_p, c_int64, c_void_p, c_int64, *(c_void_p,) * 4, c_int64, c_void_p)
        library.puna_pieces.argtypes = (*arrays, c_int32, c_uint32)
        library.puna_pieces_free.restype, library.puna_pieces_free.argtypes = None, (c_void_p,)
        library.puna_pieces_encode.restype = c_int64
        library.puna_pieces_encode.argtypes = (c_void_p, c_void_p, c_int64, c_void_p)
    except (OSError, AttributeError):
        return None
    return library


def available() -> bool:
    """Whether the library was built, and has this."""
    return _library() is not None


class Merger:
    """Texts into ids by joining pairs.

    `pairs` says which two texts may be joined, and their rank: the lowest first, the leftmost among equals. `ids` are those
    of single characters and of joined texts. A character without an id becomes the ids of its UTF-8 in `bytes`, or `unknown`
    where that is empty. `space` is the character that begins a word, if no join reaches from one word into the next.
    """

    def __init__(
        self,
        pairs: Mapping[tuple[str, str], int],
        ids: Mapping[str, int],
        bytes: Sequence[int],
        unknown: int,
        space: str = "",
    ):
        self._made_of = (pairs, ids, bytes, unknown, space)
        texts = {text for left, right in pairs for text in (left, right, left + right)}
        texts |= {text for text in ids if len(text) == 1}
        ordered = sorted(texts, key=lambda text: (len(text) > 1, text))
        number = {text: place for place, text in enumerate(ordered)}
        characters = np.array([ord(text) for text in ordered if len(text) == 1], dtype=np.uint32)
        own = np.array([ids.get(text, -1) for text in ordered], dtype=np.int32)
        rows = [(number[left], number[right], rank, number[left + right]) for (left, right), rank in pairs.items()]
        table = np.ascontiguousarray(np.array(rows, dtype=np.int32).reshape(-1, 4).T)
        spelt = np.array(bytes, dtype=np.int32)
        self._pointer = _library().puna_pieces(
            characters.ctypes.data, len(characters), own.ctypes.data, len(own), *(row.ctypes.data for row in table),
            len(rows), spelt.ctypes.data if len(spelt) else None, unknown, ord(space) if space else 0,
        )  # fmt: skip

    def __del__(self) -> None:
        if pointer := getattr(self, "_pointer", None):
            _library().puna_pieces_free(pointer)

    def __reduce__(self) -> tuple:
        return Merger, self._made_of

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, which has no half of a surrogate pair."""
        characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        out = np.empty(4 * len(characters), dtype=np.int32)
        count = _library().puna_pieces_encode(self._pointer, characters.ctypes.data, len(characters), out.ctypes.data)
        return out[:count].tolist()
