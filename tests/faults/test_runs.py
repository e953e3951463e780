"""Runs of four real processes under the supervisor: whatever happens, they end with the undisturbed run's bits.

The first test puts the faults that can be planned into one run; the others, which need a run each, are slow.
"""

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from faults_world import SETTINGS, same_weights, started

from puna.planner.policies import EvictionPolicy, SpikePolicy, StragglerPolicy
from puna.train.resilience import home, inject, ledger, nodes

slow = pytest.mark.skipif(not os.environ.get("PUNA_SLOW"), reason="a run of its own: PUNA_SLOW=1")


def faults(out: Path) -> list[dict]:
    return [event for event in ledger.read(out) if event["event"] == "fault"]


def test_killed_crashed_stopped_stuck_and_given_wrong_numbers_a_run_ends_with_the_same_bits(undisturbed, tmp_path):
    plan = [
        {"kind": "kill", "step": 5, "rank": 2},
        {"kind": "nan", "step": 9, "rank": 1},
        {"kind": "raise", "step": 13, "rank": 1},
        {"kind": "stop", "step": 22, "rank": 0},
        {"kind": "abort", "step": 27, "rank": 3},
        {"kind": "slow", "step": 31, "rank": 2, "seconds": 0.06, "steps": 13},
        {"kind": "flip", "step": 33, "rank": 3},
        {"kind": "hang", "step": 45, "rank": 2},
        {"kind": "flip", "step": 59, "rank": 1},
    ]
    settings = replace(SETTINGS, straggler=StragglerPolicy(window=8, least=6, ratio=2.5))
    status, said = started(tmp_path, plan, settings=settings).finish()
    assert status == 0, said
    assert same_weights(undisturbed, tmp_path)
    found = faults(tmp_path)
    slow = [event["rank"] for event in ledger.read(tmp_path) if event["event"] == "slow"]
    assert slow and set(slow) == {2}
    assert [(f["kind"], f["rank"]) for f in found] == [
        ("killed", 2), ("crash", 1), ("hang", 0), ("abort", 3), ("corruption", 3), ("hang", 2), ("corruption", 1),
    ]  # fmt: skip
    assert "on purpose" in found[1]["why"] and "state T" in found[2]["why"] and "in hang" in found[5]["why"]
    accused = [event["rank"] for event in ledger.read(tmp_path) if event["event"] == "accused"]
    assert accused == [3, 1]
    assert [e["step"] for e in ledger.read(tmp_path) if e["event"] == "transient"] == [9, 33, 59]
    restored = [event["step"] for event in ledger.read(tmp_path) if event["event"] == "restored"][1:]
    planned = [p["step"] for p in plan if p["kind"] in ("kill", "raise", "stop", "abort", "hang")]
    assert all(step - 1 <= back <= step for step, back in zip(planned, restored))
    book = ledger.account(ledger.read(tmp_path))
    events = ledger.read(tmp_path)
    assert sum(book.seconds().values()) == pytest.approx(events[-1]["at"] - events[0]["at"], abs=1e-2)
    assert all(fault.lost_steps <= 1 for fault in book.faults if fault.kind != "corruption")


def test_gradients_that_are_wrong_before_the_sum_are_found_and_named_and_their_node_is_left_out(undisturbed, tmp_path):
    """Every tenth step is computed twice. Rank 2 is wrong once, in such a step; then rank 3 on node b, for good."""
    settings = replace(SETTINGS, recompute_every_steps=10, eviction=EvictionPolicy(points=6, most_share=0.4))
    plan = [
        {"kind": "wrong", "step": 19, "rank": 2},
        {"kind": "wrong", "step": 33, "rank": 3, "node": "b", "times": 10**6},
    ]
    run = started(tmp_path, plan, settings=settings, nodes=["a", "b", "c"], per_node=2)
    status, said = run.finish()
    assert status == 0, said
    assert same_weights(undisturbed, tmp_path)
    events = ledger.read(tmp_path)
    found = [(e["kind"], e["rank"], e["step"]) for e in faults(tmp_path)]
    assert found == [("corruption", 2, 19), ("corruption", 3, 39), ("crash", 3, 39)]
    assert [(e["rank"], e["node"]) for e in events if e["event"] == "accused"] == [(2, "b"), (3, "b")]
    assert [e["nodes"] for e in events if e["event"] == "attempt"] == [["a", "b"], ["a", "c"]]
    assert [e["step"] for e in events if e["event"] == "rolled_back"] == [10]
    assert [e["step"] for e in events if e["event"] == "restored"][1:] == [30]


def test_an_error_of_the_user_is_not_tried_again(tmp_path):
    status, said = started(tmp_path, target="faults_world:complain", processes=2).finish()
    assert status == 65
    assert (
        said.count("the data is not there") == 1 and "hint: give data that exists" in said and "Traceback" not in said
    )


