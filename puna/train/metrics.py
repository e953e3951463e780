"""`metrics.jsonl`: a line per step, cut back to the restored state's length when a run continues."""

import json
from pathlib import Path
from typing import Any

from puna.train.journal import Journal


class MetricsLog:
    """The log of a run; without a path (on ranks that only help) nothing is written."""

    def __init__(self, path: Path | None):
        self.path = path

    def __enter__(self) -> "MetricsLog":
        self.file = Journal(self.path) if self.path else None
        return self

    def __exit__(self, *_: Any) -> None:
        if self.file:
            self.file.close()

    def cut(self, length: int) -> None:
        """Forget what was logged after the first `length` bytes."""
        if self.file:
            self.file.cut(length)

    def write(self, record: dict[str, Any]) -> None:
        """Add a line; numbers with six digits."""
        rounded = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in record.items()}
        if self.file:
            self.file.add(json.dumps(rounded).encode())

    def flush(self) -> int:
        """Bring the log to the disk; its length."""
        return self.file.flush() if self.file else 0

    def summary(self) -> dict[str, Any]:
        """What the manifest says of the run: ends of the curves, tokens, median speed."""
        if not self.file:
            return {}
        self.flush()
        lines = [json.loads(line) for line in self.path.read_bytes().splitlines()]
        last = lines[-20:]
        summary = {
            "tokens": sum(line["tokens"] for line in lines),
            "loss": sum(line["loss"] for line in last) / len(last),
            "tokens_per_s": round(_median([line["tokens_per_s"] for line in lines])),
            "mfu": _median([line["mfu"] for line in lines]),
        }
        validated = [line["val_loss"] for line in lines if "val_loss" in line]
        return summary | ({"val_loss": validated[-1]} if validated else {})


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
