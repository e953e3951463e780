"""What `benchmarks/inference.py` relies on: one model in all files, and honest sums."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from inference_peers import weights
from inference_peers.measures import Record, summary
from inference_peers.probe import states

from puna.model.opening import load_checkpoint
from puna.quant.load import load_quantised


@pytest.mark.parametrize("form", ["bf16.gguf", "q8_0.gguf", "q4_0.gguf", "int8", "int8-128", "int4"])
def test_every_format_holds_the_very_same_numbers(form, tmp_path):
    config = weights.shape("tiny")
    for each in ("hf", form):
        weights.write(config, each, tmp_path / each)
    truth = dict(load_checkpoint(tmp_path / "hf").named_parameters())
    folder = form.startswith("int")
    model = load_quantised(tmp_path / form, expand=True) if folder else load_checkpoint(tmp_path / form)
    found = dict(model.named_parameters())
    assert found.keys() == truth.keys()
    assert all(torch.equal(weight, truth[name]) for name, weight in found.items())


def record(engine, round, speed, probe=40.0, form="int4"):
    return Record(2, engine, form, "decode 0", round, probe, speed, 10**9)


def test_a_ratio_is_taken_within_rounds():
    speeds = {0: (10.0, 5.0), 1: (40.0, 20.0), 2: (12.0, 6.0)}
    pairs = [(record("ours", r, a), record("peer", r, b)) for r, (a, b) in speeds.items()]
    rows = summary([r for pair in pairs for r in pair], "ours")
    peer = next(row for row in rows if row["engine"] == "peer")
    assert peer["ours over it"]["all rounds"] == {"median": 2.0, "quartiles": [2.0, 2.0], "n": 3}


def test_the_best_peer_may_have_another_format():
    rows = summary([record("ours", 0, 30.0), record("a", 0, 10.0), record("b", 0, 20.0, form="int8")], "ours")
    assert next(r for r in rows if r["engine"] == "ours")["over the best peer of any format"]["median"] == 1.5


def test_two_states_of_the_memory_are_told_apart_and_one_is_not():
    assert 47 < states([44, 45, 46, 47, 45, 70, 72, 75, 71, 73]) < 70
    assert states([44, 45, 46, 47, 45, 46, 48, 44, 45, 49]) is None
    assert states([45, 75]) is None
