"""Byte-pair merging of one long run of symbols, in time that grows as n log n.

    symbols   ▁   l   a   m   a        every neighbouring pair that may be joined waits in a queue,
              |___|   |___|            ordered by (rank, place): lowest rank first, then the leftmost
                  |___|   |___|

Joining a pair makes at most two new pairs, with the neighbours on either side. Pairs of which a half is gone by then stay
in the queue and are recognised when their turn comes: what stands at their place no longer has their rank. A linked list
of places (`before`, `after`) makes a join cost the same wherever it happens.

A waiting pair is one integer, `rank * n + place`: a million spaces wait in tens of megabytes.
"""

from array import array
from collections.abc import Callable
from heapq import heapify, heappop, heappush


def merge(symbols: list[str], rank_of: Callable[[str, str], int | None]) -> list[str]:
    """`symbols`, none of them empty, after all joins; `rank_of` two neighbours is None where they may not be joined."""
    n = len(symbols)
    before, after = array("q", range(-1, n - 1)), array("q", range(1, n + 1))
    queue = []
    for place in range(n - 1):
        rank = rank_of(symbols[place], symbols[place + 1])
        if rank is not None:
            queue.append(rank * n + place)
    heapify(queue)
    while queue:
        rank, left = divmod(heappop(queue), n)
        right = after[left]
        # A symbol that was joined to its left neighbour is the empty string.
        if not symbols[left] or right == n or rank_of(symbols[left], symbols[right]) != rank:
            continue
        symbols[left] += symbols[right]
        symbols[right] = ""
        beyond = after[left] = after[right]
        if beyond < n:
            before[beyond] = left
            _offer(queue, rank_of(symbols[left], symbols[beyond]), left, n)
        if before[left] >= 0:
            _offer(queue, rank_of(symbols[before[left]], symbols[left]), before[left], n)
    return [symbol for symbol in symbols if symbol]


def _offer(queue: list[int], rank: int | None, place: int, n: int) -> None:
    if rank is not None:
        heappush(queue, rank * n + place)
