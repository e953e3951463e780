"""Closed forms: published optima, limits, and agreement with looking for the optimum by hand."""

import math

import pytest

from puna.planner.expected import (
    daly_effective_time,
    daly_interval_s,
    expected,
    expected_effective_time,
    young_interval_s,
)
from puna.planner.failures import LLAMA3, LLAMA3_PLANNED
from puna.planner.scenario import LLAMA3_STEP_S, Scenario, llama3


def test_the_published_counts_add_up_and_give_the_known_rates():
    assert LLAMA3.count == 419
    assert LLAMA3.per_gpu_hour == pytest.approx(1.97e-5, rel=0.005)
    assert LLAMA3.between_s(16_384) / 3600 == pytest.approx(3.09, abs=0.005)
    assert sum(cause.count for cause in LLAMA3.causes if "GPU" in cause.name) == 148 + 72 + 19 + 17 + 6


@pytest.mark.parametrize(("stall", "minutes", "steps"), [(60, 19.3, 185), (5, 5.6, 53), (2, 3.5, 33)])
def test_youngs_interval_for_all_of_llama3s_interruptions(stall, minutes, steps):
    between = 54 * 86_400 / (419 + LLAMA3_PLANNED)
    best = young_interval_s(stall, between)
    assert best / 60 == pytest.approx(minutes, rel=0.06)
    assert best / LLAMA3_STEP_S == pytest.approx(steps, rel=0.06)


@pytest.mark.parametrize(("stall", "between"), [(1, 10_000), (60, 10_000), (600, 10_000), (3000, 10_000)])
def test_dalys_interval_is_where_his_formula_is_largest(stall, between):
    best = daly_interval_s(stall, between)
    tried = [daly_effective_time(best * (0.5 + i / 100), stall, 300, between) for i in range(150)]
    assert daly_effective_time(best, stall, 300, between) == pytest.approx(max(tried), rel=2e-4)


def test_without_faults_only_saves_cost():
    assert daly_effective_time(100, 1, 1000, math.inf) == pytest.approx(100 / 101)
    calm = Scenario(failure_factor=0.0)
    assert 0.98 < expected(calm) < 1


def test_expected_time_falls_with_each_thing_that_costs():
    usual = {
        "step_s": 6.22, "save_every_steps": 100, "save_stall_s": 2, "between_faults_s": 11_000, "detect_s": 30,
        "restart_s": 300, "save_write_s": 30, "between_planned_s": 99_000, "planned_s": 300,
    }  # fmt: skip
    base = expected_effective_time(**usual)
    assert 0.9 < base < 0.95
    for name in ("save_stall_s", "detect_s", "restart_s", "save_write_s", "planned_s"):
        assert expected_effective_time(**{**usual, name: usual[name] * 2}) < base, name
    for name in ("between_faults_s", "between_planned_s"):
        assert expected_effective_time(**{**usual, name: usual[name] / 2}) < base, name


def test_llama3s_run_is_expected_above_nine_tenths():
    assert expected(llama3()) > 0.9
