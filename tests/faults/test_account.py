"""Small parts: the account of a run's time adds up, comparisons name the right rank, the watch the one that hangs."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from puna.errors import ArtifactError
from puna.planner.policies import DetectPolicy, EvictionPolicy
from puna.train.journal import Journal
from puna.train.resilience import goodput, inject, ledger, nodes
from puna.train.resilience.board import Board, Pulse
from puna.train.resilience.replicas import Comparison, Trial, earliest, outliers
from puna.train.resilience.watch import Watch, innermost


def event(at, name, **values):
    return {"at": at, "event": name, **values}


STORY = [
    event(100, "begin"),
    event(104, "attempt"),
    event(105, "restored", step=0),
    event(106, "step", step=1),
    event(107, "step", step=2, saving=0.25),
    event(108, "step", step=3),
    event(109, "fault", kind="killed", rank=1, since=108.5, why="SIGKILL"),
    event(109.5, "attempt"),
    event(110, "restored", step=2),
    event(111, "step", step=3),
    event(113, "evaluated"),
    event(114, "step", step=4, made=False),
    event(114.5, "end"),
    event(120, "begin"),
    event(121, "restored", step=4),
    event(122, "step", step=5),
]


def test_every_second_is_accounted_for_once():
    seconds = ledger.account(STORY).seconds()
    assert sum(seconds.values()) == 22
    assert seconds == {
        "training": 1 + 0.75 + 1 + 1,  # steps 1, 2, 3 (the second time) and 5
        "saving": 0.25 + 0.5,  # a copy, and the end
        "checking": 0, "evaluating": 2, "bad data": 1,
        "repeated": 1 + 0.5,  # step 3 the first time, and the step that was broken off
        "detecting": 0.5, "restarting": 1, "starting": 5 + 1, "down": 5.5,
    }  # fmt: skip


def test_a_fault_costs_detection_restart_and_what_is_made_again():
    (fault,) = ledger.account(STORY).faults
    assert (fault.kind, fault.rank, fault.lost_steps) == ("killed", 1, 1)
    assert (fault.detecting_s, fault.restarting_s, fault.repeated_s, fault.cost_s) == (0.5, 1, 1.5, 3)


def test_goodput_leaves_out_the_time_between_two_commands():
    book = ledger.account(STORY)
    assert book.goodput == pytest.approx(3.75 / 16.5)
    assert "goodput 22.7%" in ledger.table(book) and "<svg" in goodput.svg(book)


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    book = ledger.Ledger(tmp_path)
    book.write("begin")
    book.write("step", step=1)
    path = tmp_path / ledger.LEDGER
    path.write_bytes(path.read_bytes() + b'{"at": "x", "event": "step"}\n{"at": 17')
    assert [e["event"] for e in ledger.read(tmp_path)] == ["begin", "step"]


def test_the_verb_says_what_a_folder_without_a_ledger_is(tmp_path, capsys):
    from puna.cli import main

    assert main(["goodput", str(tmp_path)]) == ArtifactError.exit_code
    assert "ledger.jsonl" in capsys.readouterr().err
    (tmp_path / ledger.LEDGER).write_bytes(b'{"at": 17')
    assert main(["goodput", str(tmp_path)]) == ArtifactError.exit_code
    assert "no whole line yet" in capsys.readouterr().err and not (tmp_path / goodput.NAME).exists()


def test_a_runs_page_shows_its_curves_and_each_fault(tmp_path, capsys):
    from puna.cli import main

    assert main(["watch", str(tmp_path)]) == ArtifactError.exit_code
    assert "neither metrics.jsonl nor ledger.jsonl" in capsys.readouterr().err
    lines = [json.dumps({"step": i, "loss": 3.0 - i, "grad_norm": float("nan"), "lr": 0.5}) for i in range(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "lo')
    (tmp_path / ledger.LEDGER).write_text("".join(json.dumps(e) + "\n" for e in STORY) + '{"at": 12')
    assert main(["watch", str(tmp_path), "--once"]) == 0
    page = (tmp_path / "watch.html").read_text()
    assert "loss 1<" in page and "learning rate 0.5<" in page and "gradient norm" not in page
    assert "step 2, loss 1.0000, 1 faults" in page and "SIGKILL" in page and "goodput 22.7%" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")


def test_the_majority_says_who_is_wrong():
    assert outliers(["a", "a", "a"]) == []
    assert outliers(["a", "b", "a", "a"]) == [1]
    assert outliers(["a", "b"]) is None and outliers(["a", "a", "b", "b"]) is None
    assert Comparison(key=(0, 5), hashes=["a", "x", "a", "y", "a", "x"], parts=[0, 1, 0, 1, 0, 1]).wrong() == [3]


def test_of_two_replicas_the_one_that_comes_out_differently_first_was_wrong():
    ranks = [Trial(), Trial()]
    for step in range(1, 6):  # rank 1 is wrong at step 3; from step 4 on its number is in both
        for rank, trial in enumerate(ranks):
            trial.note(step, f"{step}" + ("wrong" if step > 3 or (step == 3 and rank == 1) else ""))
    for trial in ranks:
        trial.begin(5)
        for step in range(1, 6):
            trial.note(step, f"{step}")
    assert earliest([trial.first_difference() for trial in ranks]) == [1]


@contextlib.contextmanager
def full_disk(most_bytes):
    """No file grows beyond so many bytes."""
    inject.limit_files(most_bytes)
    try:
        yield
    finally:
        inject.limit_files(resource.RLIM_INFINITY)


def test_events_wait_while_the_disk_is_full(tmp_path):
    book = ledger.Ledger(tmp_path)
    book.write("begin")
    with full_disk((tmp_path / ledger.LEDGER).stat().st_size + 10):  # the next line is cut short
        for step in range(3):
            book.write("step", step=step)
    book.write("end")
    found = [(event["event"], event.get("step")) for event in ledger.read(tmp_path)]
    assert found == [("begin", None), ("step", 0), ("step", 1), ("step", 2), ("end", None)]


def test_threads_share_a_ledger(tmp_path):
    book, before = ledger.Ledger(tmp_path), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda step: book.write("step", step=step), range(2000)))
    finally:
        sys.setswitchinterval(before)
    assert sorted(event["step"] for event in ledger.read(tmp_path)) == list(range(2000))


def test_lines_of_a_journal_wait_while_the_disk_is_full_and_can_be_cut_meanwhile(tmp_path):
    journal = Journal(tmp_path / "lines")
    journal.add(b"one")
    assert journal.flush() == 4
    with full_disk(6):
        journal.add(b"two")
        assert journal.flush() == 8 and (tmp_path / "lines").read_bytes() == b"one\ntw"
        journal.add(b"three")
        assert journal.read() == b"one\ntwo\nthree\n"
        journal.cut(8)
    journal.add(b"four")
    assert journal.flush() == 13 and (tmp_path / "lines").read_bytes() == b"one\ntwo\nfour\n"
    journal.cut(4)
    journal.close()
    (tmp_path / "lines").write_bytes(b"one\ntw")  # the rest died with the process that could not write it
    journal = Journal(tmp_path / "lines")
    journal.cut(13)
    assert journal.read() == b"one\n"


def test_a_line_of_the_board_is_never_seen_half_written(tmp_path):
    """A reader that saw a line without its time would take a healthy rank for one that hangs."""
    script = """
