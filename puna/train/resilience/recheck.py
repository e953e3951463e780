"""Wrong numbers before the sum of gradients: every few steps a step is computed twice, and each rank's share compared.

What a rank brings to the sum (puna/parallel/brought.py) is a function of weights and samples alone, so the second time
it is the same, bit for bit. Where it is not, that rank is wrong, and it is named: after the sum all have the wrong
number alike, and no comparison of replicas can tell. The step is computed until two results in a row agree.

A rank that is wrong now may have been wrong before. So the run goes back to the last state that such a check vouches for
(`sound`), and until it is where it was, every step is computed twice. A rank on which no two results agree is not to be
trusted with anything: it ends, with a mark against its node that keeps a run with spare nodes away from it.

A wrong number in a step that is not checked, and never again, is not found: to find any, check every step, at twice the
price. A machine that is wrong in the same way each time is not found either. Arithmetic must be deterministic.
"""

import time

from puna.parallel.brought import Brought
from puna.planner.policies import Verdict
from puna.train.resilience.peers import Peers
from puna.train.resilience.telling import Telling


class Unreliable(RuntimeError):
    """This rank computes something else each time."""


class Recheck:
    """One rank's view. All ranks call `judge` together and come to the same verdict."""

    def __init__(self, peers: Peers, tell: Telling, brought: Brought | None, *, every: int, most: int):
        self.peers, self.tell, self.brought, self.every, self.most = peers, tell, brought, every, most
        self.sound = 0  # steps of the newest state that a check vouches for
        self.suspect_until = -1  # up to this step every step is checked
        self.seconds = 0.0  # spent on computing again, since somebody took it from here
        self.unreliable: list[int] = []  # ranks to do without
        self._step, self._results, self._began = -1, [], 0.0

    def due(self, step: int) -> bool:
        """Is step `step` computed twice?"""
        watched = self.brought is not None and self.every > 0
        return watched and ((step + 1) % self.every == 0 or step <= self.suspect_until)

    def begin(self, step: int) -> None:
        """The gradients of `step` are going to be computed."""
        if self.brought is not None:
            self.brought.watched = self.due(step)

    def judge(self, step: int) -> Verdict | None:
        """None if this step's gradients are right, or nobody asked."""
        if not self.due(step):
            return None
        if step != self._step:
            self._step, self._results = step, []
        self._results.append(self.brought.digest)
        if len(self._results) == 1:
            self._began = time.perf_counter()
            return Verdict(action="again", why="checked")
        said = self.peers.gather(self._results)
        differ = [rank for rank, results in enumerate(said) if results[-1] != results[-2]]
        if differ and len(self._results) < 2 + self.most:
            return Verdict(action="again", why="checked")
        self.seconds += time.perf_counter() - self._began
        wrong = [rank for rank, results in enumerate(said) if len(set(results)) > 1]
        self._results = []
        if not wrong:
            self.sound = step + 1
            return None
        return self._found(step, wrong, differ)

    def _found(self, step: int, wrong: list[int], differ: list[int]) -> Verdict | None:
        why = f"gradients of step {step} came out differently on rank {', '.join(map(str, wrong))}"
        self.tell.say(why)
        self.tell.ledger("fault", kind="corruption", rank=wrong[0], step=step, why=why)
        if len(wrong) == 1:  # of several, one infected the others, and its node cannot be told from theirs
            self.tell.accuse(wrong, step, "its own gradients came out differently")
        self.unreliable = differ
        if not differ and self.sound >= step:  # all steps before this one were checked, and now two results agree
            self.sound = step + 1
            return None
        self.suspect_until = max(self.suspect_until, step)
        return Verdict(action="roll_back", to=self.sound, pass_over=False, why=why)
