"""Phases in tokens, samples by number: nothing comes twice, nothing is lost, whatever the world and the faults."""

import dataclasses
import itertools
import json
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from train_world import TOY

from puna import artifacts
from puna.errors import ConfigError, PunaError
from puna.model.checkpoint import load_model
from puna.model.llama import Llama
from puna.parallel.whole import Whole
from puna.train import guard as guarding
from puna.train import ledger, loop
from puna.train.data import Loader, micro_batches, share_of
from puna.train.guard import PlainGuard, Verdict
from puna.train.objectives.lm import LmObjective
from puna.train.phases import Phase, Position, check
from puna.train.schedule import Course, Schedule
from puna.train.settings import TrainConfig
from puna.train.sources import CYCLE, WINDOW, Deal, Source

GROWING = (
    Phase(name="small", tokens=600, sequence_length=16, rows=4),
    Phase(name="large", tokens=600, sequence_length=16, rows=8),
    Phase(name="long", tokens=900, sequence_length=32, rows=4),
    Phase(name="anneal", tokens=500, sequence_length=32, rows=4, anneal=True),
)
RUN = TrainConfig(
    lm=LmObjective(phases=GROWING, validation_rows=4),
    model=TOY,
    schedule=Schedule(peak=5e-3, warmup_tokens=200, averaged=2),
    save_every_steps=5,
    validate_every_steps=10,
    threads=1,
)


