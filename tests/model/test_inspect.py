"""Inspection: the published sizes are recognised, memory is what their shapes say, and oddities are told."""

from dataclasses import replace

import pytest
import torch

from puna.model.checkpoint import save_model
from puna.model.folder import WeightFiles
from puna.model.inspect import family_of, inspect, run_bytes
from puna.model.llama import Llama
from puna.model.sizes import SIZES, LlamaConfig

SHAPE = LlamaConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=64, context=64, tied=True
)


def inspected(shape: LlamaConfig, folder, dtype=torch.float32):
    save_model(Llama(shape).init_weights(0), None, folder, dtype)
    with WeightFiles(folder) as files:
        return inspect("huggingface", shape, files)


@pytest.mark.parametrize("name", SIZES)
def test_every_published_size_is_recognised(name):
    assert name in family_of(SIZES[name]).split(" or ")
    assert family_of(replace(SIZES[name], ffn_dim=100)) == ""


def test_memory_of_llama_31_8b_is_what_its_shape_says():
    config = SIZES["llama-3.1-8b"]
    assert run_bytes(config, "bf16", 0) == 2 * 8_030_261_248
    assert run_bytes(config, "bf16", 131_072) - run_bytes(config, "bf16", 0) == 16 * 2**30
    assert 4.5e9 < run_bytes(config, "int4", 0) < 5.2e9


def test_what_is_stored_is_counted(tmp_path):
    found = inspected(SHAPE, tmp_path, torch.bfloat16)
    assert found.forms == {"BF16": (found.tensors, 2 * SHAPE.parameters)} and found.oddities == ()
    assert list(found.memory["int8"]) == [64]


def test_oddities_are_told(tmp_path):
    found = inspected(replace(SHAPE, head_dim=16, vocab_size=65), tmp_path)
    assert any("not the width 32" in oddity for oddity in found.oddities)
    assert any("not a multiple of 64" in oddity for oddity in found.oddities)
