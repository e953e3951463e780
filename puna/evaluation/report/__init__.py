"""The report of a run: `report.html` for people, `report.json` for programs, both made from the artifacts alone.

    artifacts --findings.collect--> one JSON value --page.page--> HTML

`write_report(config, artifacts, out=…)` takes all artifacts of a run in the order in which they were made; which of
their metrics it reads is written in `findings.py`. A report never guesses: what was not measured says so.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from puna.artifacts import Artifact, stage, write_atomic
from puna.config import require
from puna.evaluation.report.findings import collect
from puna.evaluation.report.page import page

__all__ = ["ReportConfig", "write_report"]


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the report is called and how much it shows."""

    title: str = "Puna"
    note: str = ""  # a sentence under the title: what this run was for
    samples: int = 12  # dialogs shown for each evaluated model

    def __post_init__(self) -> None:
        require(self.samples >= 0, f"samples={self.samples} is not a number of dialogs")


@stage("report")
def write_report(config: ReportConfig, artifacts: Sequence[Artifact], *, out) -> dict:
    """Write `report.html` and `report.json` about the run that made `artifacts`. Its metrics are the headline numbers."""
    found = collect(artifacts)
    text = page(found, title=config.title, note=config.note, samples=config.samples)
    write_atomic(out / "report.html", text)
    write_atomic(out / "report.json", json.dumps(found, indent=1))
    return {"headlines": found["headlines"]}
