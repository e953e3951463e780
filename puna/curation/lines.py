"""Lines that everybody repeats: navigation, notices, boilerplate headers (Llama 3, section 3.1.1, after ccNet).

Lines are hashed (stripped, lower case) and counted over a bucket of documents of one language; a line that occurs more
than six times in it is taken out everywhere. The paper's buckets hold 30 million documents; a smaller corpus is one
bucket. Memory is eight bytes a line.

In code a line like `import os` is no boilerplate: there, only comments of five words or more are looked at, which takes
out licence headers. In prose, lines of one or two words (headings, code fences, verse) are left alone.
"""

from collections import defaultdict

import numpy as np
import xxhash

MAX_OCCURRENCES = 6
BUCKET_DOCUMENTS = 30_000_000
COMMENT = ("#", "//", "*", "/*", "--", "%", ";")
MIN_WORDS, MIN_COMMENT_WORDS = 3, 5

_BLANK_RUN = "\n\n\n"


def _key(line: str, code: bool) -> int:
    """The hash that a line is counted under; 0 for a line that is left alone."""
    line = line.strip().lower()
    if code and not line.startswith(COMMENT):
        return 0
    if len(line.split(None, MIN_COMMENT_WORDS)) < (MIN_COMMENT_WORDS if code else MIN_WORDS):
        return 0
    return xxhash.xxh3_64_intdigest(line.encode()) or 1


class LineCounts:
    """Counts lines per language and bucket, then takes out the frequent ones."""

    def __init__(self) -> None:
        self._hashes: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)
        self._frequent: dict[tuple[str, int], set[int]] | None = None

    def add(self, index: int, text: str, lang: str, *, code: bool) -> None:
        """Count the lines of the document at position `index`."""
        keys = np.array([_key(line, code) for line in text.split("\n")], dtype=np.uint64)
        self._hashes[lang, index // BUCKET_DOCUMENTS].append(keys[keys > 0])

    def without_frequent(self, index: int, text: str, lang: str, *, code: bool) -> tuple[str, int]:
        """`text` without the frequent lines of its bucket, and how many were taken out."""
        if self._frequent is None:
            self._frequent = {bucket: _frequent(arrays) for bucket, arrays in self._hashes.items()}
            self._hashes.clear()
        frequent = self._frequent.get((lang, index // BUCKET_DOCUMENTS), set())
        lines = text.split("\n")
        kept = [line for line in lines if _key(line, code) not in frequent]
        if len(kept) == len(lines):
            return text, 0
        shorter = "\n".join(kept)
        while _BLANK_RUN in shorter:
            shorter = shorter.replace(_BLANK_RUN, "\n\n")
        return shorter.strip("\n"), len(lines) - len(kept)


def _frequent(arrays: list[np.ndarray]) -> set[int]:
    ordered = np.sort(np.concatenate(arrays))
    if not len(ordered):
        return set()
    edges = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1], [True])))
    return set(ordered[edges[:-1][np.diff(edges) > MAX_OCCURRENCES]].tolist())