import sys
from pathlib import Path
from puna.train.resilience.board import Board, Pulse
pulse = Pulse(Board(Path(sys.argv[1]), 2), 1, attempt=3, every_s=60.0)
print("ready", flush=True)
while True:
    pulse.beat(7, "backward")
"""
    command = [sys.executable, "-c", script, str(tmp_path / "board")]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    try:
        assert writer.stdout.readline() == b"ready\n"
        board, begun = Board(tmp_path / "board", 2), time.monotonic()
        while board.read(1).step < 0:
            time.sleep(0.01)
        for _ in range(50_000):
            line = board.read(1)
            assert (line.pid, line.attempt, line.step, line.phase) == (writer.pid, 3, 7, "backward")
            assert line.beat.alive_s > begun - 60 and line.beat.progress_s > begun - 60
    finally:
        writer.kill()
        writer.wait()


def test_the_watch_names_who_is_stuck_and_where(tmp_path):
    script = """
import sys, time
from pathlib import Path
from puna.train.resilience import signals
from puna.train.resilience.board import Board, Pulse
signals.keep_stacks(Path(sys.argv[1]), 1)
pulse = Pulse(Board(Path(sys.argv[1]) / "board", 2), 1, attempt=0, every_s=0.1)
pulse.beat(7, "backward")
def lost_in_thought():
    time.sleep(60)
lost_in_thought()
"""
    board = Board(tmp_path / "board", 2)
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    try:
        while board.read(1).phase != "backward":
            time.sleep(0.02)
        mine = Pulse(board, 0, attempt=0, every_s=0.1)
        mine.beat(7, "backward")
        mine.beat(7, "reduce")
        policy = DetectPolicy(beat_every_s=0.1, beat_timeout_s=30, step_budget_s=0.5)
        watch, found = Watch(board, policy, tmp_path), []
        deadline = time.monotonic() + 30
        while not found and time.monotonic() < deadline:
            time.sleep(0.05)
            found = watch.tick({0: os.getpid(), 1: child.pid})
        mine.end()
    finally:
        child.kill()
        child.wait()
    (finding,) = found
    assert (finding.rank, finding.kind, finding.step, finding.phase) == (1, "stuck", 7, "backward")
    assert "lost_in_thought" in finding.where and "rank 1 makes no progress" in str(finding)


def test_the_innermost_line_of_the_main_thread_is_told():
    text = 'Thread 0x1 (most recent call first):\n  File "a.py", line 1 in f\n\nCurrent thread 0x2:\n  File "b.py", line 2 in g\n  File "b.py", line 3 in h\n'
    assert innermost(text) == 'File "b.py", line 2 in g' and innermost("") == ""


def test_nodes_with_a_history_are_left_out_while_there_are_others(tmp_path):
    for _ in range(3):
        nodes.note(tmp_path, "b", "killed")
    policy = EvictionPolicy(points=3, most_share=0.5)
    assert nodes.chosen(tmp_path, ["a", "b", "c"], 2, policy) == (["a", "c"], ["b"])
    assert nodes.chosen(tmp_path, ["a", "b"], 2, policy) == (["a", "b"], [])
