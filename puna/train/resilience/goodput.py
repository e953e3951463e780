"""The ledger as a picture: a run on its time axis, a row per minute or more, faults above it; and what it came to.

One SVG file without scripts, `goodput.svg` in the run's folder, that any browser shows.
"""

from html import escape
from pathlib import Path

from puna.artifacts import write_atomic
from puna.train.resilience.ledger import CATEGORIES, Account, account, read

NAME = "goodput.svg"
COLOURS = {
    "training": "#4c9a5b", "saving": "#3b7dbf", "checking": "#79b4e0", "evaluating": "#9c8ac9", "bad data": "#d9a441",
    "repeated": "#c65b4b", "detecting": "#7d2a2a", "restarting": "#d98880", "starting": "#b8b8b8", "down": "#ececec",
}  # fmt: skip
_WIDTH, _LEFT, _ROW, _HEAD = 960, 60, 34, 64


def write(folder: Path) -> tuple[Account, Path]:
    """Divide a run's time and draw it; the account, and where the picture is."""
    found = account(read(folder))
    path = folder / NAME
    write_atomic(path, svg(found))
    return found, path


def svg(found: Account) -> str:
    """The picture."""
    start = found.intervals[0].start if found.intervals else 0.0
    end = found.intervals[-1].end if found.intervals else 1.0
    rows = max(1, min(24, round((end - start) / 60)))
    seconds = (end - start) / rows or 1.0
    spent = found.seconds()
    body = [_text(_LEFT, 22, f"goodput {found.goodput:.1%} of {sum(spent.values()) - spent['down']:,.0f} s", 16)]
    body += _legend(spent)
    for interval in found.intervals:
        body += _bars(interval.start - start, interval.end - start, interval.category, seconds, rows)
    body += [_mark(fault.at - start, fault, seconds, rows) for fault in found.faults]
    body += [_text(4, _HEAD + r * _ROW + 22, f"{r * seconds:,.0f} s", 11) for r in range(rows)]
    height = _HEAD + rows * _ROW + 16
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif">'
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>{"".join(body)}</svg>\n'
    )


def _legend(spent: dict[str, float]) -> list[str]:
    parts, x = [], _LEFT
    for name in CATEGORIES:
        if spent[name] > 0:
            label = f"{name} {spent[name]:,.1f} s"
            parts.append(f'<rect x="{x}" y="34" width="10" height="10" fill="{COLOURS[name]}"/>')
            parts.append(_text(x + 14, 43, label, 11))
            x += 22 + 6 * len(label)
    return parts


def _bars(begin: float, end: float, category: str, seconds: float, rows: int) -> list[str]:
    """The pieces of an interval, which may go over the end of a row."""
    parts, scale = [], (_WIDTH - _LEFT - 10) / seconds
    row = min(int(begin / seconds), rows - 1)
    while begin < end and row < rows:
        stop = min(end, (row + 1) * seconds) if row < rows - 1 else end
        x, width = _LEFT + (begin - row * seconds) * scale, max((stop - begin) * scale, 0.15)
        y = _HEAD + row * _ROW + 10
        parts.append(f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="16" fill="{COLOURS[category]}"/>')
        begin, row = stop, row + 1
    return parts


def _mark(at: float, fault: object, seconds: float, rows: int) -> str:
    row = min(int(at / seconds), rows - 1)
    x, y = _LEFT + (at - row * seconds) * (_WIDTH - _LEFT - 10) / seconds, _HEAD + row * _ROW + 9
    said = escape(f"{fault.kind}, rank {fault.rank}: {fault.why[:120]}; cost {fault.cost_s:.2f} s")
    return f'<path d="M{x:.1f} {y}l-4 -7h8z" fill="#7d2a2a"><title>{said}</title></path>'


def _text(x: float, y: float, text: str, size: int) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="#333">{escape(text)}</text>'
