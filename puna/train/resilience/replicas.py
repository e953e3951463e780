"""Silent corruption: replicas of a part do the same arithmetic, so their bytes must be equal. Here they are compared.

Every few steps the ranks tell each other the hash of their state. Where one differs, the majority says who is wrong. With
two replicas there is no majority: then the run goes back to the last state on which all agreed and makes the steps once
more. Arithmetic is deterministic here, so the second result shows whose first one was wrong.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


def outliers(hashes: Sequence[str | bytes]) -> list[int] | None:
    """The positions that disagree with the majority; empty if all agree, None if there is no majority."""
    counts = Counter(hashes).most_common()
    if len(counts) == 1:
        return []
    if counts[0][1] * 2 <= len(hashes):
        return None
    return [position for position, digest in enumerate(hashes) if digest != counts[0][0]]


@dataclass(kw_only=True)
class Comparison:
    """What the ranks' hashes of one state say."""

    key: tuple[int, int]
    hashes: list[str]  # by rank
    parts: list[int]  # by rank

    def wrong(self) -> list[int] | None:
        """The ranks that are wrong; None if some disagree and nobody can say who."""
        found: list[int] = []
        for part in sorted(set(self.parts)):
            ranks = [rank for rank, p in enumerate(self.parts) if p == part]
            positions = outliers([self.hashes[rank] for rank in ranks])
            if positions is None:
                return None
            found += [ranks[p] for p in positions]
        return found


@dataclass
class Trial:
    """A disagreement whose steps are being made again. One rank's view: the hashes of its own states, step by step."""

    first: dict[int, str] = field(default_factory=dict)  # step -> hash, of the steps that led to a disagreement
    now: dict[int, str] = field(default_factory=dict)  # the same since the last comparison that was good
    times: Counter[int] = field(default_factory=Counter)

    def note(self, step: int, digest: str) -> None:
        """The state after `step` steps has this hash."""
        self.now[step] = digest

    def begin(self, step: int) -> int:
        """The replicas differ after `step`; how often they now did."""
        self.first, self.now = self.now, {}
        self.times[step] += 1
        return self.times[step]

    def first_difference(self) -> int | None:
        """The first step that came out differently the second time."""
        return min((s for s, digest in self.first.items() if self.now.get(s, digest) != digest), default=None)

    def end(self) -> None:
        """The replicas agree."""
        self.first, self.now = {}, {}


def earliest(differences: Sequence[int | None]) -> list[int]:
    """Whose number was wrong first: a wrong number of one rank is in everybody's gradients one step later."""
    steps = [step for step in differences if step is not None]
    return [rank for rank, step in enumerate(differences) if step is not None and step == min(steps)]
