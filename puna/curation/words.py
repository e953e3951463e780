"""A document's words as numbers: hashed once, and everything that counts repetition works on the array.

The text's UTF-8 bytes are looked at as one array; a word is a maximal run of letters, digits and bytes of non-ASCII
characters. Scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan) count each character as a word;
their punctuation, and Unicode's general punctuation, separate words.

The hash of a word b_1 … b_n is the polynomial  sum_j T[b_j] * P^j  modulo 2^64, with a random odd-valued table T that maps
capital ASCII letters like small ones. Prefix sums give every word of the document at once:

    S_i = T[b_1] P^1 + … + T[b_i] P^i          hash(word at bytes s..e) = (S_e - S_s) * P^-s

P is odd, so it has an inverse modulo 2^64. A finaliser mixes the bits. n-grams are hashed the same way, one level up.
No Python object per word is ever made: this is what lets filters and deduplication run at thousands of documents a second.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_SEPARATOR, _LETTER, _DIGIT, _HIGH = 0, 1, 2, 3
_BASE = 0x9E3779B97F4A7C15  # odd
_BLOCK = 1 << 16


def _classes() -> np.ndarray:
    classes = np.zeros(256, dtype=np.uint8)
    for byte in range(256):
        if chr(byte).isascii() and chr(byte).isalpha():
            classes[byte] = _LETTER
        elif chr(byte).isascii() and (chr(byte).isdigit() or byte == ord("_")):
            classes[byte] = _DIGIT
        elif byte >= 0x80:
            classes[byte] = _HIGH
    return classes


def _table() -> np.ndarray:
    table = np.random.default_rng(20240723).integers(0, 1 << 63, 256, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    table[ord("A") : ord("Z") + 1] = table[ord("a") : ord("z") + 1]
    return table


def _powers(base: int, count: int) -> np.ndarray:
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


_CLASSES, _TABLE = _classes(), _table()
_FORWARD, _BACKWARD = _powers(_BASE, _BLOCK), _powers(pow(_BASE, -1, 1 << 64), _BLOCK)


def _grown(powers: np.ndarray, base: int, count: int) -> np.ndarray:
    return powers if count <= len(powers) else _powers(base, count)


def mix(values: np.ndarray) -> np.ndarray:
    """Spread the bits of 64-bit hashes (the finaliser of MurmurHash3); equal stays equal, different stays different."""
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xFF51AFD7ED558CCD)
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


@dataclass(frozen=True, slots=True)
class Words:
    """The words of a text: `hashes` (n,) uint64, `starts` and `ends` (n,) byte positions, `data` the UTF-8 bytes."""

    hashes: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    data: np.ndarray

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def lengths(self) -> np.ndarray:
        """Bytes of each word."""
        return self.ends - self.starts

    def count(self, vocabulary: np.ndarray) -> np.ndarray:
        """How often each word of a small `vocabulary` (hashes, as `hash_words` gives them) occurs, (V,) int."""
        return np.count_nonzero(self.hashes[:, None] == vocabulary, axis=0)

    def tokens(self) -> tuple[int, int, int]:
        """What lies between white space, punctuation included: how many, how many with a letter, characters in all."""
        ink = np.concatenate(([False], self.data > 0x20, [False]))
        edges = np.flatnonzero(ink[1:] != ink[:-1])
        starts, ends = edges[::2], edges[1::2]
        classes = _CLASSES[self.data]
        letters = np.concatenate(([0], np.cumsum((classes == _LETTER) | (classes == _HIGH))))
        continuation = int(np.count_nonzero((self.data & 0xC0) == 0x80))  # bytes of a UTF-8 character after its first
        lettered = int(np.count_nonzero(letters[ends] > letters[starts]))
        return len(starts), lettered, int((ends - starts).sum()) - continuation


def words_of(text: str) -> Words:
    """Cut `text` into words and hash them."""
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    if not len(data):
        empty = np.zeros(0, dtype=np.int64)
        return Words(empty.astype(np.uint64), empty, empty, data)
    inside = _CLASSES[data] != _SEPARATOR
    alone = np.zeros(0, dtype=np.int64) if text.isascii() else _mark_scripts(data, inside)
    edge = np.ones(len(data) + 1, dtype=bool)  # edge[i]: a word starts or ends between byte i-1 and byte i
    np.not_equal(inside[1:], inside[:-1], out=edge[1:-1])
    edge[alone] = edge[alone + 3] = True
    positions = np.flatnonzero(edge)
    first = np.flatnonzero(inside[positions[:-1]])  # the last edge is the end of the text
    starts, ends = positions[first], positions[first + 1]
    return Words(_hash_spans(_TABLE[data], starts, ends), starts, ends, data)


def _mark_scripts(data: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Set `inside` to False for wide punctuation; return where the characters begin that are words by themselves."""
    leads = np.flatnonzero(data >= 0xE0)
    leads = leads[data[leads] < 0xF0]  # characters of three bytes
    lead, second, third = data[leads], data[leads + 1], data[leads + 2]
    fullwidth = (lead == 0xEF) & ((second == 0xBC) | (second == 0xBD)) & ~_fullwidth_letter(second, third)
    general = (lead == 0xE2) & (second == 0x80)
    ideographic = (lead == 0xE3) & (second == 0x80)
    punctuation = leads[fullwidth | general | ideographic]
    for offset in range(3):
        inside[punctuation + offset] = False
    east = (lead >= 0xE3) & (lead <= 0xE9) & ~ideographic
    south = ((lead == 0xE0) & (second >= 0xB8) & (second <= 0xBF)) | (
        (lead == 0xE1) & (((second >= 0x80) & (second <= 0x82)) | (second == 0x9E) | (second == 0x9F))
    )
    return leads[east | south]


def _fullwidth_letter(second: np.ndarray, third: np.ndarray) -> np.ndarray:
    low = (second == 0xBC) & (((third >= 0x90) & (third <= 0x99)) | ((third >= 0xA1) & (third <= 0xBA)))
    return low | ((second == 0xBD) & ((third >= 0x81) & (third <= 0x9A) | (third >= 0xA6)))


def _hash_spans(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The polynomial hashes of `values[start:end]` for each span."""
    sums = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(values * _grown(_FORWARD, _BASE, len(values))[: len(values)], out=sums[1:])
    inverse = _grown(_BACKWARD, pow(_BASE, -1, 1 << 64), len(values) + 1)
    return mix((sums[ends] - sums[starts]) * inverse[starts])


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """The hashes of all windows of `n` words, (len - n + 1,) uint64; empty if there are fewer words."""
    if len(hashes) < n:
        return hashes[:0]
    grams = hashes[: len(hashes) - n + 1].copy()
    for offset in range(1, n):
        grams *= np.uint64(_BASE)
        grams += hashes[offset : len(hashes) - n + 1 + offset]
    return mix(grams)


def shingles(hashes: np.ndarray, n: int) -> np.ndarray:
    """The set of a document's word n-grams, sorted; of a shorter document, the one gram that it is."""
    if not len(hashes):
        return hashes
    grams = np.sort(ngrams(hashes, min(n, len(hashes))))
    return grams[np.concatenate(([True], grams[1:] != grams[:-1]))]


def hash_words(vocabulary: Iterable[str]) -> np.ndarray:
    """The hashes of single words, to be looked for in `Words.hashes`."""
    return np.concatenate([words_of(word).hashes for word in vocabulary])
