import pytest
import torch

from puna.model.llama import Llama
from puna.model.sizes import SIZES

# Counted by hand from the released shapes; tied outputs once.
PUBLISHED = {
    "llama-1-7b": 6_738_415_616,
    "llama-1-13b": 13_015_864_320,
    "llama-1-33b": 32_528_943_616,
    "llama-1-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
}
KV_KIB_PER_TOKEN = {
    "llama-1-7b": 512,
    "llama-2-70b": 320,
    "llama-3.1-405b": 504,
    "llama-3.2-1b": 32,
    "llama-3.2-3b": 112,
}


def test_the_table_has_every_published_dense_size():
    assert SIZES.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_are_the_published_ones(name):
    assert SIZES[name].parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", SIZES)
def test_the_model_has_as_many_weights_as_its_size_says(name):
    with torch.device("meta"):
        model = Llama(SIZES[name])
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize(("name", "kib"), KV_KIB_PER_TOKEN.items())
def test_cache_bytes_per_token_are_the_published_ones(name, kib):
    assert SIZES[name].kv_bytes_per_token() == kib * 1024


def test_only_from_3_1_on_positions_are_stretched_and_only_3_2_is_tied():
    assert {n for n, c in SIZES.items() if c.rope_scaling} == {n for n in SIZES if n[6:9] in ("3.1", "3.2", "3.3")}
    assert {n for n, c in SIZES.items() if c.tied} == {"llama-3.2-1b", "llama-3.2-3b"}
    assert {c.rope_scaling.factor for n, c in SIZES.items() if "3.2" in n} == {32.0}
    assert {c.rope_theta for n, c in SIZES.items() if n[6] in "12"} == {10_000.0}


def test_only_the_small_models_of_llama_1_divide_by_a_smaller_epsilon():
    assert {n for n, c in SIZES.items() if c.norm_eps == 1e-6} == {"llama-1-7b", "llama-1-13b", "llama-1-33b"}
    assert {c.norm_eps for c in SIZES.values()} == {1e-6, 1e-5}
