import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_checkpoint import make_checkpoint

import puna.quant.stage
from puna.errors import ArtifactError, ConfigError
from puna.model.checkpoint import load_model
from puna.model.folder import load_config
from puna.model.llama import Llama, attend_with
from puna.quant import QuantConfig, is_quantised, load_quantised, quantise
from puna.quant.groups import dequantise_matrix, quantise_matrix

EVERY_KIND = [
    QuantConfig(bits=4), QuantConfig(bits=8), QuantConfig(bits=4, group_size=64, embedding_bits=4),
    QuantConfig(bits=8, group_size=128, embedding_bits=16),
]  # fmt: skip


@torch.no_grad()
def logits(model: Llama) -> torch.Tensor:
    tokens = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(5))
    return model(tokens, torch.arange(40).expand(2, 40), attend_with(None)).float()


def files(path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name != "manifest.json"}


@pytest.mark.parametrize("config", EVERY_KIND, ids=str)
def test_packed_and_expanded_models_hold_the_dequantised_weights_of_the_checkpoint(checkpoint, tmp_path, config):
    made = quantise(config, checkpoint, out=tmp_path / "q")
    original = load_model(checkpoint.path)
    with torch.no_grad():
        for name, weight in original.named_parameters():
            bits = config.bits_of(name)
            if weight.ndim == 2 and bits != 16:
                weight.copy_(dequantise_matrix(quantise_matrix(weight, bits, config.group_size)))
    expanded = load_quantised(made.path, expand=True)
    packed = load_quantised(made.path, expand=False)
    assert all(torch.equal(w, expanded.state_dict()[n]) for n, w in original.state_dict().items())
    assert torch.equal(logits(packed), logits(expanded))
    assert torch.equal(logits(original), logits(expanded))
    assert load_config(made.path) == load_config(checkpoint.path) and is_quantised(made.path)
    assert not is_quantised(checkpoint.path)


@pytest.mark.parametrize("config", EVERY_KIND, ids=str)
def test_the_packed_model_takes_the_bytes_that_the_metrics_say(checkpoint, tmp_path, config):
    made = quantise(config, checkpoint, out=tmp_path / "q")
    packed = load_quantised(made.path, torch.bfloat16, expand=False)
    tensors = {t.data_ptr(): t for t in (*packed.buffers(), *packed.parameters())}.values()
    norms = sum(p.numel() for p in packed.parameters() if p.ndim == 1)
    held = sum(t.numel() * t.element_size() for t in tensors)
    assert made.metrics["bytes"] == held + 2 * norms  # norms are stored as float32
    assert made.metrics["bits_per_weight"] == pytest.approx(8 * made.metrics["bytes"] / packed.config.parameters)
    assert made.metrics["checkpoint_bytes"] == 2 * packed.config.parameters
    assert (made.path / "model.safetensors").stat().st_size < made.metrics["bytes"] + 10_000


def test_fewer_bits_are_further_from_the_checkpoint_and_eight_are_close(checkpoint, tmp_path):
    reference = logits(load_model(checkpoint.path))

    def distance(name: str, **settings) -> tuple[float, float]:
        made = quantise(QuantConfig(**settings), checkpoint, out=tmp_path / name)
        worst = max(made.metrics["relative_error"].values())
        return float((logits(load_quantised(made.path)) - reference).norm() / reference.norm()), worst

    eight, four, all_four = distance("8", bits=8), distance("4", bits=4), distance("44", bits=4, embedding_bits=4)
    assert eight[0] < 0.02 and eight[1] < 0.007
    assert eight[0] < four[0] < all_four[0] < 0.5
    assert 0.05 < four[1] < 0.1


def test_the_relative_error_names_every_matrix_once(checkpoint, tmp_path):
    made = quantise(QuantConfig(), checkpoint, out=tmp_path / "q")
    matrices = 2 * 7 + (1 if load_config(checkpoint.path).tied else 2)
    assert len(made.metrics["relative_error"]) == matrices
    assert all(0 < e < 0.1 for e in made.metrics["relative_error"].values())


def test_an_interrupted_run_goes_on_where_it_was_and_ends_in_the_same_bytes(checkpoint, tmp_path, monkeypatch):
    whole = quantise(QuantConfig(), checkpoint, out=tmp_path / "whole")
    done: list[str] = []
    one = puna.quant.stage.write_nearest

    def interrupted(weights, name, form, out):
        if len(done) == 5:
            raise KeyboardInterrupt
        one(weights, name, form, out)
        done.append(name)

    monkeypatch.setattr(puna.quant.stage, "write_nearest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantise(QuantConfig(), checkpoint, out=tmp_path / "part")
    again: list[str] = []
    monkeypatch.setattr(puna.quant.stage, "write_nearest", lambda *a: (again.append(a[1]), one(*a)))
    resumed = quantise(QuantConfig(), checkpoint, out=tmp_path / "part")
    assert not set(again) & set(done) and len(again) > 5
    assert files(resumed.path) == files(whole.path) and resumed.metrics == whole.metrics


def test_a_plain_folder_can_be_quantised_as_well(checkpoint, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(checkpoint.path, plain)
    (plain / "manifest.json").unlink()
    from_plain = quantise(QuantConfig(), plain, out=tmp_path / "a")
    assert files(from_plain.path) == files(quantise(QuantConfig(), checkpoint, out=tmp_path / "b").path)


def test_the_wrong_loader_says_which_is_right(checkpoint, tmp_path):
    made = quantise(QuantConfig(), checkpoint, out=tmp_path / "q")
    with pytest.raises(ArtifactError, match="quantised") as error:
        load_model(made.path)
    assert "load_quantised" in error.value.hint
    with pytest.raises(ArtifactError, match="not a quantised") as error:
        load_quantised(checkpoint.path)
    assert "load_model" in error.value.hint


def test_weights_that_do_not_fit_the_config_are_an_error(checkpoint, tmp_path):
    made = quantise(QuantConfig(bits=8), checkpoint, out=tmp_path / "q")
    (made.path / "manifest.json").unlink()
    data = json.loads((made.path / "config.json").read_text())
    block = data["puna_quantisation"]
    for wrong, message in (
        ({"bits": 4}, "shape"),
        ({"group_size": 17}, "shape"),
        ({"bits": 5}, "5"),
        ({"colour": 1}, "colour"),
    ):
        (made.path / "config.json").write_text(json.dumps({**data, "puna_quantisation": block | wrong}))
        with pytest.raises(ArtifactError, match=message):
            load_quantised(made.path)


def test_one_flipped_bit_is_found(checkpoint, tmp_path):
    made = quantise(QuantConfig(), checkpoint, out=tmp_path / "q")
    file = made.path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 4
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged"):
        load_quantised(made.path)


def test_a_damaged_checkpoint_is_not_quantised(tmp_path):
    made = make_checkpoint({"tied": False, "seed": 1}, out=tmp_path / "made")
    state = load_file(made.path / "model.safetensors")
    assert len(state) == 2 * 9 + 3
    file = made.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ArtifactError, match="bytes"):
        quantise(QuantConfig(), made, out=tmp_path / "q")


@pytest.mark.parametrize("wrong", [{"group_size": 0}, {"group_size": -32}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match=str(wrong["group_size"])):
        QuantConfig(**wrong)
