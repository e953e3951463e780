"""The ledger: one row for each document that was read, in the order of reading, saying what became of it and why.

    decision   kept, trimmed (repeated lines were taken out), redacted (personal data was), dropped
    reason     the rule, step     where in the line it was decided
    score      the quality classifier's, where the document came that far
    evidence   the value that broke the rule; of a duplicate, the document that stays and the exact similarity

With it a threshold can be judged again without running anything, and any document of the result can be traced to its file.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from puna.artifacts import replacing
from puna.errors import ArtifactError

FILE = "ledger.parquet"
EXAMPLES, EXCERPT = 3, 200
KEPT, TRIMMED, REDACTED, DROPPED = "kept", "trimmed", "redacted", "dropped"

_TEXTS = ("id", "source", "url", "lang", "decision", "step", "reason", "evidence", "split")
SCHEMA = pa.schema([*((name, pa.string()) for name in _TEXTS), ("bytes", pa.int64()), ("score", pa.float32())])


@dataclass(slots=True)
class Entry:
    """A row while it is being decided. An entry without a decision at the end is kept."""

    id: str
    source: str
    url: str
    bytes: int
    lang: str = ""
    decision: str = KEPT
    step: str = ""
    reason: str = ""
    evidence: str = ""
    split: str = ""
    score: float | None = None


class Ledger:
    """All entries, and for each reason a few excerpts of what it hit."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.examples: dict[str, list[str]] = defaultdict(list)

    def open(self, entry: Entry) -> int:
        """Enter a document that was read; returns its position."""
        self.entries.append(entry)
        return len(self.entries) - 1

    def drop(self, index: int, step: str, reason: str, evidence: str = "", text: str = "") -> None:
        """Decide that a document goes. A document goes once."""
        entry = self.entries[index]
        if entry.decision == DROPPED:
            raise ArtifactError(f"{entry.id} is dropped twice: as {entry.reason!r} and as {reason!r}")
        entry.decision, entry.step, entry.reason, entry.evidence = DROPPED, step, reason, evidence
        self._show(reason, entry.id, text)

    def change(self, index: int, decision: str, step: str, reason: str, evidence: str, text: str = "") -> None:
        """Note that a document stays, but not as it was; of several changes the reasons and evidence are listed."""
        entry = self.entries[index]
        entry.reason = f"{entry.reason}, {reason}" if entry.reason else reason
        entry.evidence = f"{entry.evidence}, {evidence}" if entry.evidence else evidence
        entry.decision, entry.step = decision, step
        self._show(reason, entry.id, text)

    def _show(self, reason: str, name: str, text: str) -> None:
        shown = self.examples[reason]
        if len(shown) < EXAMPLES:
            excerpt = f"{name}: {' '.join(text[: 2 * EXCERPT].split())}"
            shown.append(excerpt if len(excerpt) <= EXCERPT else excerpt[: EXCERPT - 1] + "…")

    def dropped(self) -> dict[str, dict[str, int | str]]:
        """Documents and bytes by reason, most frequent first."""
        documents, size, step = Counter(), Counter(), {}
        for entry in self.entries:
            if entry.decision == DROPPED:
                documents[entry.reason] += 1
                size[entry.reason] += entry.bytes
                step[entry.reason] = entry.step
        ordered = sorted(documents, key=lambda reason: (-documents[reason], reason))
        return {r: {"documents": documents[r], "bytes": size[r], "step": step[r]} for r in ordered}

    def write(self, path: Path) -> None:
        """Write the ledger as Parquet."""
        with replacing(path) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
            for start in range(0, len(self.entries), 1 << 16):
                rows = self.entries[start : start + (1 << 16)]
                columns = [[getattr(entry, name) for entry in rows] for name in SCHEMA.names]
                writer.write_table(pa.table(columns, schema=SCHEMA))
