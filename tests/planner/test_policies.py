"""Policies against faults: each decides by its numbers alone, the same way every time."""

import math
import random
import subprocess
import sys

import pytest

from puna import config
from puna.errors import ConfigError
from puna.planner.policies import (
    Beat,
    DetectPolicy,
    EvictionPolicy,
    RestartPolicy,
    RestartState,
    SavePolicy,
    SpikePolicy,
    SpikeState,
    StragglerPolicy,
)


def calm(policy: SpikePolicy, steps: int, seed: int = 0) -> SpikeState:
    """What the policy remembers of `steps` ordinary steps."""
    random.seed(seed)
    state = SpikeState()
    for step in range(steps):
        verdict, state = policy.judge(state, step, 3 + random.gauss(0, 0.05), math.exp(random.gauss(0, 0.1)))
        assert verdict.action == "go"
    return state


def actions(policy: SpikePolicy, state: SpikeState, steps: range, loss: float, norm: float = 1.0) -> list[str]:
    found = []
    for step in steps:
        verdict, state = policy.judge(state, step, loss, norm, repeated=True)
        found.append(verdict.action)
    return found


def test_policies_need_no_torch():
    script = "import sys, puna.planner.policies; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "False"


def test_states_are_saved_by_step_and_the_newest_are_kept():
    policy = SavePolicy(every_steps=10, memory_every_steps=2, kept=2)
    assert [s for s in range(1, 31) if policy.durable(s)] == [10, 20, 30]
    assert policy.in_memory(4) and not policy.in_memory(5)
    assert policy.superseded([10, 20, 30]) == [10]
    assert policy.superseded([10]) == []


def test_a_fault_loses_the_steps_since_the_nearest_save():
    policy = SavePolicy(every_steps=10, memory_every_steps=4)
    assert policy.lost_steps(27, memory_survives=True) == 3
    assert policy.lost_steps(21, memory_survives=True) == 1
    assert policy.lost_steps(27, memory_survives=False) == 7
    assert SavePolicy(every_steps=10, memory_every_steps=0).lost_steps(27, memory_survives=True) == 7


def test_youngs_interval_loses_less_than_its_neighbours():
    def lost_share(interval, stall=5.0, between=11_000.0):
        return stall / interval + interval / (2 * between)

    best = SavePolicy.best_interval_s(5.0, 11_000.0)
    assert lost_share(best) < min(lost_share(best * 0.9), lost_share(best * 1.1))


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (9.0, 1.0), (3.0, 50.0)])
def test_a_bad_step_is_computed_once_more_and_then_skipped(loss, norm):
    policy = SpikePolicy()
    state = calm(policy, 50)
    verdict, unchanged = policy.judge(state, 50, loss, norm)
    assert verdict.action == "again" and unchanged == state
    verdict, after = policy.judge(state, 50, loss, norm, repeated=True)
    assert verdict.action == "skip" and verdict.why and after.losses == state.losses


def test_a_step_that_is_good_the_second_time_was_the_machines_fault():
    policy = SpikePolicy()
    verdict, _ = policy.judge(calm(policy, 50), 50, 3.0, 1.0, repeated=True)
    assert verdict.action == "go"


def test_ordinary_noise_is_never_bad():
    calm(SpikePolicy(), 2000)


def test_a_high_first_loss_is_not_a_spike():
    state, policy = SpikeState(), SpikePolicy()
    for step in range(100):
        verdict, state = policy.judge(state, step, 11 * math.exp(-step / 30), 5 * math.exp(-step / 10))
        assert verdict.action == "go"


def test_measures_grow_from_skipping_to_stopping():
    policy = SpikePolicy(skips=1, roll_backs=1, lowerings=2)
    found = actions(policy, calm(policy, 50), range(50, 60), math.nan)
    assert found[:8] == ["skip", "roll_back", "skip", "lower_rate", "skip", "roll_back", "skip", "lower_rate"]
    assert actions(policy, calm(policy, 50), range(50, 62), math.nan)[-1] == "stop"


def test_a_roll_back_goes_before_the_first_bad_step():
    policy = SpikePolicy(skips=2, back_steps=20)
    state = calm(policy, 100)
    for step in (100, 105, 110):
        verdict, state = policy.judge(state, step, math.nan, 1.0, repeated=True)
    assert verdict.action == "roll_back" and verdict.to == 80


def test_lowering_multiplies_the_rate_and_is_remembered():
    policy = SpikePolicy(skips=0, roll_backs=0, lowerings=2, factor=0.5)
    state, rates = calm(policy, 50), []
    for step in (50, 51):
        verdict, state = policy.judge(state, step, math.inf, 1.0, repeated=True)
        rates.append(verdict.rate)
    assert rates == [0.5, 0.25]
    verdict, _ = policy.judge(state, 52, 3.0, 1.0)
    assert verdict.action == "go" and verdict.rate == 0.25


def test_old_faults_are_forgiven():
    policy = SpikePolicy(skips=1, calm_steps=20)
    state = calm(policy, 50)
    for step in range(50, 200):
        bad = step in (50, 100, 150)
        verdict, state = policy.judge(state, step, math.nan if bad else 3.0, 1.0, repeated=True)
        assert verdict.action == ("skip" if bad else "go")