@slow
@pytest.mark.parametrize("attempt", range(3))
def test_asked_to_end_in_the_middle_of_a_step_it_saves_and_goes_on_later(undisturbed, tmp_path, attempt):
    run = started(tmp_path, pause_s=0.2)
    run.await_step(7 + attempt)
    time.sleep(0.07 * attempt)
    asked = time.monotonic()
    run.process.send_signal(signal.SIGTERM if attempt else signal.SIGINT)
    assert run.finish()[0] == 143
    assert time.monotonic() - asked < 10
    step = run.step()
    state = sorted((tmp_path / "work").glob("state-*/state.json"))[-1].parent.name
    assert int(state.split("-")[2]) >= step >= 7
    assert started(tmp_path).finish()[0] == 0
    assert same_weights(undisturbed, tmp_path)


@slow
def test_asked_to_end_while_it_waits_before_a_restart_it_ends_at_once(tmp_path):
    plan = [{"kind": "raise", "step": 5, "rank": 1} for _ in range(12)]
    settings = replace(SETTINGS, restart=replace(SETTINGS.restart, first_wait_s=250.0))
    run = started(tmp_path, plan, settings=settings)
    deadline = time.monotonic() + 200
    while "waiting 250 s" not in run.said() and time.monotonic() < deadline:
        time.sleep(0.05)
    run.process.send_signal(signal.SIGTERM)
    assert run.finish(100)[0] == 143
    assert ledger.read(tmp_path)[-1]["why"] == "asked to"


@slow
def test_asked_to_end_by_a_signal_to_its_supervisor_it_saves_and_goes_on_later(undisturbed, tmp_path):
    run = started(tmp_path, pause_s=0.1)
    run.await_step(7)
    os.kill(next(e["pid"] for e in ledger.read(tmp_path) if e["event"] == "begin"), signal.SIGTERM)
    assert run.finish()[0] == 143 and list((tmp_path / "work").glob("state-*/state.json"))
    assert started(tmp_path).finish()[0] == 0
    assert same_weights(undisturbed, tmp_path)


@slow
def test_no_file_can_grow_and_the_run_goes_on(undisturbed, tmp_path):
    """Neither states nor the ledger nor anything in memory, over a save. A rank is killed meanwhile: back to before."""
    plan = [{"kind": "full", "step": 34, "rank": 0, "steps": 15}, {"kind": "kill", "step": 43, "rank": 2}]
    status, said = started(tmp_path, plan).finish()
    assert status == 0, said
    assert same_weights(undisturbed, tmp_path)
    events = ledger.read(tmp_path)
    assert [f["kind"] for f in faults(tmp_path)] == ["killed"]
    assert 32 <= [e["step"] for e in events if e["event"] == "restored"][-1] <= 35


@slow
def test_a_killed_supervisor_is_replaced_and_the_ranks_go_on(undisturbed, tmp_path):
    run = started(tmp_path, pause_s=0.05)
    run.await_step(10)
    supervisor = next(e["pid"] for e in ledger.read(tmp_path) if e["event"] == "begin")
    os.kill(supervisor, signal.SIGKILL)
    status, said = run.finish()
    assert status == 0, said
    assert same_weights(undisturbed, tmp_path)
    assert faults(tmp_path) == [] and "takes over 4 ranks" in said
    assert [e["attempt"] for e in ledger.read(tmp_path) if e["event"] == "attempt"] == [0]


@slow
@pytest.mark.parametrize("moment", ["begin", "attempt", "fault"])
def test_a_supervisor_killed_while_it_starts_ranks_leaves_none_behind(undisturbed, tmp_path, moment):
    run = started(tmp_path, [{"kind": "kill", "step": 9, "rank": 1}], pause_s=0.03)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        events = ledger.read(tmp_path) if (tmp_path / ledger.LEDGER).is_file() else []
        if any(event["event"] == moment for event in events):
            break
    os.kill(next(event["pid"] for event in events if event["event"] == "begin"), signal.SIGKILL)
    status, said = run.finish()
    assert status == 0, said
    assert same_weights(undisturbed, tmp_path)
    attempts = [event["attempt"] for event in ledger.read(tmp_path) if event["event"] == "attempt"]
    assert len(set(attempts)) == len(attempts) or moment == "begin"  # no two sets of ranks meet at one place


@slow
def test_a_killed_launcher_takes_all_along_and_the_same_command_goes_on_from_memory(undisturbed, tmp_path):
    run = started(tmp_path, pause_s=0.05)
    run.await_step(27)
    run.process.kill()
    run.finish()
    time.sleep(1)
    again = started(tmp_path)
    status, said = again.finish()
    assert status == 0, said
    assert same_weights(undisturbed, tmp_path)
    restored = [e for e in ledger.read(tmp_path) if e["event"] == "restored"][-1]
    assert restored["tier"] == "memory" and restored["step"] >= 27


