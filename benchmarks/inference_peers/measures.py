"""What is asked of every engine, and what is made of the answers.

A *record* is one measurement: who, what, in which round, the probe's GB/s just before, and tokens per second. Engines
take turns at the same question before the next one is asked, so that the ratio of two of them in one round is taken
within seconds; medians are taken over the rounds.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from inference_peers.exchange import Child
from inference_peers.probe import states

ROOM = 72  # tokens that a sequence may grow by while it is measured
WARM_STEPS = 2
WAKING_TOKENS = 32


@dataclass(frozen=True)
class Measure:
    """A question. `size`: tokens of a prompt, of a context, or how many sequences."""

    kind: str  # prefill, decode, batch
    size: int

    def __str__(self) -> str:
        return f"{self.kind} {self.size}"

    @property
    def contexts(self) -> list[int]:
        """Tokens that each sequence has in the cache: for a batch from 16 to 215, mixed."""
        return [self.size] if self.kind == "decode" else [(37 * i) % 200 + 16 for i in range(self.size)]

    def prepare(self, child: Child) -> None:
        """Not timed: weights that are only mapped come back into memory, the cache gets its contents."""
        if self.kind == "prefill":
            child.ask("prefill", tokens=WAKING_TOKENS)
        else:
            child.ask("start", contexts=self.contexts, room=ROOM)
            child.ask("decode", steps=WARM_STEPS)

    def take(self, child: Child, steps: int) -> tuple[float, object]:
        """Tokens per second, of all sequences together, and what the engine said."""
        if self.kind == "prefill":
            answer = child.ask("prefill", tokens=self.size)
            return self.size / answer["seconds"], answer["result"]
        steps = min(ROOM - WARM_STEPS, steps if self.kind == "decode" else max(4, steps // 4))
        answer = child.ask("decode", steps=steps)
        child.ask("rest")
        return len(self.contexts) * steps / answer["seconds"], answer["result"][:8]


@dataclass(frozen=True)
class Record:
    """One measurement."""

    threads: int
    engine: str
    form: str
    measure: str
    round: int
    probe: float
    speed: float
    read: int  # bytes of weights for a token

    @property
    def share(self) -> float:
        """Of the probe's bandwidth, in weights read. Means something where one sequence decodes."""
        return self.read * self.speed / self.probe / 1e9


def summary(records: list[Record], ours: str) -> list[dict]:
    """A row for each engine and question: medians over rounds, quartiles, and ours relative to it, also by state."""
    readings = _grouped(records, lambda r: r.threads)
    parted = {threads: states([r.probe for r in group]) for threads, group in readings.items()}
    rows = []
    for key, group in _grouped(records, lambda r: (r.threads, r.measure, r.form, r.engine)).items():
        row = dict(zip(("threads", "measure", "form", "engine"), key))
        row |= {"tokens per second": _spread([r.speed for r in group])}
        row |= {"probe GB/s": round(statistics.median(r.probe for r in group), 1)}
        if row["measure"].startswith("decode"):
            row |= {"share of probe": _spread([r.share for r in group])}
        if row["engine"] != ours:
            row |= {"ours over it": _ratios(records, group, ours, parted[row["threads"]])}
        elif best := _over_best(records, group):
            row |= {"over the best peer of any format": best}
        rows.append(row)
    return rows


def _ratios(records: list[Record], theirs: list[Record], ours: str, parted: float | None) -> dict:
    """Our speed over theirs in the same round, the median; in each state of the memory if there are two."""
    it = theirs[0]
    key = (it.threads, it.measure, it.form, ours)
    same = {r.round: r for r in records if (r.threads, r.measure, r.form, r.engine) == key}
    pairs = [(same[r.round], r) for r in theirs if r.round in same]
    found = {"all rounds": _spread([a.speed / b.speed for a, b in pairs])} if pairs else {}
    if parted is not None:
        for name, inside in (("slow", lambda r: r.probe < parted), ("fast", lambda r: r.probe >= parted)):
            if some := [a.speed / b.speed for a, b in pairs if inside(a) and inside(b)]:
                found[f"memory {name}"] = _spread(some)
    return found


def _over_best(records: list[Record], mine: list[Record]) -> dict | None:
    """Our speed over that of whichever peer was fastest in the same round, whatever its format."""
    it, ratios = mine[0], []
    for own in mine:
        theirs = [
            r.speed
            for r in records
            if (r.threads, r.measure, r.round) == (it.threads, it.measure, own.round) and r.engine != it.engine
        ]
        if theirs:
            ratios.append(own.speed / max(theirs))
    return _spread(ratios) if ratios else None


def _spread(values: list[float]) -> dict:
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": round(statistics.median(values), 3), "quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
            "n": len(values)}  # fmt: skip


def table(rows: list[dict]) -> str:
    """The summary as text."""
    lines = []
    for (threads, measure), group in _grouped(rows, lambda r: (r["threads"], r["measure"])).items():
        lines.append(f"\n{measure}, {threads} thread{'s' * (threads > 1)}: tokens/s")
        for row in sorted(group, key=lambda r: (r["form"], -r["tokens per second"]["median"])):
            lines.append(_line(row))
    return "\n".join(lines)


def _line(row: dict) -> str:
    speed = row["tokens per second"]
    text = f"  {row['form']:5} {row['engine']:13} {speed['median']:8.1f}  [{speed['quartiles'][0]:.1f}, {speed['quartiles'][1]:.1f}]"
    if "share of probe" in row:
        text += f"  {row['share of probe']['median']:4.0%} of {row['probe GB/s']:.0f} GB/s"
    for state, ratio in row.get("ours over it", {}).items():
        text += f"  ours x {ratio['median']:.2f}" + (f" ({state})" if state != "all rounds" else "")
    if "over the best peer of any format" in row:
        text += f"  x {row['over the best peer of any format']['median']:.2f} of the best peer of any format"
    return text


def _grouped(items: Iterable, key: Callable) -> dict:
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def plain(records: list[Record]) -> list[dict]:
    return [asdict(r) for r in records]
