"""Bytes that our trainer's own processes hold, beside the planner's: `benchmarks/memory.py` with fewer layouts."""

import os

import memory as benchmark
import pytest


def check(worlds: set[int]) -> None:
    rows = benchmark.compared([layout for layout in benchmark.LAYOUTS if layout.world in worlds])
    assert rows
    bad = [row for row in rows if not benchmark.good(row)]
    assert not bad, benchmark.table(bad)


@pytest.mark.slow
def test_two_processes_hold_what_is_planned():
    check({2})


def test_what_recomputation_leaves_alive_is_what_is_planned():
    row = next(r for r in benchmark.compared_recomputing(("full",)))
    assert benchmark.good(row), row


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("PUNA_SLOW"), reason="three steps of a trainer: PUNA_SLOW=1")
def test_each_way_to_recompute_leaves_alive_what_is_planned():
    rows = benchmark.compared_recomputing()
    assert len(rows) == 3 and all(map(benchmark.good, rows)), benchmark.recompute_table(rows)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("PUNA_SLOW"), reason="a minute of processes: PUNA_SLOW=1")
def test_one_four_and_eight_processes_hold_what_is_planned():
    check({1, 4, 8})


def test_a_wrong_formula_would_be_noticed():
    row = {
        "layout": "x",
        "world": 2,
        **{k: {"off": 0.0} for k in ("parameters", "gradients", "optimizer", "activations")},
    }
    assert benchmark.good(row)
    assert not benchmark.good(row | {"gradients": {"off": 0.04}})
    assert not benchmark.good(row | {"activations": {"off": -0.11}})
    mode = {"recompute": "full", "kept": {"off": 0.0}, "peak": {"off": 0.0}}
    assert benchmark.good(mode)
    assert not benchmark.good(mode | {"peak": {"off": -0.11}})
