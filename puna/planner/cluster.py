"""The nodes: which train, which wait as spares, which are away, and which fail more often than the others.

A node is a number. How often something fails follows from who takes part: with its lemons left out, a cluster fails less.
"""

import random
from collections import defaultdict
from collections.abc import Sequence

from puna.planner.scenario import Scenario


class Cluster:
    """The nodes of one simulated run. Times are seconds since its start."""

    def __init__(self, scenario: Scenario, draw: random.Random):
        self.scenario = scenario
        count = scenario.nodes + scenario.spares
        lemons = draw.sample(range(count), round(scenario.lemons.share * count))
        self.lemons = frozenset(lemons)
        everybody = list(range(count))
        draw.shuffle(everybody)
        self.members = everybody[: scenario.nodes]  # in the order of domains
        self.spares = everybody[scenario.nodes :]
        self.broken: set[int] = set()  # nodes that fail again as soon as they are used
        self.histories: dict[str, list[tuple[float, str]]] = defaultdict(list)
        self._suspects: set[str] = set()
        self._draw = draw
        self._times = scenario.lemons.times
        # The table's rate is the average over all nodes, so an ordinary one fails a little less often than that.
        average = 1 + len(lemons) * (self._times - 1) / count
        per_node_s = scenario.failures.per_gpu_hour * scenario.failure_factor * scenario.gpus / scenario.nodes / 3600
        self._ordinary_per_s = per_node_s / average
        self._places = {node: place for place, node in enumerate(self.members)}
        self._lemons_in = [node for node in self.members if node in self.lemons]

    @property
    def faults_per_s(self) -> float:
        """Unexpected interruptions a second, by the nodes that take part now."""
        return self._ordinary_per_s * (len(self.members) + len(self._lemons_in) * (self._times - 1))

    def struck(self) -> int:
        """The node that a fault hits."""
        extra = len(self._lemons_in) * (self._times - 1)
        if self._draw.random() * (len(self.members) + extra) < extra:
            return self._draw.choice(self._lemons_in)
        return self._draw.choice(self.members)

    def note(self, node: int, now_s: float, kind: str) -> None:
        """Remember a fault of a node, as `EvictionPolicy` weighs them."""
        policy, history = self.scenario.eviction, self.histories[str(node)]
        history[:] = [(at_s, what) for at_s, what in history if now_s - at_s <= policy.window_s]
        history.append((now_s, kind))
        if policy.weigh(history, now_s) >= policy.points:
            self._suspects.add(str(node))

    def unfit(self, now_s: float) -> set[int]:
        """The nodes that `EvictionPolicy` leaves out now because of their history.

        Only a new fault makes a history heavier, so the policy is asked about those that were too heavy then.
        """
        policy = self.scenario.eviction
        self._suspects = {n for n in self._suspects if policy.weigh(self.histories[n], now_s) >= policy.points}
        suspects = {name: self.histories[name] for name in self._suspects}
        return {int(name) for name in policy.left_out(suspects, now_s, self.scenario.nodes)} if suspects else set()

    def fit_spares(self, now_s: float) -> list[int]:
        """Spares that may take part."""
        unfit = self.unfit(now_s)
        return [node for node in self.spares if node not in unfit]

    def replace(self, node: int, spare: int) -> None:
        """`spare` takes the place of `node`, which belongs to nobody then."""
        self.spares.remove(spare)
        place = self._places.pop(node)
        self.members[place] = spare
        self._places[spare] = place
        if node in self.lemons:
            self._lemons_in.remove(node)
        if spare in self.lemons:
            self._lemons_in.append(spare)

    def takes_part(self, node: int) -> bool:
        """Is it one of the nodes that train?"""
        return node in self._places

    def back(self, nodes: Sequence[int]) -> None:
        """Nodes that were repaired wait as spares."""
        self.broken.difference_update(nodes)
        self.spares.extend(nodes)

    def domain(self, number: int) -> list[int]:
        """The members of a maintenance domain."""
        size = self.scenario.maintenance.domain_nodes
        return self.members[number * size : (number + 1) * size]
