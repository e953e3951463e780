import dataclasses

import pytest

from puna.model.sizes import SIZES
from puna.parallel.layout import Layout
from puna.parallel.schedule import schedule
from puna.planner.memory import in_flight, memory_per_rank, rank_parameters, serving_memory
from puna.planner.serving import least_bytes, stored_bytes
from puna.planner.work import Work, layers_on

BIG = SIZES["llama-3.1-405b"]
SMALL = SIZES["llama-3.1-8b"]


def test_8b_takes_8_gb_at_8_bits_and_half_at_4():
    eight, four = (serving_memory(SMALL, bits=bits).total for bits in (8, 4))
    assert eight == pytest.approx(8e9, rel=0.01)
    assert four == pytest.approx(eight / 2)


def test_the_cache_grows_with_tokens_and_sequences():
    one = serving_memory(SMALL, bits=8, context=8192)
    assert one.cache == 8192 * 131_072  # 2 x 32 layers x 8 heads x 128 x 2 bytes
    assert serving_memory(SMALL, bits=8, context=8192, sequences=3).cache == 3 * one.cache


def test_stored_weights_count_their_scales():
    assert serving_memory(SMALL, bits=4).total < stored_bytes(SMALL, 4) < 5e9  # six bits for the embedding
    assert stored_bytes(SMALL, 8) < 8.5e9
    assert least_bytes(SMALL, 8, 8192) == stored_bytes(SMALL, 8) + 8192 * SMALL.kv_bytes_per_token()


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(pipeline=4), Layout(pipeline=2, stages_per_rank=4), Layout(tensor=8, pipeline=8, shard=4)],
    ids=str,
)
@pytest.mark.parametrize("size", ["llama-3.1-8b", "llama-3.2-1b"])
def test_all_ranks_together_hold_the_whole_model(layout, size):
    config, work = SIZES[size], Work(rows=64)
    layout = dataclasses.replace(layout, pipeline=min(layout.pipeline, config.n_layers // layout.stages_per_rank))
    held = sum(rank_parameters(config, layout, work, rank) for rank in range(layout.pipeline)) * layout.tensor
    norms = (2 * config.n_layers + 1) * config.dim * (layout.tensor - 1)  # every tensor rank has them
    twin = config.vocab_size * config.dim if config.tied and layout.pipeline > 1 else 0  # on the first and the last
    assert held == config.parameters + norms + twin
    assert sum(layers_on(config, layout, work, rank) for rank in range(layout.pipeline)) == config.n_layers


def test_fsdp_divides_what_is_stored_and_nothing_else():
    work = Work(rows=64)
    whole, cut = (memory_per_rank(SMALL, Layout(replicate=r, shard=s), work) for r, s in ((8, 1), (1, 8)))
    for kind in ("parameters", "gradients", "optimizer"):
        assert getattr(cut, kind) == getattr(whole, kind) / 8
    assert cut.activations == whole.activations


def test_adamw_in_float32_takes_16_bytes_a_weight():
    memory = memory_per_rank(SMALL, Layout(), Work(rows=1))
    assert memory.parameters + memory.gradients + memory.optimizer == 16 * SMALL.parameters


def test_recomputing_more_keeps_less():
    kept = [memory_per_rank(SMALL, Layout(shard=8), Work(rows=16, recompute=mode)).activations for mode in ("none", "selective", "full")]  # fmt: skip
    assert kept[0] > kept[1] > kept[2]
    inputs = 2 * SMALL.dim * SMALL.n_layers * 2 * 8192  # bf16, two rows
    assert inputs < kept[2] < 2 * inputs  # and one layer whole


def test_sequence_parallelism_divides_what_lies_between_the_cut_matrices():
    kept = {
        cut: memory_per_rank(SMALL, Layout(tensor=8, sequence_parallel=cut), Work(rows=1)).activations
        for cut in (True, False)
    }
    assert kept[False] > 1.5 * kept[True]


def test_in_flight_is_what_the_schedules_hold():
    plain = Layout(pipeline=4, microbatches=16)
    assert [in_flight(plain, Work(rows=16), rank) for rank in range(4)] == [4, 3, 2, 1]
    woven = Layout(pipeline=4, microbatches=16, stages_per_rank=2)
    assert in_flight(woven, Work(rows=16), 0) == (2 * 3 + 4 + 1) / 2  # Megatron's warm-up and the one it works on
    assert in_flight(Layout(pipeline=4, microbatches=2), Work(rows=16), 0) == 2  # never more than there are


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("pipeline", [2, 3, 4, 6])
def test_in_flight_is_what_the_schedule_itself_holds(pipeline, stages):
    """Played out by `parallel.schedule`, with Llama 3's N below, at and above the number of ranks."""
    for N in (0, pipeline - 1, pipeline, pipeline + 1, 2 * pipeline, 3 * pipeline):
        for M in (pipeline, 2 * pipeline, 4 * pipeline):
            layout = Layout(pipeline=pipeline, stages_per_rank=stages, in_flight=N, microbatches=M)
            held = [most_held(passes) / stages for passes in schedule(layout, M)]
            planned = [in_flight(layout, Work(rows=M), rank) for rank in range(pipeline)]
            if 0 < N < pipeline and stages > 1:  # a piece or two too many
                assert all(0 <= p - h <= 2 / stages + 1e-9 for p, h in zip(planned, held, strict=True)), layout
            else:
                assert planned == held, layout


def most_held(passes) -> int:
    held = [1 if p.kind == "F" else -1 for p in passes]
    return max(sum(held[: i + 1]) for i in range(len(held)))


def test_llama_3_fits_its_gpus_without_recomputing():
    """arXiv 2407.21783, 3.3.2: with 8K sequences no activations are recomputed on 80 GB."""
    layout = Layout(tensor=8, pipeline=16, shard=128, stages_per_rank=8, microbatches=16)
    memory = memory_per_rank(BIG, layout, Work(rows=2048, uneven_ends=True))
    assert memory.total < 80e9


@pytest.mark.parametrize(
    ("layout", "rows", "compiled", "published_gib"),
    [(Layout(shard=8), 16, False, 82.4), (Layout(shard=8), 16, True, 77.0), (Layout(shard=128), 256, True, 62.0)],
)
def test_memory_is_near_what_torchtitan_published(layout, rows, compiled, published_gib):
    """benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3: 8B, selective recomputation; peaks reserved."""
    memory = memory_per_rank(SMALL, layout, Work(rows=rows, recompute="selective", compiled=compiled))
    assert memory.total / 2**30 == pytest.approx(published_gib, rel=0.17)
