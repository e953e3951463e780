"""What was measured: a table of runs, each with its parameters, tokens, floating-point operations and loss.

    parameters,tokens,loss[,flops,budgets]         a CSV of one's own; flops are 6 * parameters * tokens if not given

`counts` says what `parameters` counts (see `law`). Which count was used is not visible in a number, but it shows in
FLOPs that do not go with it: `count_warnings` compares them.
"""

import csv
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from puna.config import require
from puna.errors import DataError
from puna.scaling.law import FLOPS_PER_PARAMETER, Counts, Seen

WANTED, OPTIONAL = ("parameters", "tokens", "loss"), ("flops", "budgets")
KNOWN = (*WANTED, *OPTIONAL)
_SAME_BUDGET = 0.1  # runs whose FLOPs differ by less than this share belong to one budget
_RATIO_SPREAD = (
    1.15  # largest over smallest FLOPs / (6 N D) that one way of counting explains: attention grows a little
)


@dataclass(frozen=True, kw_only=True)
class Points:
    """Runs as columns of equal length. `budgets` are the FLOPs that were aimed at; runs of one budget share the value."""

    parameters: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray  # nats per token
    budgets: np.ndarray
    counts: Counts = "all"

    @classmethod
    def of(
        cls,
        parameters: Sequence[float],
        tokens: Sequence[float],
        loss: Sequence[float],
        *,
        flops: Sequence[float] | None = None,
        budgets: Sequence[float] | None = None,
        counts: Counts = "all",
    ) -> "Points":
        """Points from columns. Raises `DataError` for columns of different lengths and values that cannot be."""
        n, d, y = (np.asarray(x, dtype=float) for x in (parameters, tokens, loss))
        c = FLOPS_PER_PARAMETER * n * d if flops is None else np.asarray(flops, dtype=float)
        b = _cluster(c) if budgets is None else np.asarray(budgets, dtype=float)
        named = {"parameters": n, "tokens": d, "loss": y, "flops": c, "budgets": b}
        for name, column in named.items():
            if column.shape != n.shape or n.ndim != 1:
                raise DataError(f"{name} has shape {column.shape}, parameters {n.shape}", hint="one value for each run")
            wrong = np.flatnonzero(~(np.isfinite(column) & (column > 0)))
            if len(wrong):
                row = int(wrong[0])
                raise DataError(f"{name} of run {row + 1} is {column[row]}", hint="leave out runs that diverged")
        return cls(parameters=n, tokens=d, flops=c, loss=y, budgets=b, counts=counts)

    @classmethod
    def read(cls, path: Path | str, *, counts: Counts = "all") -> "Points":
        """Points from a CSV file with a heading. Raises `DataError` with the line that is wrong."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark before the heading
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {error}", hint="give a CSV file") from None
        return cls.of(**_columns(path, text), counts=counts)

    def __len__(self) -> int:
        return len(self.loss)

    def where(self, mask: np.ndarray) -> "Points":
        """The runs where `mask` is true (or at its indices)."""
        columns = {n: getattr(self, n)[mask] for n in ("parameters", "tokens", "flops", "loss", "budgets")}
        return Points(**columns, counts=self.counts)

    def with_loss(self, loss: np.ndarray) -> "Points":
        """The same runs with other losses."""
        columns = {n: getattr(self, n) for n in ("parameters", "tokens", "flops", "budgets")}
        return Points(**columns, loss=loss, counts=self.counts)

    def by_budget(self) -> Iterator[tuple[float, "Points"]]:
        """The runs of each budget, cheapest first, each group by rising tokens."""
        for budget in np.unique(self.budgets):
            group = self.where(self.budgets == budget)
            yield float(budget), group.where(np.argsort(group.tokens))

    def seen(self) -> Seen:
        ratio = self.tokens / self.parameters
        pairs = [(float(x.min()), float(x.max())) for x in (self.parameters, self.tokens, ratio)]
        return Seen(parameters=pairs[0], tokens=pairs[1], ratio=pairs[2])

    def per_parameter(self) -> float:
        """FLOPs per parameter and token, the geometric mean of the runs."""
        return float(np.exp(np.mean(np.log(self.flops / (self.parameters * self.tokens)))))


def _columns(path: Path, text: str) -> dict[str, list[float]]:
    """The known columns of a table with commas, semicolons or tabs. Raises `DataError` with the line that is wrong."""
    heading = text.partition("\n")[0]
    separator = max(",;\t", key=heading.count)
    try:
        rows = list(csv.reader(text.splitlines(), delimiter=separator))
    except csv.Error as error:
        raise DataError(f"{path} cannot be read: {error}", hint="give a CSV file") from None
    names = [name.strip().lower() for name in rows[0]] if rows else []
    lines = [(line, row) for line, row in enumerate(rows[1:], 2) if any(cell.strip() for cell in row)]
    _check_heading(path, names, bool(lines))
    for line, row in lines:
        if len(row) != len(names):
            hint = "one value for each column; decimals with a point"
            raise DataError(f"{path}, line {line}: {len(row)} values for {len(names)} columns", hint=hint)
    columns: dict[str, list[float]] = {}
    for name in KNOWN:
        if name not in names:
            continue
        cells = [(line, row[names.index(name)].strip()) for line, row in lines]
        if name in OPTIONAL and not any(cell for _, cell in cells):
            continue  # a column that nobody filled in
        columns[name] = []
        for line, cell in cells:
            try:
                columns[name].append(float(cell))
            except ValueError:
                hint = "write numbers such as 8030000000 or 8.03e9"
                raise DataError(f"{path}, line {line}: {name}={cell!r} is not a number", hint=hint) from None
    return columns


def _check_heading(path: Path, names: list[str], any_runs: bool) -> None:
    hint = "the first line names the columns: parameters,tokens,loss and, if known, flops,budgets"
    missing = [name for name in WANTED if name not in names]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}", hint=hint)
    twice = [name for name in KNOWN if names.count(name) > 1]
    if twice:
        raise DataError(f"{path} has two columns {twice[0]!r}", hint="leave one out")
    for name in names:  # a column that was meant and would be passed over
        near = difflib.get_close_matches(name, OPTIONAL, n=1, cutoff=0.75)
        if near and name not in KNOWN:
            raise DataError(f"{path} has a column {name!r}", hint=f"did you mean {near[0]!r}? {hint}")
    if not any_runs:
        raise DataError(f"{path} has a heading and no runs", hint="one line for each run")


def count_warnings(points: Points) -> tuple[str, ...]:
    """Whether parameters and FLOPs can have been counted alike in all runs.

    With embeddings left out of N (or the head out of C) the FLOPs per parameter and token change with size, since
    embeddings are most of a small model and little of a large one; the exponent of N* then comes out wrong.
    """
    ratio = points.flops / (FLOPS_PER_PARAMETER * points.parameters * points.tokens)
    spread = float(ratio.max() / ratio.min())
    if spread <= _RATIO_SPREAD:
        return ()
    order = np.argsort(points.parameters)
    small, large = ratio[order[0]], ratio[order[-1]]
    return (
        f"FLOPs / (6 * parameters * tokens) goes from {small:.2f} at the smallest model to {large:.2f} at the largest: "
        f"parameters ({points.counts}) and FLOPs do not count the same weights. Give parameters with the output head and "
        "without the input embedding, or FLOPs with the head",
    )


def need(points: Points, least: int, what: str) -> None:
    """Raises `DataError` where there are fewer than `least` runs."""
    if len(points) < least:
        raise DataError(f"{what} needs at least {least} runs, not {len(points)}", hint="make more runs")


def _cluster(flops: np.ndarray) -> np.ndarray:
    """Each run's budget: the mean FLOPs of those that follow one another closely."""
    require(flops.ndim == 1 and len(flops) > 0, "there are no runs", hint="give at least one")
    order = np.argsort(flops)
    steps = np.diff(np.log(flops[order])) > _SAME_BUDGET
    label = np.concatenate([[0], np.cumsum(steps)])
    budgets = np.empty(len(flops))
    for group in range(label[-1] + 1):
        members = order[label == group]
        budgets[members] = np.exp(np.mean(np.log(flops[members])))
    return budgets
