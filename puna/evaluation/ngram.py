"""An n-gram model with interpolated modified Kneser-Ney smoothing: what counting alone can do with the training text.

Chen and Goodman 1998, in the form that KenLM made the standard (Heafield et al. 2013). With `h` the last k-1 symbols
and `h'` the same without the oldest:

    p_k(w | h) = max(0, a(hw) - D(a(hw))) / a(h·)  +  γ(h) · p_{k-1}(w | h')           p_0 = 1 / vocabulary
    γ(h)       = (D1·N1(h·) + D2·N2(h·) + D3·N3+(h·)) / a(h·)

`a` is the count for the highest order (and for grams that begin with the start symbol, which nothing can precede), and
for lower orders the number of different symbols seen before the gram. D1, D2, D3 are the discounts of counts 1, 2 and
3 or more, estimated from the counts of counts. An unseen `h` passes on to `h'` with γ = 1. So each p_k sums to one
exactly, over the whole vocabulary, whatever the history: the bits it charges are bits a decoder could read.

Layout: the grams of each order are numbered 0…, in a sorted array of 64-bit keys

    key(order k) = number of the gram's first k-1 symbols (order k-1) × base + last symbol

a trie in arrays: counting is one sort per order, a query one binary search per order, both for all positions at once.
Memory is about 40 bytes per distinct gram, plus about 60 bytes per position of the training text while counting.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_FALLBACK_DISCOUNTS = np.array([0.0, 0.5, 1.0, 1.5])  # for texts too small to estimate them, as in KenLM


@dataclass(frozen=True)
class _Order:
    """The grams of one order: sorted keys, and per gram its discounted numerator; per context its total and γ."""

    keys: np.ndarray  # int64, sorted
    discounted: np.ndarray  # a(hw) - D(a(hw))
    totals: np.ndarray  # per gram of the order below: a(h·), 0 where nothing ever followed
    gammas: np.ndarray  # per gram of the order below: γ(h)


@dataclass(frozen=True)
class NGramModel:
    """A smoothed model over symbols `0 … vocabulary-1`; symbol `vocabulary` starts a document and is never predicted."""

    vocabulary: int
    orders: tuple[_Order, ...]

    def log2(self, symbols: np.ndarray, *, started: bool = True) -> np.ndarray:
        """log2 p of each symbol given those before it (and the start symbol, if the sequence began a document).

        `symbols` (T,) integers; returns (T,) float64.
        """
        start = [self.vocabulary] if started else []
        sequence = np.concatenate([start, np.asarray(symbols)]).astype(np.int64)
        return self._log2(sequence)[len(start) :]

    def _log2(self, sequence: np.ndarray) -> np.ndarray:
        base = self.vocabulary + 1
        probability = np.full(len(sequence), 1 / self.vocabulary)
        ending = np.zeros(len(sequence), np.int64)  # number of the (k-1)-gram that ends here, -1 if never seen
        for order in self.orders:
            context = np.concatenate([[-1], ending[:-1]]) if order is not self.orders[0] else ending
            known = context >= 0
            gram = _find(order.keys, np.where(known, context * base + sequence, -1))
            total = np.where(known, order.totals[context], 0)
            seen = total > 0
            safe = np.where(seen, total, 1)
            here = np.where(gram >= 0, order.discounted[gram], 0) / safe
            probability = np.where(seen, here + order.gammas[context] * probability, probability)
            ending = gram
        return np.log2(probability)

    @property
    def grams(self) -> list[int]:
        """How many different grams of each order were seen."""
        return [len(order.keys) for order in self.orders]


@dataclass(frozen=True)
class _Level:
    """The distinct grams of one order: their keys, counts, different left neighbours, and which begin a document."""

    keys: np.ndarray
    counts: np.ndarray
    neighbours: np.ndarray
    begins: np.ndarray


@dataclass(frozen=True)
class NGramCounts:
    """The counted text, from which a model of any order up to the counted one is made."""

    vocabulary: int
    levels: tuple[_Level, ...]

    def model(self, order: int) -> NGramModel:
        """The smoothed model of n-grams up to `order`."""
        orders, contexts = [], 1
        for k, level in enumerate(self.levels[:order], start=1):
            counts = level.counts if k == order else np.where(level.begins, level.counts, level.neighbours)
            orders.append(_smooth(level.keys, counts, contexts, self.vocabulary + 1))
            contexts = len(level.keys)
        return NGramModel(self.vocabulary, tuple(orders))


def count(documents: Iterable[Sequence[int] | np.ndarray], vocabulary: int, order: int) -> NGramCounts:
    """Count the n-grams of `documents` (each a sequence of symbols below `vocabulary`) up to length `order`."""
    stream, offsets = _concatenate(documents, vocabulary)
    base = vocabulary + 1
    levels: list[_Level] = []
    ending = np.zeros(len(stream), np.int32)  # number of the (k-1)-gram that ends at each position
    for k in range(1, order + 1):
        valid = np.flatnonzero(offsets >= k - 1)  # the k-gram that ends here begins in the same document
        if not len(valid):
            break
        before = ending[valid - 1].astype(np.int64) * base if k > 1 else 0
        keys, an_end, number, counts = _number(before + stream[valid])
        if levels:
            # Each distinct k-gram is one more left neighbour of its last k-1 symbols.
            shorter = ending[valid[an_end]]
            levels[-1].neighbours[:] = np.bincount(shorter, minlength=len(levels[-1].keys))
        begins = offsets[valid[an_end]] == k - 1  # … with the start symbol
        levels.append(_Level(keys, counts.astype(np.int32), np.zeros(len(keys), np.int32), begins))
        ending = np.full(len(stream), -1, np.int32)
        ending[valid] = number
    return NGramCounts(vocabulary, tuple(levels))


def _concatenate(documents: Iterable[Sequence[int] | np.ndarray], vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """All documents in one stream, each after a start symbol; and each position's offset within its document."""
    parts = [np.asarray(d, np.int64) for d in documents]
    lengths = np.array([len(p) + 1 for p in parts], np.int64)
    start = np.array([vocabulary], np.int64)
    stream = np.concatenate([start[:0], *(x for p in parts for x in (start, p))])
    begins = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return stream, (np.arange(len(stream)) - begins).astype(np.int32)


