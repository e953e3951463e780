"""Who reads what next.

    waiting  --admit-->  running  --done-->  gone
       ^--------preempt-----'

Requests are ranked by priority, then by arrival. In a step every running sequence that decodes reads its last token;
what `step_tokens` leaves is shared by prompts, which are read in pieces, so that a long one stalls nobody's answer:

    half    goes to the prompt that is first in rank, so that each comes to its end
    half    goes to the shortest ones of the highest priority, so that a question does not wait for a book

(While nobody watches an answer grow a step reads more.)

A sequence is admitted when the cache has room for its prompt and a little growth. No room is kept for the longest
answer that it may come to: when blocks run out the lowest-ranked running sequence is *preempted*. It gives its blocks
up, waits again, and later reads its prompt and what was drawn anew, as far as the cache has forgotten it. The highest
rank is never preempted, and the engine accepts nothing that the whole cache could not hold, so all come to their end.

Requests with one prompt that are admitted together read it once: the others *follow* the first, and share its blocks
when it is through. Who begins with the same long text as one before him waits until that is read, and goes on from there.
"""

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from puna.errors import BusyError
from puna.inference.blocks import BlockCache
from puna.inference.sequence import Sequence
from puna.inference.spans import Span

UNWATCHED = 8  # times as many tokens are read in a step while nobody watches
PIECE = 64  # tokens of a prompt at a time whose log-probabilities are wanted: that many rows of logits


@dataclass
class Reading:
    """What a sequence reads in this step; `ahead` is how many guessed tokens it has room for after its last one."""

    sequence: Sequence
    span: Span
    ahead: int = 0


