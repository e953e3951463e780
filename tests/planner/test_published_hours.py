"""Hours of whole runs as published, beside plans for them: `benchmarks/published_hours.py`."""

from pathlib import Path

import published_hours as published
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()


@pytest.mark.parametrize("size", ["llama-1-7b", "llama-2-70b", "llama-3.1-405b"])
def test_the_hours_of_a_pretraining_run_are_near_its_plan(size):
    row = published.compared(next(run for run in published.RUNS if run.size == size))
    assert row["alone"] and published.good(row), row
    assert published.table([row]).splitlines()[2] in PAGE


def test_hours_far_from_a_plan_would_be_noticed():
    row = {"alone": True, "ratio": 1.5}
    assert not published.good(row) and not published.good(row | {"ratio": 0.85})
    assert published.good(row | {"ratio": 1.1})
