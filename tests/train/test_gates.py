"""Gates between phases and what they measure: short contexts recover, needles are found, or the phase goes on."""

import json
import math
from dataclasses import replace

import pytest
import torch
from train_world import TOY

from puna.errors import ConfigError, PunaError
from puna.train import evaluations, loop
from puna.train import guard as guarding
from puna.train.downstream import Choices
from puna.train.guard import PlainGuard
from puna.train.objectives.lm import ANSWER, KEY, LmObjective
from puna.train.phases import Gate, Phase, Position
from puna.train.schedule import Schedule
from puna.train.settings import TrainConfig

PHASES = (
    Phase(name="short", tokens=512, sequence_length=32, rows=4),
    Phase(name="long", tokens=512, sequence_length=64, rows=2, gate=Gate(needles=3, extra_tokens=256, most_times=2)),
    Phase(name="anneal", tokens=256, sequence_length=64, rows=2, anneal=True),
)
RUN = TrainConfig(
    lm=LmObjective(phases=PHASES, validation_rows=4),
    model=TOY,
    schedule=Schedule(peak=3e-3, warmup_tokens=128),
    save_every_steps=1,
    validate_every_steps=100,
    threads=1,
)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def run(world, out, config=RUN):
    return loop.train(config, world.tokens, world.tokenizer, None, out=out)


def opening_after(monkeypatch, failures: int) -> None:
    """Needles are found in the long phase once the gate has prolonged it so often."""
    monkeypatch.setattr(evaluations, "needles_found", lambda run, count: float(run.position.prolonged >= failures))


GENEROUS = replace(RUN, lm=replace(RUN.lm, phases=(PHASES[0], replace(PHASES[1], gate=Gate(needles=3, recovered=9.0, extra_tokens=256, most_times=2)), PHASES[2])))  # fmt: skip


def test_a_gate_that_never_opens_ends_the_run_with_what_is_missing(world, tmp_path):
    with pytest.raises(PunaError, match=r"failed its gate 3 times: .*0% of the needles were found, 100% are wanted"):
        run(world, tmp_path / "closed", GENEROUS)
    found = lines(tmp_path / "closed")
    assert len(found) == 4 + 4 + 2 + 2 - 1, "the step before the last gate has not got its line"
    assert [line["prolonged"] for line in found if "prolonged" in line] == [1, 2]


def test_a_phase_goes_on_until_its_gate_opens_and_holds_its_rate_meanwhile(world, tmp_path, monkeypatch):
    opening_after(monkeypatch, 2)
    done = run(world, tmp_path / "opened", GENEROUS)
    found = lines(done.path)
    assert len(found) == 4 + 4 + 2 + 2 + 2
    assert [line["needles"] for line in found if "needles" in line] == [0, 0, 1]
    assert "short_loss" in found[3], "what is to be recovered is measured before the first gate"
    rates = [line["lr"] for line in found]
    assert rates[8] == rates[9] == rates[11] and rates[12] <= rates[11]
    assert json.loads(done.file("samples.json").read_text())["samples"] == 4 * 4 + 10 * 2


class Stopping(PlainGuard):
    def after_step(self, run):
        super().after_step(run)
        raise KeyboardInterrupt


def test_stopped_after_every_step_gates_judge_the_same(world, tmp_path, monkeypatch):
    opening_after(monkeypatch, 1)
    whole = run(world, tmp_path / "whole", GENEROUS)
    with monkeypatch.context() as patch:
        patch.setattr(guarding, "PlainGuard", Stopping)
        for _ in range(12):
            with pytest.raises(KeyboardInterrupt):
                run(world, tmp_path / "stopped", GENEROUS)
    again = run(world, tmp_path / "stopped", GENEROUS)
    assert again.digest == whole.digest
    assert [line.get("needles") for line in lines(again.path)] == [line.get("needles") for line in lines(whole.path)]


def test_a_loss_that_has_not_recovered_keeps_the_gate_closed():
    gate = Gate(recovered=1.01)
    assert evaluations._failures(gate, {"short_loss": 2.02, "needles": 1.0}, 2.0) == ""
    assert "2.0300, at most 2.0200" in evaluations._failures(gate, {"short_loss": 2.03, "needles": 1.0}, 2.0)


class Reader:
    """A placement that has read its rows: it knows a needle if it lies within the last `far` tokens."""

    def __init__(self, far: int):
        self.far = far

    def validate(self, data, rows):
        [row] = rows
        tokens = torch.cat((row.tokens[0], row.targets[0, -1:])).tolist()
        key, answer = tokens[-KEY - ANSWER : -ANSWER], tokens[-ANSWER:]
        places = [i for i in range(len(tokens) - 2 * KEY) if tokens[i : i + KEY] == key]
        assert places, "the key stands in the hay"
        assert tokens[places[0] + KEY : places[0] + KEY + ANSWER] == answer
        assert row.weight == ANSWER and row.weights[0, -ANSWER:].all()
        chance = 0.99 if places[0] >= len(tokens) - self.far else 0.4
        return -math.log(chance) / ANSWER


@pytest.mark.parametrize("far, expected", [(128, 1.0), (64, 0.5), (8, 0.0)])
def test_needles_lie_at_every_depth_and_are_found_by_who_reads_far_enough(world, far, expected):
    phase = Phase(tokens=128, sequence_length=128, rows=1, gate=Gate())
    data = LmObjective(phases=(phase,)).data([world.tokens], world.tokenizer.path, 0)

    class Run:
        placement, position = Reader(far), Position()

    Run.data = data
    assert abs(evaluations.needles_found(Run, 10) - expected) <= 0.1
    shapes = {row.shape for row in data.needles(Position(), 10)}
    assert shapes == {(1, 128)}


def test_gates_need_room_and_text(world):
    with pytest.raises(ConfigError, match="too short for needles"):
        Phase(tokens=64, sequence_length=32, rows=1, gate=Gate())
    huge = Phase(tokens=64, sequence_length=8192, rows=1, gate=Gate())
    with pytest.raises(PunaError, match="8192"):
        LmObjective(phases=(huge,)).data([world.tokens], world.tokenizer.path, 0)


def test_choices_are_scored_per_byte_and_a_tie_is_wrong(world, tmp_path):
    path = tmp_path / "items.jsonl"
    items = [
        {"context": "The ox", "options": [" has 3 legs.", " flies"], "answer": 0},
        {"context": "An ant", "options": [" is small", " is a very long word indeed"], "answer": 1},
        {"context": "A hen", "options": [" lays", " lays"], "answer": 0},
    ]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    choices = Choices(path, world.tokenizer.path, 64)

    class Shortest:
        """One nat for any option: the longest has the least per byte."""

        def validate(self, data, rows):
            assert rows[0].shape[1] % 16 == 0 and rows[0].weight > 0
            return 1 / rows[0].weight

    assert choices.score(Shortest(), None) == pytest.approx(2 / 3)


def test_choices_are_in_the_log(world, tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"context": "The ox", "options": [" has", " is"], "answer": 0}) + "\n")
    lm = LmObjective(sequence_length=32, rows=2, validation_rows=2, choices=path)
    done = run(world, tmp_path / "run", replace(RUN, lm=lm, steps=2))
    assert lines(done.path)[-1]["choices_right"] in (0, 1)
