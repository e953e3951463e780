"""In which order a pipeline's ranks run forward and backward: 1F1B and interleaved, with Llama 3's tunable N.

A pipeline of P ranks with V stages on each (stage s lies on rank s % P) takes M micro-batches. Each rank runs forward
passes first, to fill the pipeline, and from then on a backward pass whenever one can run, which frees the activations of
its forward pass. A rank holds the activations of at most

    V = 1    N - r                              forward passes, but at least one
    V > 1    2 (P - r - 1) + (V - 1) N + 1

With interleaving, a stage takes N micro-batches in a row before the rank turns to its next stage. N = P is the usual
schedule (depth first), N = M runs all micro-batches through a stage before the next one (breadth first). Llama 3 leaves N
free (arXiv 2407.21783, 3.3.2): N below P lets a batch have fewer micro-batches than the pipeline has ranks, N above P
hides the time that activations travel, and both trade memory for speed.

The order is found by playing it through in steps of one pass per rank. Whatever is played can also be run: no pass waits
for one that is ordered after it. Pure: the planner times the same order that the trainer runs.
"""

from typing import NamedTuple

from puna.config import require
from puna.parallel.layout import Layout


class Pass(NamedTuple):
    """One micro-batch through one stage: `kind` F(orward) or B(ackward)."""

    kind: str
    stage: int
    microbatch: int


def schedule(layout: Layout, microbatches: int) -> list[list[Pass]]:
    """The passes of each pipeline rank, in order."""
    require(microbatches >= 1, f"microbatches={microbatches} must be at least 1")
    players = [_Rank(layout, rank, microbatches) for rank in range(layout.pipeline)]
    done: set[Pass] = set()
    while any(player.left for player in players):
        moves = [player.choose(done) for player in players]
        assert any(moves), f"a schedule that waits for itself: {layout}, {microbatches} micro-batches"
        for player, move in zip(players, moves, strict=True):
            if move:
                player.play(move)
                done.add(move)
    return [player.played for player in players]


class _Rank:
    """One rank while the order is played through."""

    def __init__(self, layout: Layout, rank: int, microbatches: int):
        in_a_row = layout.in_flight or layout.pipeline
        stages = layout.stages_of(rank)
        groups = [range(m, min(m + in_a_row, microbatches)) for m in range(0, microbatches, in_a_row)]
        self.forwards = [Pass("F", s, m) for group in groups for s in stages for m in group]
        self.backwards = [Pass("B", s, m) for group in groups for s in reversed(stages) for m in group]
        self.last_stage = layout.stages - 1
        self.played: list[Pass] = []
        self.ran = {"F": 0, "B": 0}
        if layout.stages_per_rank == 1:
            self.most = max(1, in_a_row - rank)
        else:
            self.most = 2 * (layout.pipeline - rank - 1) + (layout.stages_per_rank - 1) * in_a_row + 1

    @property
    def left(self) -> bool:
        return self.ran["B"] < len(self.backwards)

    def choose(self, done: set[Pass]) -> Pass | None:
        """A backward pass if one can run, else a forward pass if there is room for its activations, else nothing."""
        backward = self.backwards[self.ran["B"]] if self.left else None
        if backward and self._ready(backward, done):
            return backward
        held = self.ran["F"] - self.ran["B"]
        forward = self.forwards[self.ran["F"]] if self.ran["F"] < len(self.forwards) and held < self.most else None
        return forward if forward and self._ready(forward, done) else None

    def play(self, move: Pass) -> None:
        self.played.append(move)
        self.ran[move.kind] += 1

    def _ready(self, move: Pass, done: set[Pass]) -> bool:
        kind, stage, m = move
        if kind == "F":
            return stage == 0 or Pass("F", stage - 1, m) in done
        return move._replace(kind="F") in done and (stage == self.last_stage or Pass("B", stage + 1, m) in done)