def test_a_roll_back_is_forgiven_too():
    policy = SpikePolicy(skips=1, calm_steps=20, roll_backs=1)
    state = calm(policy, 50)
    for step in range(50, 400):
        bad = step % 100 in (50, 51)
        verdict, state = policy.judge(state, step, math.nan if bad else 3.0, 1.0, repeated=True)
        assert verdict.action == ("go" if not bad else "skip" if step % 100 == 50 else "roll_back"), step


def test_a_planned_change_of_data_is_no_spike():
    policy = SpikePolicy()
    state = policy.forget(calm(policy, 50))
    assert policy.judge(state, 50, 9.0, 4.0)[0].action == "go"


def test_what_a_policy_remembers_survives_json():
    state = calm(SpikePolicy(), 20)
    assert config.from_json(SpikeState, config.to_json(state)) == state


def test_a_silent_heart_is_named():
    policy = DetectPolicy(beat_timeout_s=1.5)
    beats = {rank: Beat(alive_s=100, progress_s=100, progress=7) for rank in range(4)}
    assert policy.suspect(101, beats) is None
    beats |= {rank: Beat(alive_s=101.4, progress_s=100, progress=7) for rank in (0, 1, 3)}
    found = policy.suspect(101.6, beats)
    assert found.ranks == (2,) and found.kind == "stopped"


def test_of_ranks_that_came_equally_far_the_one_that_does_not_wait_is_stuck():
    policy = DetectPolicy(step_budget_s=10)
    beats = {rank: Beat(alive_s=111, progress_s=100, progress=41, waiting=rank != 2) for rank in range(4)}
    assert policy.suspect(111, beats).ranks == (2,)
    beats[1] = Beat(alive_s=111, progress_s=100, progress=40, waiting=True)
    assert policy.suspect(111, beats).ranks == (2,)


def test_the_rank_that_is_farthest_behind_is_stuck_and_not_those_that_wait_for_it():
    policy = DetectPolicy(step_budget_s=10)
    beats = {rank: Beat(alive_s=111, progress_s=100, progress=41) for rank in range(4)}
    beats[3] = Beat(alive_s=111, progress_s=99.9, progress=40)
    assert policy.suspect(109, beats) is None
    found = policy.suspect(111, beats)
    assert found.ranks == (3,) and found.kind == "stuck"
    assert policy.suspect(111, beats, training=False) is None


def test_a_run_that_gets_ahead_is_restarted_at_once():
    policy, state = RestartPolicy(without_progress=2), RestartState()
    for fault in range(20):
        restart, state = policy.decide(state, fault * 30.0, step=fault)
        assert restart.go and restart.wait_s == 0


def test_a_run_that_fails_at_the_same_step_waits_longer_and_then_stops():
    policy, state, waits = RestartPolicy(without_progress=3, first_wait_s=1, growth=2), RestartState(), []
    for fault in range(5):
        restart, state = policy.decide(state, float(fault), step=7)
        waits.append(restart.wait_s if restart.go else None)
    assert waits == [0.0, 1.0, 2.0, 4.0, None]
    assert "step 7" in restart.why


def test_the_budget_of_restarts_is_within_a_time():
    policy = RestartPolicy(budget=2, per_s=100)
    state, goes = RestartState(), []
    for step, now in enumerate([0.0, 1.0, 2.0, 200.0]):
        restart, state = policy.decide(state, now, step)
        goes.append(restart.go)
    assert goes == [True, True, False, True]


def test_a_node_with_a_history_is_left_out_while_it_is_recent():
    policy = EvictionPolicy(points=3, window_s=1000, most_share=0.25)
    histories = {"a": [(0, "killed"), (10, "hang"), (20, "crash")], "b": [(20, "killed")], "c": [(20, "corruption")]}
    assert policy.left_out(histories, 100, nodes=8) == ["a", "c"]
    assert policy.left_out(histories, 100, nodes=4) == ["a"]  # not more than a quarter
    assert policy.left_out(histories, 1015, nodes=8) == ["c"]
    assert policy.left_out(histories, 5000, nodes=8) == []


@pytest.mark.parametrize("factor, found", [(1.1, []), (1.5, [2]), (2.0, [2])])
def test_a_slow_rank_is_told_from_noise(factor, found):
    random.seed(1)
    own = {rank: [random.uniform(0.9, 1.1) * (factor if rank == 2 else 1) for _ in range(40)] for rank in range(4)}
    assert StragglerPolicy(ratio=1.3).slow(own) == found


def test_nobody_is_slow_before_there_are_enough_steps():
    assert StragglerPolicy(least=8).slow({0: [1.0] * 7, 1: [9.0] * 7}) == []


def test_one_hiccup_does_not_make_a_straggler():
    own = {rank: [1.0] * 32 for rank in range(4)}
    own[1][5] = own[1][20] = 50.0
    assert StragglerPolicy().slow(own) == []


def test_rules_of_policies_are_checked():
    for wrong in (
        lambda: SavePolicy(every_steps=0),
        lambda: SpikePolicy(factor=0),
        lambda: DetectPolicy(beat_every_s=2.0, beat_timeout_s=1.5),
    ):
        with pytest.raises(ConfigError):
            wrong()
