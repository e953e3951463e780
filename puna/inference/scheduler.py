"""Who runs next. Requests wait in order of arrival; those that run occupy slots 0 ... n-1 of the cache.

A step is either a *prefill*, which reads the prompts of some that waited, or a *decode*, which draws one token for all
that run. Prefill comes first whenever there is room: a full batch decodes at nearly the cost of a small one, since
either has to read all the weights.

Room is counted in cache positions: (running sequences) x (tokens that the longest may reach), known from each request's
max_tokens, so that an admitted request can always be finished. One alone is admitted whatever its length.
"""

from collections import deque

from puna.inference.cache import KVCache
from puna.inference.sequence import Sequence

PREFILL_TOKENS = 8192  # in one prefill, padding included
_MOST_PADDING = 0.25  # the share of a prefill's tokens that may be padding


class Scheduler:
    """The queue and the slots. `waiting` may be appended to from any thread, the rest belongs to the one who steps."""

    def __init__(self, slots: int, cache_tokens: int):
        self.slots = slots
        self.cache_tokens = cache_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def admit(self) -> list[Sequence]:
        """The next sequences to prefill, of similar length; they have become running. Empty if it is time to decode."""
        if len(self.waiting) > 1 and self.running and self.slots - len(self.running) < self.slots // 8:
            return []  # a few free slots can wait for more: a prefill of one costs a step of all
        admitted: list[Sequence] = []
        while self.waiting and len(self.running) + len(admitted) < self.slots:
            candidate = self.waiting[0]
            if not candidate.done:
                if not (self._fits(admitted, candidate) and _similar(admitted, candidate)):
                    break
                admitted.append(candidate)
            self.waiting.popleft()
        self.running += admitted
        return admitted

    def retire(self, cache: KVCache) -> None:
        """Take out the sequences that are done, and close the gaps in the slots."""
        slot = 0
        while slot < len(self.running):
            if not self.running[slot].done:
                slot += 1
                continue
            last = self.running.pop()
            if slot < len(self.running):
                self.running[slot] = last
                if not last.done:
                    cache.move(len(self.running), slot, last.length)

    def _fits(self, admitted: list[Sequence], candidate: Sequence) -> bool:
        others = self.running + admitted
        longest = max((s.longest for s in others), default=0)
        return not others or (len(others) + 1) * max(longest, candidate.longest) <= self.cache_tokens


def _similar(admitted: list[Sequence], candidate: Sequence) -> bool:
    lengths = [len(s.prompt) for s in (*admitted, candidate)]
    padded = len(lengths) * max(lengths)
    return len(lengths) == 1 or (padded <= PREFILL_TOKENS and sum(lengths) >= (1 - _MOST_PADDING) * padded)
