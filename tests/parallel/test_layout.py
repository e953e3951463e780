"""The layout of a run: who sits where, what is refused, and the order of passes in a pipeline."""

import itertools
from dataclasses import replace

import pytest

from puna.config import from_json, to_json
from puna.errors import ConfigError
from puna.model.sizes import SIZES, LlamaConfig
from puna.parallel.layout import ORDER, Layout
from puna.parallel.schedule import Pass, schedule

TOY = LlamaConfig(dim=64, n_layers=6, n_heads=8, n_kv_heads=4, head_dim=8, ffn_dim=160, vocab_size=136, context=64)


def test_ranks_count_tensor_first_and_replicas_last():
    layout = Layout(tensor=2, context=3, pipeline=2, shard=2, replicate=2)
    seats = [layout.coordinates(rank) for rank in range(layout.world)]
    assert seats == sorted(seats, key=lambda seat: [seat[name] for name in reversed(ORDER)])
    assert len({tuple(seat.values()) for seat in seats}) == layout.world == 48
    assert [layout.coordinates(rank)["tensor"] for rank in range(4)] == [0, 1, 0, 1]
    assert [layout.data_rank(rank) for rank in (0, 11, 12, 47)] == [0, 0, 1, 3]


def test_a_layout_is_a_configuration_and_reads_as_one_would_type_it():
    layout = Layout(tensor=2, pipeline=2, layers_per_stage=(2, 4), sequence_parallel=False)
    assert from_json(Layout, to_json(layout)) == layout
    assert str(layout) == "pipeline=2 tensor=2 sequence_parallel=false layers_per_stage=2,4"


def test_first_and_last_stage_of_405b_have_a_layer_less():
    stages = Layout(pipeline=16).stage_layers(SIZES["llama-3.1-405b"].n_layers)
    assert [len(layers) for layers in stages] == [7] + [8] * 14 + [7]
    assert [layer for layers in stages for layer in layers] == list(range(126))


@pytest.mark.parametrize("layers, stages", [(4, 4), (5, 2), (7, 3), (80, 16), (2, 1)])
def test_every_layer_is_on_one_stage_and_every_stage_has_one(layers, stages):
    held = Layout(pipeline=stages).stage_layers(layers)
    assert [layer for part in held for layer in part] == list(range(layers))
    assert min(len(part) for part in held) >= 1


@pytest.mark.parametrize(
    "layout, change, length, says",
    [
        (Layout(tensor=3), {}, 64, "n_heads=8 is not divisible by tensor=3"),
        (Layout(tensor=8), {}, 64, "n_kv_heads=4 is not divisible by tensor=8"),
        (Layout(tensor=4), {"ffn_dim": 162}, 64, "ffn_dim=162 is not divisible by tensor=4"),
        (Layout(tensor=4), {"vocab_size": 138}, 64, "vocab_size=138 is not divisible by tensor=4"),
        (Layout(pipeline=4, stages_per_rank=2), {}, 64, "6 layers cannot fill 8 stages"),
        (Layout(pipeline=2, layers_per_stage=(2, 3)), {}, 64, "has 5 layers, the model 6"),
        (Layout(context=3), {}, 64, "sequence_length=64 is not divisible by 2 * context = 6"),
        (Layout(context=2, tensor=4), {}, 60, "sequence_length=60 is not divisible by context * tensor = 8"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_with_a_hint(layout, change, length, says):
    with pytest.raises(ConfigError) as refused:
        layout.check_model(replace(TOY, **change), length)
    assert says in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize(
    "fields", [{"tensor": 0}, {"stages_per_rank": 2}, {"pipeline": 2, "layers_per_stage": (6,)}, {"in_flight": -1}]
)
def test_a_layout_that_means_nothing_is_refused(fields):
    with pytest.raises(ConfigError):
        Layout(**fields)


def test_another_number_of_processes_is_refused_with_the_command():
    with pytest.raises(ConfigError) as refused:
        Layout(tensor=2, shard=2).check_world(3)
    assert "needs 4 processes, there are 3" in refused.value.message
    assert "--nproc-per-node 4" in refused.value.hint


def test_one_forward_one_backward_is_the_textbook_s():
    rows = schedule(Layout(pipeline=3), 4)
    shown = [" ".join(f"{kind}{m}" for kind, _, m in passes) for passes in rows]
    assert shown == ["F0 F1 F2 B0 F3 B1 B2 B3", "F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"]


def test_breadth_first_runs_every_micro_batch_through_a_stage_before_the_next():
    first = schedule(Layout(pipeline=2, stages_per_rank=2, in_flight=4), 4)[0]
    forwards = [(stage, m) for kind, stage, m in first if kind == "F"]
    assert forwards == [(0, 0), (0, 1), (0, 2), (0, 3), (2, 0), (2, 1), (2, 2), (2, 3)]


@pytest.mark.parametrize("pipeline, per_rank", list(itertools.product((2, 3, 4, 8), (1, 2, 3))))
def test_any_schedule_runs_every_pass_once_and_none_before_what_it_needs(pipeline, per_rank):
    for microbatches, in_a_row in itertools.product((1, 2, 3, 5, 8), (0, 1, 2, 3, 8)):
        layout = Layout(pipeline=pipeline, stages_per_rank=per_rank, in_flight=in_a_row)
        rows = schedule(layout, microbatches)
        every = {Pass(k, s, m) for k in "FB" for s in range(layout.stages) for m in range(microbatches)}
        assert sorted(p for row in rows for p in row) == sorted(every)
        assert all(p.stage % pipeline == rank for rank, row in enumerate(rows) for p in row)
        _run(rows, layout.stages)
        held = [max(itertools.accumulate(1 if p.kind == "F" else -1 for p in row)) for row in rows]
        n = in_a_row or pipeline
        for rank, most in enumerate(held):
            bound = max(1, n - rank) if per_rank == 1 else 2 * (pipeline - rank - 1) + (per_rank - 1) * n + 1
            assert most <= bound


def _run(rows: list[list[Pass]], stages: int) -> None:
    """Each rank takes its passes in order, as soon as what they need is there; all must come to their end."""
    done: set[Pass] = set()
    left = [list(row) for row in rows]
    while any(left):
        moved = False
        for row in left:
            while row and _needs(row[0], stages) <= done:
                done.add(row.pop(0))
                moved = True
        assert moved, "every rank waits"


def _needs(p: Pass, stages: int) -> set[Pass]:
    if p.kind == "F":
        return {Pass("F", p.stage - 1, p.microbatch)} if p.stage else set()
    after = {Pass("B", p.stage + 1, p.microbatch)} if p.stage + 1 < stages else set()
    return {Pass("F", p.stage, p.microbatch)} | after