def _number(key: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distinct keys in order; an occurrence of each; the number of each occurrence's key; the counts. Consumes `key`."""
    positions = len(key)
    if int(key.max()) < (1 << 63) // positions - 1:
        # Key and position as one number: sorting it in place is twice as fast as argsort, and needs no second array.
        key *= positions
        key += np.arange(positions)
        key.sort()
        ordered = key // positions
        by_key = np.subtract(key, ordered * positions, out=key)
    else:
        by_key = np.argsort(key)
        ordered = key[by_key]
    new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    starts = np.flatnonzero(new)
    number = np.empty(positions, np.int32)
    number[by_key] = np.cumsum(new, dtype=np.int32) - 1
    return ordered[starts], by_key[starts], number, np.diff(np.append(starts, positions))


def _smooth(keys: np.ndarray, counts: np.ndarray, contexts: int, base: int) -> _Order:
    context, symbol = np.divmod(keys, base)
    counts = np.where(symbol == base - 1, 0, counts)  # the start symbol is context only
    discount = _discounts(counts)[np.minimum(counts, 3)]
    totals = np.bincount(context, counts, contexts)
    # Σ over the context's grams of their discounts is D1·N1 + D2·N2 + D3·N3+.
    held_back = np.bincount(context, discount, contexts)
    gammas = np.divide(held_back, totals, out=np.ones(contexts), where=totals > 0)
    return _Order(keys, counts - discount, totals, gammas)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """D for counts 0, 1, 2 and 3 or more (Chen and Goodman's closed form)."""
    n1, n2, n3, n4 = (np.count_nonzero(counts == c) for c in (1, 2, 3, 4))
    if 0 in (n1, n2, n3, n4):
        return _FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    d = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return d if np.all((d >= 0) & (d <= np.arange(4))) else _FALLBACK_DISCOUNTS


def _find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The position of each wanted key among the sorted `keys`, -1 where it is not there."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, at, -1)
