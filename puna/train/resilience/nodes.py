"""What happened on which node: a line per fault, kept across restarts, so that a node with a history is left out."""

import contextlib
import json
import time
from collections import defaultdict
from pathlib import Path

from puna.planner.policies import EvictionPolicy

HISTORY = "nodes.jsonl"


def note(folder: Path, node: str, kind: str) -> None:
    """Something happened on `node`: a kind of `policies.POINTS`. Where the disk is full it is forgotten."""
    with contextlib.suppress(OSError), (folder / HISTORY).open("a") as file:
        file.write(json.dumps({"at": round(time.time(), 3), "node": node, "kind": kind}) + "\n")


def histories(folder: Path) -> dict[str, list[tuple[float, str]]]:
    """Node -> (time, kind) of what happened there."""
    found: dict[str, list[tuple[float, str]]] = defaultdict(list)
    path = folder / HISTORY
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            event = json.loads(line)
            found[event["node"]].append((event["at"], event["kind"]))
        except (ValueError, KeyError, TypeError):  # cut short by a kill
            continue
    return dict(found)


def chosen(folder: Path, nodes: list[str], needed: int, policy: EvictionPolicy) -> tuple[list[str], list[str]]:
    """`needed` of `nodes`, in their order, and those that are left out because of their history.

    Where too few good ones are there, the least bad are taken after all: a slow run is better than none.
    """
    out = policy.left_out(histories(folder), time.time(), len(nodes))
    good = [node for node in nodes if node not in out]
    while len(good) < needed and out:
        good.append(out.pop())
    return sorted(good[:needed], key=nodes.index), out
