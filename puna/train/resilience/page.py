"""A run as a page: its curves with the faults on them, where its time went, and what each fault cost.

One HTML file, `watch.html` in the run's folder, without scripts and without anything from elsewhere. While somebody
watches it is written anew every few seconds, and the browser reads it again by itself.
"""

import json
import math
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from puna.artifacts import write_atomic
from puna.errors import ArtifactError
from puna.train.resilience import goodput, ledger
from puna.train.resilience.ledger import Account

NAME = "watch.html"
METRICS = "metrics.jsonl"
AGAIN_S = 5
_CURVES = {
    "loss": "loss", "val_loss": "held-out loss", "grad_norm": "gradient norm", "lr": "learning rate",
    "tokens_per_s": "tokens per second", "mfu": "share of the peak",
}  # fmt: skip
_WIDTH, _HEIGHT, _LEFT, _TOP = 440, 150, 58, 24
_POINTS = 400  # of a curve: more than a screen shows
_STYLE = (
    "body{font-family:sans-serif;color:#222;max-width:960px;margin:16px auto}td,th{padding:2px 10px;text-align:right;white-space:nowrap}"
    "td:last-child,th:last-child{text-align:left;white-space:normal}table{border-collapse:collapse;font-size:13px}tr{border-bottom:1px solid #ddd}"
)


def write(folder: Path) -> Path:
    """Write the page; where it is. Raises `ArtifactError` if `folder` is not a run's."""
    path = folder / NAME
    lines = _lines(folder / METRICS)
    events = ledger.read(folder) if (folder / ledger.LEDGER).is_file() else []
    if not lines and not events:
        hint = "give the folder that a training run writes to"
        raise ArtifactError(f"{folder} has neither {METRICS} nor {ledger.LEDGER} with anything in it", hint=hint)
    write_atomic(path, html(folder.name, lines, events))
    return path


def is_over(folder: Path) -> bool:
    """Did the run come to its end?"""
    events = ledger.read(folder) if (folder / ledger.LEDGER).is_file() else []
    return bool(events) and events[-1]["event"] == "end"


def html(name: str, lines: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]) -> str:
    """The page of a run, from its log's lines and its ledger's events."""
    account = ledger.account(events)
    steps = [event["step"] for event in events if event["event"] == "fault" and event.get("step") is not None]
    curves = [_curve(label, _series(lines, key), steps) for key, label in _CURVES.items()]
    at = time.strftime("%Y-%m-%d %H:%M:%S")
    last = f"step {lines[-1]['step']:,}, loss {lines[-1]['loss']:.4f}, " if lines else ""
    body = [f"<h2>{escape(name)}</h2><p>{last}{len(account.faults)} faults; as of {at}</p>", *curves]
    if account.intervals:
        body += [goodput.svg(account), _faults(account, events[0]["at"])]
    head = f'<meta charset="utf-8"><meta http-equiv="refresh" content="{AGAIN_S}"><title>{escape(name)}</title>'
    return f"<!doctype html><html><head>{head}<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:  # being written
            continue
    return [line for line in found if isinstance(line, dict) and {"step", "loss"} <= line.keys()]


def _series(lines: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float))]
    points = [point for point in points if math.isfinite(point[1])]
    every = -(-len(points) // _POINTS) or 1
    return points[::every] + (points[-1:] if len(points) % every != 1 and every > 1 else [])


def _curve(label: str, points: list[tuple[float, float]], faults: Sequence[int]) -> str:
    """A picture of one curve over the steps, with a mark where a fault came; empty without points."""
    if not points:
        return ""
    (first, last), values = (points[0][0], points[-1][0]), [value for _, value in points]
    low, high = min(values), max(values)
    across, up = (_WIDTH - _LEFT - 8) / ((last - first) or 1), (_HEIGHT - _TOP - 22) / ((high - low) or 1)

    def place(step: float) -> float:
        return _LEFT + (step - first) * across

    path = " ".join(f"{place(step):.1f},{_HEIGHT - 22 - (value - low) * up:.1f}" for step, value in points)
    marks = "".join(
        f'<path d="M{place(step):.1f} {_TOP}v{_HEIGHT - _TOP - 22}" stroke="#c65b4b" stroke-width="0.7"/>'
        for step in faults
        if first <= step <= last
    )
    texts = [(_LEFT, 15, f"{label} {values[-1]:.4g}", 13), (2, _TOP + 8, f"{high:.4g}", 10)]
    texts += [(2, _HEIGHT - 22, f"{low:.4g}", 10), (_LEFT, _HEIGHT - 6, f"step {first:,.0f}", 10)]
    said = "".join(f'<text x="{x}" y="{y}" font-size="{size}" fill="#333">{t}</text>' for x, y, t, size in texts)
    end = f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 6}" font-size="10" fill="#333" text-anchor="end">{last:,.0f}</text>'
    line = f'<polyline points="{path}" fill="none" stroke="#3b7dbf" stroke-width="1.4"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}">{marks}{line}{said}{end}</svg>'


def _faults(account: Account, begun: float) -> str:
    """The faults as a table, the newest first."""
    if not account.faults:
        return ""
    head = ["after", "fault", "rank", "found in", "back in", "steps lost", "cost", "what"]
    rows = []
    for fault in reversed(account.faults):
        cells = [f"{fault.at - begun:,.0f} s", fault.kind, "" if fault.rank is None else fault.rank]
        cells += [
            f"{fault.detecting_s:.2f} s",
            f"{fault.restarting_s:.2f} s",
            fault.lost_steps,
            f"{fault.cost_s:.2f} s",
        ]
        rows.append([*cells, fault.why.splitlines()[0][:160] if fault.why else ""])
    line = "<tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr>"
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{line}{body}</table>"