@slow
def test_a_killed_zygote_is_replaced(undisturbed, tmp_path):
    run = started(tmp_path, pause_s=0.05)
    run.await_step(10)
    for process in Path("/proc").glob("[0-9]*"):
        line = (process / "cmdline").read_bytes() if (process / "cmdline").exists() else b""
        parent = (process / "stat").read_text().rsplit(")", 1)[1].split()[1] if line else ""
        if b"resilience.zygote" in line and parent == str(run.process.pid):
            os.kill(int(process.name), signal.SIGKILL)
    status, said = run.finish()
    assert status == 0, said
    assert same_weights(undisturbed, tmp_path) and [f["kind"] for f in faults(tmp_path)] == ["zygote"]


@slow
def test_a_node_that_is_wanted_for_maintenance_is_left_for_a_spare(undisturbed, tmp_path):
    run = started(tmp_path, pause_s=0.05, nodes=["a", "b", "c"], per_node=2)
    run.await_step(10)
    (tmp_path / "work" / "drain").mkdir()
    (tmp_path / "work" / "drain" / "b").touch()
    status, said = run.finish()
    assert status == 0, said
    assert same_weights(undisturbed, tmp_path)
    assert [e["nodes"] for e in ledger.read(tmp_path) if e["event"] == "attempt"] == [["a", "b"], ["a", "c"]]


@slow
def test_a_node_with_a_history_is_left_out(undisturbed, tmp_path):
    settings = replace(SETTINGS, eviction=EvictionPolicy(points=2, most_share=0.4))
    plan = [{"kind": "kill", "step": step, "rank": 2} for step in (5, 9)]
    status, said = started(tmp_path, plan, settings=settings, nodes=["a", "b", "c"], per_node=2).finish()
    assert status == 0, said
    assert same_weights(undisturbed, tmp_path)
    used = [e["nodes"] for e in ledger.read(tmp_path) if e["event"] == "attempt"]
    assert used == [["a", "b"], ["a", "b"], ["a", "c"]]
    assert [kind for _, kind in nodes.histories(tmp_path)["b"]] == ["killed", "killed"]


@slow
def test_a_lost_nodes_part_of_a_run_is_found_in_its_neighbours_memory(undisturbed, tmp_path):
    """Each rank has a part that nobody else has. Node b is gone, and its memory with it; a has a copy, and c takes over."""
    run = started(tmp_path, pause_s=0.02, nodes=["a", "b"], per_node=2, alone=True)
    run.await_step(25)
    run.process.kill()
    run.finish()
    root = home.open_root(home.run_id(tmp_path), tmp_path)
    shutil.rmtree(root / "b")
    again = started(tmp_path, nodes=["a", "c"], per_node=2, alone=True)
    assert again.finish()[0] == 0, again.said()
    assert same_weights(undisturbed, tmp_path)
    restored = [e for e in ledger.read(tmp_path) if e["event"] == "restored"][-1]
    assert restored["tier"] == "memory" and restored["step"] >= 24


@slow
def test_bad_data_is_skipped_then_rolled_back_past_then_the_rate_is_lowered(tmp_path):
    settings = replace(SETTINGS, spikes=SpikePolicy(skips=1, roll_backs=1, lowerings=1, back_steps=5))
    plan = [{"kind": "nan", "step": step, "rank": 0, "stays": True} for step in (30, 31)]
    status, said = started(tmp_path, plan, settings=settings).finish()
    assert status == 1 or status == 65, said
    actions = [e["action"] for e in ledger.read(tmp_path) if e["event"] == "verdict"]
    assert [a for a in actions if a != "again"] == [
        "skip", "roll_back", "skip", "lower_rate", "skip", "roll_back", "skip", "stop",
    ]  # fmt: skip
    assert "the loss is nan" in said


@slow
def test_damaged_memory_is_not_used(undisturbed, tmp_path):
    import random

    run = started(tmp_path, pause_s=0.05)
    run.await_step(26)
    run.process.kill()
    run.finish()
    time.sleep(1)
    for path in home.open_root(home.run_id(tmp_path), tmp_path).glob("*/part-*/slot-*.safetensors"):
        inject.flip_file_bit(path, random.Random(1))
    status, said = started(tmp_path).finish()
    assert status == 0 and "memory is damaged" in said
    assert same_weights(undisturbed, tmp_path)
    assert [e for e in ledger.read(tmp_path) if e["event"] == "restored"][-1]["tier"] == "disk"


@slow
def test_a_run_that_always_fails_at_the_same_step_stops_and_says_so(tmp_path):
    plan = [{"kind": "raise", "step": 5, "rank": 1} for _ in range(12)]
    settings = replace(SETTINGS, restart=replace(SETTINGS.restart, without_progress=2))
    status, said = started(tmp_path, plan, settings=settings).finish()
    assert status == 1 and "did not bring the run past step 5" in said and "on purpose" in said
