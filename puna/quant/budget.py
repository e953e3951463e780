"""Mixed precision: which form each matrix gets, so that the whole fits a budget and loses the least.

Each matrix has options, a size and a predicted damage (`sensitivity.py`). Only those on the lower edge of the cloud are
worth having: from one to the next the damage falls more slowly with each byte. Starting from the smallest option of
every matrix, the upgrade with the most damage saved per byte is taken, again and again, until none fits. That is the
optimum of the relaxed knapsack, and off by at most the one step that did not fit. That step may be a large one, such as
the embedding's, so each option of each matrix is also tried as a fixed one with the rest chosen around it, and the best
of all these is taken.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from puna.errors import ConfigError
from puna.quant.forms import Form

# What a matrix may become. Offsets cost as much as scales: with them groups of twice the size compete.
CHOICES = (
    Form(4, 128),
    Form(4, 64),
    Form(4, 64, True),
    Form(4, 32),
    Form(4, 32, True),
    Form(6, 64),
    Form(8, 128),
    Form(8, 32),
    Form(16),
)


@dataclass(frozen=True)
class Option:
    """A form of one matrix: what it takes and what it loses, in nats per token."""

    form: Form
    bytes: int
    damage: float


@dataclass(frozen=True)
class Choice:
    """What a matrix got. `gain` is the damage that its last upgrade saved per megabyte, 0 if it had none; `next_gain`
    what the next one would have saved, 0 if there is none."""

    option: Option
    gain: float
    next_gain: float


def choose(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Choice]:
    """One option for each matrix, `budget` bytes in all at most, the sum of damages as small as it gets.

    Raises `ConfigError` if even the smallest options take more; it says how much they take.
    """
    edges = {name: lower_edge(found) for name, found in sorted(options.items())}
    size = smallest(options)
    if size > budget:
        hint = f"the smallest that they can be is {size:,} bytes"
        raise ConfigError(f"the matrices do not fit into {budget:,} bytes", hint=hint)
    best = _greedy(edges, dict.fromkeys(edges, 0), budget)
    for name, edge in edges.items():
        for at in range(1, len(edge)):
            if size + edge[at].bytes - edge[0].bytes <= budget:
                other = _greedy(edges, {**dict.fromkeys(edges, 0), name: at}, budget, fixed=name)
                best = min(best, other, key=lambda place: _damage(edges, place))
    return {name: _choice(edges[name], at) for name, at in best.items()}


def _greedy(
    edges: Mapping[str, Sequence[Option]], place: dict[str, int], budget: int, fixed: str = ""
) -> dict[str, int]:
    """Upgrades from `place`, all but that of `fixed`, by gain; the options' places on their edges."""
    size = sum(edges[name][at].bytes for name, at in place.items())
    heap = [(-_gain(edge, 1), name) for name, edge in edges.items() if len(edge) > 1 and name != fixed]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        edge, at = edges[name], place[name]
        more = edge[at + 1].bytes - edge[at].bytes
        if size + more > budget:
            continue
        size += more
        place[name] = at + 1
        if at + 2 < len(edge):
            heapq.heappush(heap, (-_gain(edge, at + 2), name))
    return place


def _damage(edges: Mapping[str, Sequence[Option]], place: Mapping[str, int]) -> float:
    return sum(edges[name][at].damage for name, at in place.items())


def smallest(options: Mapping[str, Sequence[Option]]) -> int:
    """The bytes of all matrices, each in its smallest form."""
    return sum(min(option.bytes for option in found) for found in options.values())


def _choice(edge: Sequence[Option], at: int) -> Choice:
    return Choice(edge[at], _gain(edge, at) if at else 0.0, _gain(edge, at + 1) if at + 1 < len(edge) else 0.0)


def _gain(edge: Sequence[Option], at: int) -> float:
    """Damage saved per megabyte by the step to option `at`."""
    return 1e6 * (edge[at - 1].damage - edge[at].damage) / (edge[at].bytes - edge[at - 1].bytes)


def lower_edge(options: Sequence[Option]) -> list[Option]:
    """The options worth having, from the smallest: each larger one loses less, and by less and less per byte."""
    edge: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.damage)):
        if edge and (option.damage >= edge[-1].damage or option.bytes == edge[-1].bytes):
            continue
        while len(edge) > 1 and _slope(edge[-2], edge[-1]) <= _slope(edge[-2], option):
            edge.pop()
        edge.append(option)
    return edge


def _slope(smaller: Option, larger: Option) -> float:
    return (smaller.damage - larger.damage) / (larger.bytes - smaller.bytes)