class Counted:
    """Shards whose tokens are their own places in the stream."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def samples(self, length: int) -> int:
        return max(0, self.tokens - 1) // length

    def sample(self, index: int, length: int):
        return np.arange(index * length, (index + 1) * length + 1), np.zeros(length + 1, np.int32)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def positions(config: TrainConfig) -> list[Position]:
    """Where the run stands before each of its steps."""
    found, at, data_cursors = [], Position(), {}
    while not at.finished(config.phases):
        found.append(replace(at))
        at.consume(config.phases[at.phase], at.samples)
        if at.phase_spent(config.phases):
            at.enter_next(data_cursors)
    return found


# --- numbers


@given(first=st.integers(0, 50), count=st.integers(0, 40), ranks=st.integers(1, 7), most=st.integers(0, 9))
def test_the_shares_of_all_ranks_are_the_step_and_micro_batches_are_the_share(first, count, ranks, most):
    shares = [share_of(first, count, rank, ranks) for rank in range(ranks)]
    assert sorted(n for share in shares for n in share) == list(range(first, first + count))
    for share in shares:
        assert [n for part in micro_batches(share, most) for n in part] == list(share)


def test_the_loader_gives_what_was_asked_for_after_samples_were_passed_over(world):
    data = LmObjective(sequence_length=16, rows=4).data([world.tokens], world.tokenizer.path, 0)
    phase, at = data.phases[0], Position()
    loader = Loader(data, rank=1, ranks=2, micro_batch=1)
    for first in (0, 4, 40, 44, 8):  # twice what was expected, then a jump, and back
        numbers, batches = loader.step(phase, at, first)
        assert list(numbers) == [first + 1, first + 3]
        assert [b.tokens.tolist() for b in batches] == [data.batch([n], at).tokens.tolist() for n in numbers]
    loader.close()


# --- sources


def test_lengths_may_grow_and_no_token_comes_twice_within_an_epoch():
    source = Source(Counted(64 * 200 + 1), block=64, seed=3)
    seen: list[np.ndarray] = []
    place, length = 0, 16
    for new_length, count in ((16, 150), (32, 100), (64, 60)):
        place, length = source.resume(place, length, new_length), new_length
        for _ in range(count):
            seen.append(source.sample(place, length)[0][:-1])
            place += 1
    tokens = np.concatenate(seen)
    assert len(tokens) == 150 * 16 + 100 * 32 + 60 * 64
    assert len(np.unique(tokens)) == len(tokens)


@pytest.mark.parametrize("length", [16, 64])
def test_an_epoch_holds_every_whole_block_once_and_the_next_is_in_another_order(length):
    source = Source(Counted(64 * WINDOW * 2 + 1), block=64, seed=0)
    count = 2 * WINDOW * 64 // length
    first, second = ([source.sample(e * count + i, length)[0][0] for i in range(count)] for e in range(2))
    assert sorted(first) == sorted(second) == list(range(0, 64 * WINDOW * 2, length))
    assert first != second


def test_neighbours_in_a_batch_come_from_different_blocks():
    source = Source(Counted(64 * 1000 + 1), block=64, seed=0)
    blocks = {int(source.sample(i, 16)[0][0]) // 64 for i in range(WINDOW)}
    assert len(blocks) == WINDOW


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0.01, 10), min_size=1), st.integers(0, 5 * CYCLE))
def test_shares_hold_over_every_cycle_and_counts_are_what_was_dealt(shares, number):
    deal = Deal(shares, seed=1)
    counts = deal.counts(CYCLE)
    assert sum(counts.values()) == CYCLE
    assert all(abs(counts.get(n, 0) / CYCLE - s / sum(shares.values())) <= 1 / CYCLE for n, s in shares.items())
    before, (name, earlier) = deal.counts(number), deal.source(number)
    assert before[name] == earlier
    assert deal.counts(number + 1) == before | {name: earlier + 1}


# --- phases


def test_the_batch_grows_and_the_rate_follows_the_tokens():
    steps = positions(RUN)
    assert [at.phase for at in steps] == [0] * 10 + [1] * 5 + [2] * 8 + [3] * 4
    course = RUN.course
    assert course.total == 640 + 640 + 1024 + 512 and course.anneal == course.total - 512
    rates = [course.learning_rate(at.scheduled(RUN.phases), RUN.phases[at.phase].batch_tokens) for at in steps]
    assert rates[0] == pytest.approx(5e-3 * 64 / 200) and rates[3] == 5e-3
    assert all(a >= b for a, b in itertools.pairwise(rates[4:])) and 0 < rates[-1] < 2e-4


@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=4),
    averaged=st.integers(0, 5),
)
def test_moments_of_the_average_are_few_and_end_with_the_last_step(sizes, averaged):
    total = sum(steps * size for steps, size in sizes)
    course = Course.of(Schedule(averaged=averaged), total, sizes[0][1])
    done, moments = 0, []
    for steps, size in sizes:
        for _ in range(steps):
            if course.is_averaged(done, size):
                moments.append(done + size)
            done += size
    assert len(moments) <= averaged and (not averaged or moments[-1] == total)


@pytest.mark.parametrize(
    "phases, said",
    [
        ((GROWING[0], GROWING[0]), "these repeat"),
        ((GROWING[0], replace(GROWING[1], sequence_length=24)), "does not divide the longest"),
        ((GROWING[3], GROWING[0]), "only the last phases may anneal"),
    ],
)
def test_phases_that_make_no_run_are_refused(phases, said):
    with pytest.raises(ConfigError, match=said):
        check(phases)


def test_a_source_that_is_not_given_is_named(world):
    phase = Phase(tokens=64, sequence_length=16, rows=4, mix={"code": 1.0})
    with pytest.raises(ConfigError, match=r"mixes in 'code'.*\nhint: the sources are data"):
        LmObjective(phases=(phase,)).data([world.tokens], world.tokenizer.path, 0)


# --- runs


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("phases") / "whole"
    return loop.train(RUN, world.tokens, world.tokenizer, None, out=out)


class Stopping(PlainGuard):
    """Ends the run after the next saved state, as a signal does."""

    def after_step(self, run):
        super().after_step(run)
        if run.position.step % self.every_steps == 0:
            raise KeyboardInterrupt


def test_a_run_stopped_in_every_phase_ends_with_the_same_bits(world, whole, tmp_path, monkeypatch):
    out = tmp_path / "stopped"
    stops = 0
    with monkeypatch.context() as patch:
        patch.setattr(guarding, "PlainGuard", Stopping)
        for _ in range(5):
            with pytest.raises(KeyboardInterrupt):
                loop.train(RUN, world.tokens, world.tokenizer, None, out=out)
            stops += 1
    again = loop.train(RUN, world.tokens, world.tokenizer, None, out=out)
    assert again.digest == whole.digest
    assert [line["step"] for line in lines(out)] == list(range(1, 28))
    values = [[(line["loss"], line.get("val_loss")) for line in lines(path)] for path in (out, whole.path)]
    assert values[0] == values[1]


def test_held_out_loss_is_measured_at_the_end_of_each_phase_and_on_the_way(whole):
    assert [line["step"] for line in lines(whole.path) if "val_loss" in line] == [10, 15, 20, 23, 27]


def test_the_account_of_samples_is_in_the_result(whole):
    account = json.loads(whole.file("samples.json").read_text())
    assert account["samples"] == 10 * 4 + 5 * 8 + 8 * 4 + 4 * 4 and account["passed"] == []
    assert account["position"]["cursors"].keys() == {"data"}


def test_evaluation_comes_after_the_state_is_safe(world, tmp_path, monkeypatch):
    out = tmp_path / "failing"

    def fails(self, data, batches):
        raise RuntimeError("evaluation failed")

    with monkeypatch.context() as patch:
        patch.setattr(Whole, "validate", fails)
        with pytest.raises(RuntimeError):
            loop.train(replace(RUN, save_every_steps=10), world.tokens, world.tokenizer, None, out=out)
    assert (out / artifacts.WORK / "state-00-00000010").is_dir()


def test_micro_batches_give_the_loss_and_the_gradients_of_the_whole_batch(world):
    data = LmObjective(sequence_length=32, rows=8).data([world.tokens], world.tokenizer.path, 0)
    found = []
    for most in (0, 3, 1):
        placement = Whole(Llama(TOY).init_weights(0))
        batches = [data.batch(part, Position()) for part in micro_batches(range(8), most)]
        loss, _ = placement.backward(data, batches)
        found.append((loss, {n: p.grad for n, p in placement.named_parameters()}))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-3)
        for name, gradient in gradients.items():
            error = (gradient - found[0][1][name]).norm() / found[0][1][name].norm()
            assert error < 0.02, (name, error)  # products are in bfloat16


class Verdicts(PlainGuard):
    """A guard whose judgement is written down beforehand: step -> verdicts, each given once."""

    orders: ClassVar[dict] = {}

    def judge(self, step, loss, norm):
        self.asked = [*getattr(self, "asked", []), step]
        left = self.orders.get(step, [])
        return left.pop(0) if left else Verdict()


def judged(world, out, monkeypatch, orders):
    monkeypatch.setattr(Verdicts, "orders", orders)
    with monkeypatch.context() as patch:
        patch.setattr(guarding, "PlainGuard", Verdicts)
        return loop.train(RUN, world.tokens, world.tokenizer, None, out=out)


def test_a_step_that_is_computed_again_changes_nothing(world, whole, tmp_path, monkeypatch):
    again = judged(world, tmp_path / "again", monkeypatch, {7: [Verdict(action="again")] * 2})
    assert again.digest == whole.digest


def test_a_skipped_step_leaves_the_weights_and_goes_on_with_the_next_samples(world, whole, tmp_path, monkeypatch):
    skipped = judged(world, tmp_path / "skip", monkeypatch, {7: [Verdict(action="skip")]})
    ours, theirs = lines(skipped.path), lines(whole.path)
    assert [line["step"] for line in ours if "skipped" in line] == [8]
    assert ours[7]["loss"] == theirs[7]["loss"] and ours[8]["loss"] != theirs[8]["loss"]
    assert json.loads(skipped.file("samples.json").read_text())["samples"] == 128


def test_a_roll_back_learns_from_other_samples_and_accounts_for_those_passed_over(world, whole, tmp_path, monkeypatch):
    order = Verdict(action="lower_rate", to=6, rate=0.5, why="the loss is wild")
    rolled = judged(world, tmp_path / "roll", monkeypatch, {8: [order]})
    ours, theirs = lines(rolled.path), lines(whole.path)
    assert [line["step"] for line in ours] == list(range(1, 28))
    assert ours[4]["loss"] == theirs[4]["loss"] and ours[5]["loss"] != theirs[5]["loss"]
    assert ours[5]["lr"] == pytest.approx(theirs[5]["lr"] / 2)
    account = json.loads(rolled.file("samples.json").read_text())
    assert account["passed"] == [[20, 36]], "steps 5 to 8, four samples each"
    assert account["samples"] == 128


def test_stop_ends_with_the_reason(world, tmp_path, monkeypatch):
    with pytest.raises(PunaError, match="step 3: enough"):
        judged(world, tmp_path / "stop", monkeypatch, {3: [Verdict(action="stop", why="enough")]})


# --- ledger


def test_the_ledger_does_not_depend_on_the_number_of_ranks_and_finds_what_is_wrong(world, tmp_path):
    data = LmObjective(sequence_length=16, rows=8).data([world.tokens], world.tokenizer.path, 0)

    def account(folder, worlds):
        """Steps of 8 samples; `worlds` says how many ranks each step has."""
        for step, ranks in enumerate(worlds):
            for rank in range(ranks):
                book = ledger.Ledger(folder, rank, ranks)
                numbers = share_of(step * 8, 8, rank, ranks)
                book.take(step, numbers, [data.batch(numbers, Position())])
                book.close()
        return ledger.audit(folder)

    one, other = account(tmp_path / "one", [1] * 4), account(tmp_path / "other", [4, 4, 2, 3])
    assert one == other and one.samples == 32 and not one.repeated and not one.missing
    book = ledger.Ledger(tmp_path / "other", 0, 1)
    book.cut(2)
    book.close()
    assert ledger.audit(tmp_path / "other").samples == 16, "what all ranks took from step 2 on is forgotten"
    torn = tmp_path / "other" / "samples-00003.jsonl"
    torn.write_bytes(torn.read_bytes() + b'{"step": 9, "fir')
    book = ledger.Ledger(tmp_path / "other", 0, 1)
    book.cut(2)
    book.take(2, range(15, 20), [])
    book.take(3, range(22, 24), [])
    book.close()
    found = ledger.audit(tmp_path / "other", passed=[[20, 21]])
    assert found.repeated == (15,) and found.missing == (21,)


def test_settings_of_a_run_are_json_and_back():
    from puna import config

    assert config.from_json(TrainConfig, json.loads(json.dumps(config.to_json(RUN)))) == RUN
    assert dataclasses.is_dataclass(RUN.lm.phases[0])


def test_weights_are_finite_after_all_that(whole):
    assert all(torch.isfinite(p).all() for p in load_model(whole.path).parameters())
