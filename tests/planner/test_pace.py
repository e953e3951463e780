"""Jumping over steps gives what going through them one by one gives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.planner.pace import Day, Pace
from puna.planner.policies import SavePolicy


def one_by_one(pace: Pace, seconds: float) -> tuple[int, float]:
    """Steps done and seconds stalled, by asking the policy after every step."""
    clock, step, stalled = 0.0, pace.first, 0.0
    while clock + pace.step_s <= seconds + 1e-9:
        clock += pace.step_s
        step += 1
        stall = pace.save_stall_s * pace.saves.durable(step) + pace.memory_stall_s * pace.saves.in_memory(step)
        stalled += min(stall, max(0.0, seconds - clock))
        clock += stall
    return step, stalled


@given(
    first=st.integers(0, 200),
    every=st.integers(1, 40),
    memory=st.integers(0, 10),
    stall=st.floats(0, 5),
    copy=st.floats(0, 0.5),
    seconds=st.floats(0, 300),
)
def test_steps_and_stalls_are_those_of_asking_the_policy_after_every_step(first, every, memory, stall, copy, seconds):
    pace = Pace(first, 1.0, SavePolicy(every_steps=every, memory_every_steps=memory), stall, 0.0, copy)
    step, stalled = one_by_one(pace, seconds)
    assert pace.done(seconds) == step
    assert pace.stalled_s(seconds) == pytest.approx(stalled, abs=1e-6)


@given(first=st.integers(0, 99), steps=st.integers(0, 300), every=st.integers(1, 50), most=st.integers(1, 5))
def test_the_newest_durable_saves_are_those_the_policy_names(first, steps, every, most):
    policy = SavePolicy(every_steps=every)
    named = [step for step in range(first + 1, first + steps + 1) if policy.durable(step)]
    assert Pace(first, 1.0, policy, 0, 0, 0).newest_durable(first + steps, most) == named[-most:]


def test_a_disk_slower_than_the_interval_makes_training_wait():
    pace = Pace(0, 1.0, SavePolicy(every_steps=10, memory_every_steps=0), 2.0, 30.0, 0.0)
    assert pace.reached_s(101) == pytest.approx(101 + 10 * (2 + 20))


@given(depth=st.floats(0, 0.2), time=st.floats(0, 1e7))
def test_bent_time_is_straightened_again(depth, time):
    day = Day(depth)
    assert day.straight(day.bent(time)) == pytest.approx(time, abs=1e-3)


def test_a_whole_day_loses_half_the_depth_of_noon():
    assert Day(0.02).bent(86_400) == pytest.approx(86_400 * 0.99)