class Scheduler:
    """The queue and those that run. `submit` and `busy` are for any thread, the rest for the one who steps."""

    def __init__(self, cache: BlockCache, *, slots: int, step_tokens: int, queue: int | None = None):
        self.cache = cache
        self.slots, self.step_tokens, self.queue = slots, step_tokens, queue
        self.running: list[Sequence] = []  # by rank
        self.preemptions = 0
        self._inbox: deque[Sequence] = deque()
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []  # a heap
        self._arrivals = 0

    @property
    def waiting(self) -> int:
        """Requests that have not started, or were preempted."""
        return len(self._inbox) + len(self._waiting)

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Queue requests, all or none. Raises `BusyError`."""
        sequences = list(sequences)
        if self.queue is not None and self.waiting + len(sequences) > self.queue + self.slots - len(self.running):
            raise BusyError(f"{self.waiting} requests are waiting, at most {self.queue} may", hint="try again later")
        for sequence in sequences:
            self._arrivals += 1
            sequence.arrival = self._arrivals
            self._inbox.append(sequence)

    def plan(self, ahead: int = 0) -> list[Reading]:
        """What is read in the next step; up to `ahead` guessed tokens are given room after those that decode."""
        self._take_in()
        plan: dict[Sequence, Reading] = {}
        for sequence in [s for s in self.running if s.unread == 1 and not s.follows]:
            self._decode(sequence, ahead, plan)
        self._admit_all(plan)
        self._read_prompts(plan)
        return [plan[s] for s in self.running if s in plan]

    def read(self, reading: Reading) -> None:
        """What the span said is in the cache now."""
        reading.sequence.cached = reading.span.start + len(reading.span.tokens)

    def followers(self, leader: Sequence) -> list[Sequence]:
        """Those whose prompt `leader` has just read to its end; they have its blocks now."""
        found = [s for s in self.running if s.follows is leader]
        for sequence in found:
            sequence.follows = None
            sequence.found = leader.found
            self.cache.share(leader, sequence)
        return found

    def retire(self) -> None:
        """Let go of the sequences that are done; their blocks are free at once."""
        for sequence in [s for s in self.running if s.done]:
            self._release(sequence)
        if any(s.done for _, s in self._waiting):
            self._waiting = [place for place in self._waiting if not place[1].done]
            heapq.heapify(self._waiting)
        for _ in range(len(self._inbox)):
            sequence = self._inbox.popleft()
            if not sequence.done:
                self._inbox.append(sequence)

    def fail(self, error: BaseException) -> None:
        """Nothing that was under way can go on: the cache may be half written."""
        for sequence in (*self.running, *self._inbox, *(s for _, s in self._waiting)):
            sequence.error = error
        for sequence in self.running:
            sequence.published = len(sequence.blocks)  # nothing of it shall be found
        self.retire()
        self.cache.forget()

    def _take_in(self) -> None:
        while self._inbox:
            sequence = self._inbox.popleft()
            heapq.heappush(self._waiting, (sequence.rank, sequence))
        for sequence in self.running:
            leader = sequence.follows
            if leader and (leader.done or leader not in self.running or leader.count):
                sequence.follows = None

    def _decode(self, sequence: Sequence, ahead: int, plan: dict[Sequence, Reading]) -> None:
        if sequence not in self.running:  # preempted by one before it
            return
        ahead = min(ahead, sequence.limit - sequence.count - 1)
        if ahead > 0 and not self.cache.cover(sequence, sequence.cached + 1 + ahead):
            ahead = 0
        if self._make_room(sequence, sequence.cached + 1, plan):
            plan[sequence] = self._reading(sequence, 1, ahead=max(ahead, 0))

    def _read_prompts(self, plan: dict[Sequence, Reading]) -> None:
        """Share what the step has left: half to the first in rank, half to the shortest."""
        readers = [s for s in self.running if s not in plan and not s.follows and self._can_read(s)]
        if not readers:
            return
        watched = any(s.watched for s in self.running)
        budget = max(self.step_tokens * (1 if watched else UNWATCHED) - len(plan), 1)
        first, kept = readers[0], min(readers[0].unread, -(-budget // 2))
        for sequence in sorted(readers, key=lambda s: (-s.request.priority, s.unread, s.arrival)):
            kept = 0 if sequence is first else kept
            budget -= self._prefill(sequence, budget - kept, plan)

    def _can_read(self, sequence: Sequence) -> bool:
        """Whether it goes on reading now. Who has read nothing yet begins with what others left in the cache."""
        if sequence.cached or sequence.alone:
            return True
        if self._one_ahead(sequence):
            return False
        self.cache.adopt(sequence)
        if not sequence.count:
            sequence.found = sequence.cached
        return True

    def _one_ahead(self, sequence: Sequence) -> bool:
        """Whether one before it in rank is reading what it begins with too, and more of that than a step reads is left."""
        for other in self.running[: self.running.index(sequence)]:
            end = self.cache.needed(other.cached + self.step_tokens) * self.cache.block_tokens
            same = other.root == sequence.root and other.unread > 1 and not other.follows and end < len(sequence.tokens)
            if same and other.tokens[:end] == sequence.tokens[:end]:
                return True
        return False

    def _prefill(self, sequence: Sequence, budget: int, plan: dict[Sequence, Reading]) -> int:
        """Plan a piece of a prompt; how many tokens it has."""
        count = min(sequence.unread, budget, PIECE if sequence.alone else budget)
        if sequence not in self.running or count < 1 or not self._make_room(sequence, sequence.cached + count, plan):
            return 0
        plan[sequence] = self._reading(sequence, count)
        return count

    def _reading(self, sequence: Sequence, count: int, ahead: int = 0) -> Reading:
        start = sequence.cached
        wanted = int(count == sequence.unread)
        if sequence.alone and start < sequence.prompt_length:
            wanted = count
        tokens = sequence.tokens[start : start + count]
        span = Span(tokens, start, sequence.blocks, wanted, sequence.adapter, sequence.screened)
        return Reading(sequence, span, ahead)

    def _make_room(self, sequence: Sequence, end: int, plan: dict[Sequence, Reading]) -> bool:
        """Blocks for the positions up to `end`, at the cost of lower ranks; False if it had to yield itself."""
        while not self.cache.cover(sequence, end):
            victim = next(s for s in reversed(self.running) if s.blocks or s is sequence)
            plan.pop(victim, None)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.preemptions += 1
        self._release(victim)
        victim.follows = None
        heapq.heappush(self._waiting, (victim.rank, victim))

    def _release(self, sequence: Sequence) -> None:
        self.cache.publish(sequence)
        self.cache.drop(sequence)
        self.running.remove(sequence)

    def _admit_all(self, plan: dict[Sequence, Reading]) -> None:
        """Let those that wait run, in order of rank, as long as there is room."""
        before = self.preemptions
        while self.preemptions == before and self._admit(plan):
            pass

    def _admit(self, plan: dict[Sequence, Reading]) -> bool:
        """Whether the first of those that wait runs now; one of a lower priority may have to make room for it."""
        while self._waiting and self._waiting[0][1].done:
            heapq.heappop(self._waiting)
        if not self._waiting:
            return False
        candidate = self._waiting[0][1]
        lowest = self.running[-1] if self.running else None
        if not self._room_for(candidate):
            if lowest is not None and lowest.request.priority < candidate.request.priority:
                plan.pop(lowest, None)
                self._preempt(lowest)  # the next step admits the candidate, or takes one more from below it
            return False
        heapq.heappop(self._waiting)
        candidate.follows = self._leader(candidate)
        self.running.append(candidate)
        self.running.sort(key=lambda s: s.rank)
        return True

    def _room_for(self, candidate: Sequence) -> bool:
        if len(self.running) >= self.slots:
            return False
        promised = sum(self.cache.needed(len(s.tokens) + 1) - len(s.blocks) for s in self.running if not s.follows)
        growth = min(len(self.running), self.cache.blocks // 8)
        return self.cache.needed(len(candidate.tokens)) + promised + growth <= self.cache.free or not self.running

    def _leader(self, candidate: Sequence) -> Sequence | None:
        """One that is reading the candidate's prompt right now."""
        if candidate.alone or candidate.count:
            return None
        for other in reversed(self.running):
            same = other.root == candidate.root and other.tokens == candidate.tokens
            same = same and other.screened == candidate.screened  # they will draw from the same logits
            if same and not other.count and not other.alone and not other.follows:
                return other
        return None
