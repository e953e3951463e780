"""A checkpoint of any format is quantised to the same integers, with its tokenizer; and how large 8B becomes."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from puna.errors import ArtifactError
from puna.model.checkpoint import save_model
from puna.model.conversion import convert
from puna.model.llama import Llama
from puna.model.opening import checkpoint_tokenizer
from puna.model.sizes import SIZES, LlamaConfig
from puna.quant import QuantConfig, load_quantised, quantise
from puna.tokenizer.bpe import MODEL_FILE, write_ranks

SHAPE = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=512, context=128, rope_theta=5e5
)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def source(request, tmp_path_factory):
    """A Hugging Face folder with a tokenizer of single bytes."""
    from dataclasses import replace

    folder = tmp_path_factory.mktemp("source")
    write_ranks(folder / MODEL_FILE, {bytes([b]): b for b in range(256)})
    model = Llama(replace(SHAPE, tied=request.param)).init_weights(0)
    save_model(model, folder, folder / "model", torch.bfloat16)
    return folder / "model"


@pytest.mark.parametrize("to", ["meta", "gguf"])
def test_every_format_gives_the_same_integers_and_ids(source, tmp_path, to):
    convert(source, tmp_path / "other", to)
    ours = quantise(QuantConfig(group_size=64, quality_tokens=0), source, out=tmp_path / "a")
    theirs = quantise(QuantConfig(group_size=64, quality_tokens=0), tmp_path / "other", out=tmp_path / "b")
    first, second = (load_file(made.path / "model.safetensors") for made in (ours, theirs))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    text = "herds hum, 3141 of them"
    assert checkpoint_tokenizer(ours.path).encode(text) == checkpoint_tokenizer(theirs.path).encode(text)
    assert load_quantised(theirs.path).config == load_quantised(ours.path).config


def test_a_packed_gguf_is_quantised_from_the_numbers_that_it_stands_for(source, tmp_path):
    convert(source, tmp_path / "small.gguf", "gguf", "Q8_0")
    made = quantise(
        QuantConfig(bits=8, embedding_bits=16, quality_tokens=0), tmp_path / "small.gguf", out=tmp_path / "q"
    )
    assert made.metrics["checkpoint_bytes"] < 1.2 * made.metrics["parameters"]
    assert max(made.metrics["relative_error"].values()) < 0.007


def test_a_checkpoint_that_lacks_a_tensor_is_refused_before_any_work(source, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, plain / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"layers\.1\.mlp\.up_proj"):
        quantise(QuantConfig(), plain, out=tmp_path / "q")
    assert not list((tmp_path / "q" / "work").iterdir())


def test_a_quantised_model_cannot_be_quantised_again(source, tmp_path):
    made = quantise(QuantConfig(quality_tokens=0), source, out=tmp_path / "q")
    with pytest.raises(ArtifactError, match="we quantised") as error:
        quantise(QuantConfig(bits=8), made.path, out=tmp_path / "qq")
    assert "made from" in error.value.hint


def bytes_of(config: LlamaConfig, quant: QuantConfig) -> int:
    """All tensors of a quantised model; norms are float32."""
    return sum(quant.form_of(name).bytes(shape) for name, shape in config.shapes().items())


def test_the_arithmetic_of_sizes_is_that_of_the_files(source, tmp_path):
    for quant in (
        QuantConfig(bits=8, group_size=64, quality_tokens=0),
        QuantConfig(bits=4, embedding_bits=16, quality_tokens=0),
        QuantConfig(bits=4, symmetric=False, quality_tokens=0),
    ):
        made = quantise(quant, source, out=tmp_path / f"{quant.bits}{quant.symmetric}")
        assert made.metrics["bytes"] == bytes_of(load_quantised(made.path).config, quant)


def test_eight_billion_weights_take_what_is_promised_tokenizer_included():
    config, tokenizer = SIZES["llama-3.1-8b"], 25_000_000  # tokenizer.model and tokenizer.json as we write them
    assert bytes_of(config, QuantConfig(bits=8, group_size=64)) + tokenizer < 8.5e9
    assert bytes_of(config, QuantConfig(bits=4, group_size=64)) + tokenizer < 5e9
