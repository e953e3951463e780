import dataclasses

import pytest

from puna.errors import ConfigError
from puna.model.sizes import SIZES
from puna.planner.hardware import device
from puna.planner.layouts import USABLE, layouts, search
from puna.planner.memory import memory_per_rank
from puna.planner.step import step_time
from puna.planner.work import Work

H100 = device("H100")
SMALL, BIG = SIZES["llama-3.1-8b"], SIZES["llama-3.1-405b"]


@pytest.mark.parametrize(("config", "world", "rows"), [(SMALL, 64, 512), (SMALL, 12, 96), (BIG, 1024, 512)])
def test_the_winner_fits_uses_every_device_and_none_that_fits_is_faster(config, world, rows):
    work = Work(rows=rows)
    found = search(config, world, work, H100)
    best = found.best
    assert best.layout.world == world
    assert best.memory.total <= USABLE * H100.memory_bytes
    for layout in list(layouts(config, world, work, H100))[::7]:
        how = dataclasses.replace(work, recompute=best.work.recompute)
        if memory_per_rank(config, layout, how).total <= USABLE * H100.memory_bytes:
            assert step_time(config, layout, how, H100).seconds >= 0.999 * best.step.seconds


def test_the_runners_up_are_other_splits_slowest_last_with_a_reason():
    found = search(SMALL, 64, Work(rows=512), H100)
    splits = [(c.layout.tensor, c.layout.context, c.layout.pipeline) for c in (found.best, *found.others)]
    assert len(set(splits)) == len(splits) == 5
    times = [c.step.seconds for c in (found.best, *found.others)]
    assert times == sorted(times)
    for reason, other in zip(found.reasons(), found.others, strict=True):
        assert reason.startswith(f"{other.step.seconds / found.best.step.seconds - 1:+.0%}: ")


def test_tensor_ranks_stay_inside_a_node_and_layouts_are_ones_the_trainer_takes():
    for layout in layouts(SMALL, 128, Work(rows=512), H100):
        assert layout.tensor <= H100.node
        layout.check_model(SMALL, 8192)


def test_long_sequences_are_cut():
    found = search(SMALL, 16, Work(rows=16, sequence_length=131_072), H100)
    assert found.best.layout.context > 1


def test_a_quick_search_is_nearly_as_good():
    whole, quick = (search(SMALL, 64, Work(rows=512), H100, quick=q) for q in (False, True))
    assert quick.tried < whole.tried / 2
    assert quick.best.step.seconds < 1.1 * whole.best.step.seconds


def test_what_fits_nowhere_says_how_much_it_lacks():
    with pytest.raises(
        ConfigError, match=r"406B parameters do not fit 8 x H100: .* needs [\d,.]+ [GT]B a device, 73.6 GB are usable"
    ):
        search(BIG, 8, Work(rows=256), H100)
