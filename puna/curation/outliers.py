"""Documents whose words are distributed like nobody else's (Llama 3, section 3.1.1: Kullback-Leibler divergence).

Of each document the divergence from its language's corpus is taken over hashed words,

    D = sum_w p(w) log(p(w) / q(w)),    p: the document,  q: all documents of the language, smoothed

Short documents diverge more by chance alone, so D is compared among documents of similar length: within each doubling
of the number of words, the deviation from the median in units of the median absolute deviation. The paper gives no
threshold; ours is far out, and a language (or length) with few documents is left alone.
"""

from collections import defaultdict

import numpy as np

from puna.curation.words import Words

CELLS = 1 << 16
MIN_DOCUMENTS = 100
MAD_TO_SIGMA = 1.4826


class WordDistributions:
    """The word distribution of each language, and each document's divergence from it."""

    def __init__(self) -> None:
        self._counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(CELLS))
        self._logs: dict[str, np.ndarray] = {}
        self._divergences: dict[tuple[str, int], list[tuple[int, float]]] = defaultdict(list)

    def add(self, words: Words, lang: str) -> None:
        """Count a document's words."""
        self._counts[lang] += np.bincount(_cells(words), minlength=CELLS)

    def measure(self, index: int, words: Words, lang: str) -> None:
        """Take the divergence of the document at position `index`, after all were counted."""
        if lang not in self._logs:
            smoothed = self._counts[lang] + 0.5
            self._logs[lang] = np.log(smoothed / smoothed.sum())
        cells, counts = np.unique(_cells(words), return_counts=True)
        p = counts / max(counts.sum(), 1)
        divergence = float((p * (np.log(p) - self._logs[lang][cells])).sum())
        self._divergences[lang, len(words).bit_length()].append((index, divergence))

    def outliers(self, max_deviations: float) -> dict[int, float]:
        """The documents above `max_deviations`, position -> deviations."""
        found = {}
        for measured in self._divergences.values():
            if len(measured) < MIN_DOCUMENTS:
                continue
            values = np.array([value for _, value in measured])
            median = np.median(values)
            spread = MAD_TO_SIGMA * np.median(np.abs(values - median))
            if spread > 0:
                deviations = (values - median) / spread
                found |= {measured[i][0]: float(deviations[i]) for i in np.flatnonzero(deviations > max_deviations)}
        return found


def _cells(words: Words) -> np.ndarray:
    return (words.hashes >> np.uint64(48)).astype(np.int64)
