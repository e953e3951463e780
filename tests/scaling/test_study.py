"""A whole study in small: text, a grid of real runs, stopped by the clock, continued, fitted."""

import json
import os

import pytest

from puna import log
from puna.curation.curate import CurationConfig
from puna.errors import ArtifactError
from puna.recipes import scaling
from puna.recipes.scaling import Study
from puna.scaling import family
from puna.scaling.grid import GridConfig, budgets

GRID = GridConfig(budgets=2, sizes=4, factor=2.0, span=6.0, beyond=2.0, sequence_length=32)


def study(**more):
    curation = CurationConfig(heldout_share=0.1, embedded_bytes=1_000_000)
    return Study(flops=4e9, grid=GRID, curation=curation, validation_rows=32, threads=1, **more)


def test_a_study_stops_with_its_time_and_goes_on_with_the_same_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(family, "_LEAST_STEPS", 20)  # enough to be runs; a law of them means nothing
    said = []
    monkeypatch.setattr(log, "info", said.append)
    monkeypatch.setattr(log, "warn", said.append)
    allowed = iter([True, True, False])
    monkeypatch.setattr(scaling._Clock, "allows", lambda *_: next(allowed))
    assert scaling.run(study(), 5, tmp_path / "s") is None
    assert any("time is up" in line for line in said)
    before = {p.name: (p / "manifest.json").read_bytes() for p in (tmp_path / "s" / "runs").iterdir()}
    assert len(before) == 2

    monkeypatch.setattr(scaling._Clock, "allows", lambda *_: True)
    fit = scaling.run(study(), 5, tmp_path / "s")
    assert {n: (tmp_path / "s/runs" / n / "manifest.json").read_bytes() for n in before} == before
    found = json.loads(fit.file("fit.json").read_text())
    assert found["runs"]["predicted"] == 1 and found["runs"]["fitted"] >= 8
    assert found["counts"] == "matrices"
    assert {round(p["flops"] / min(budgets(GRID)[0], p["flops"])) >= 1 for p in found["points"]} == {True}
    for planned, point in zip(
        sorted(p["budgets"] for p in found["points"]), sorted(p["flops"] for p in found["points"])
    ):
        assert point == pytest.approx(planned, rel=0.1)
    again = scaling.run(study(), 5, tmp_path / "s")
    assert again.digest == fit.digest
    with pytest.raises(ArtifactError, match="seed"):
        scaling.run(study(seed=1), 5, tmp_path / "s")


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("PUNA_SLOW"), reason="minutes long: set PUNA_SLOW=1")
def test_a_real_study_predicts_a_larger_run(tmp_path):
    """On the text that every machine with Python has; `benchmarks/scaling_study.py` is the same, longer.

    A fifth of this compute holds no more than models 16 and 48 wide, which lie off the law that larger ones follow.
    """
    whole = Study(flops=1e13, grid=GridConfig(budgets=3, factor=2.0))
    fit = scaling.run(whole, 60, tmp_path / "s")
    found = json.loads(fit.file("fit.json").read_text())
    (run,) = found["errors"]["predicted"]
    assert abs(run["error"]) < 0.03
    assert run["predicted"]["low"] <= run["loss"] <= run["predicted"]["high"]
