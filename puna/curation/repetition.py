"""How much of a document repeats itself (Gopher, Rae et al. 2021, table A1), from the array of word hashes.

    duplicate lines, paragraphs     share of them, and share of the characters in them, that occurred before
    top n-gram, n = 2, 3, 4         share of the words' bytes that the most frequent n-gram covers
    duplicate n-grams, n = 5..10    share of the words' bytes inside n-grams that occurred before, each counted once

An n-gram that occurs twice contains an (n-1)-gram that does: when no 5-gram repeats, which is the usual case, the rest
needs no work. Where a character counts as a word, n is three times as long.
"""

from collections.abc import Iterator

import numpy as np

from puna.curation.words import Words, ngrams

TOP = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
LINES, LINE_CHARACTERS = 0.30, 0.20  # the same limits hold for paragraphs


def excess(text: str, words: Words, *, stretch: int = 1) -> str:
    """The first of Gopher's limits that the document breaks, with the value; "" if none."""
    for name, value, limit in _measures(text, words, stretch):
        if value > limit:
            return f"{name}: {value:.2f} > {limit:.2f}"
    return ""


def _measures(text: str, words: Words, stretch: int) -> Iterator[tuple[str, float, float]]:
    for unit, separator in (("lines", "\n"), ("paragraphs", "\n\n")):
        parts = [p for p in (p.strip() for p in text.split(separator)) if p]
        count, characters = duplicate_shares(parts)
        yield f"duplicate {unit}", count, LINES
        yield f"characters in duplicate {unit}", characters, LINE_CHARACTERS
    total = max(int(words.lengths.sum()), 1)
    for n, limit in TOP.items():
        yield f"top {n}-gram", top_ngram_bytes(words, n * stretch) / total, limit
    for n, limit in DUPLICATE.items():
        covered = duplicate_coverage(words, n * stretch)
        yield f"duplicate {n}-grams", covered / total, limit
        if covered == 0:
            return


def duplicate_shares(parts: list[str]) -> tuple[float, float]:
    """The share of `parts` that occurred before, and the share of their characters."""
    seen: set[str] = set()
    repeated = characters = 0
    for part in parts:
        if part in seen:
            repeated += 1
            characters += len(part)
        seen.add(part)
    return repeated / max(len(parts), 1), characters / max(sum(map(len, parts)), 1)


def top_ngram_bytes(words: Words, n: int) -> int:
    """Bytes covered by the most frequent n-gram: its count times the bytes of its words; 0 if none occurs twice."""
    grams = ngrams(words.hashes, n)
    if len(grams) < 2:
        return 0
    ordered = np.sort(grams)
    edges = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1], [True])))
    counts = np.diff(edges)
    best = int(counts.argmax())
    if counts[best] < 2:
        return 0
    first = int(np.flatnonzero(grams == ordered[edges[best]])[0])
    return int(counts[best]) * int(words.lengths[first : first + n].sum())


def duplicate_coverage(words: Words, n: int) -> int:
    """Bytes of the words that lie in an n-gram which occurred earlier in the document, each word once."""
    grams = ngrams(words.hashes, n)
    order = np.argsort(grams, kind="stable")
    ordered = grams[order]
    later = order[1:][ordered[1:] == ordered[:-1]]  # stable: the first of equals stays out
    if not len(later):
        return 0
    depth = np.zeros(len(words) + 1, dtype=np.int64)
    np.add.at(depth, later, 1)
    np.add.at(depth, later + n, -1)
    return int(words.lengths[np.cumsum(depth[:-1]) > 0].sum())
