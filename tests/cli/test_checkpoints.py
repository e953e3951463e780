"""`puna inspect` and `puna verify` as a user runs them: what they print, and how they end."""

import json

import pytest
import torch

from puna.cli import main
from puna.model.checkpoint import save_model
from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig

SHAPE = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=64, context=64)


def saved(folder, change=None):
    model = Llama(SHAPE).init_weights(0)
    with torch.no_grad():
        if change:
            model.get_parameter(change).mul_(2)
    save_model(model, None, folder)
    return str(folder)


def test_inspect_says_what_it_is_and_what_memory_it_takes(tmp_path, capsys):
    path = saved(tmp_path / "a")
    assert main(["inspect", path]) == 0
    told = capsys.readouterr().out
    assert "2 layers, width 32" in told and "F32" in told and "int4" in told
    assert main(["inspect", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["ffn_dim"] == 48


def test_verify_tells_equal_from_different_and_where(tmp_path, capsys):
    first, again = saved(tmp_path / "a"), saved(tmp_path / "b")
    changed = saved(tmp_path / "c", "layers.1.attention.wo.weight")
    assert main(["verify", first, again, "--tokens", "16"]) == 0
    assert "the same" in capsys.readouterr().out
    assert main(["verify", first, changed, "--tokens", "16"]) == 1
    assert "is at layer 2" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_what_is_no_checkpoint_is_refused_with_a_hint(verb, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing"):
        arguments = [verb, str(path)] + [str(path)] * (verb == "verify")
        assert main(arguments) != 0
        assert "hint:" in capsys.readouterr().err


def test_convert_writes_what_inspect_and_verify_read(tmp_path, capsys):
    first = saved(tmp_path / "a")
    for to, name in (("gguf", "b.gguf"), ("meta", "c")):
        assert main(["convert", first, str(tmp_path / name), "--to", to]) == 0
        assert main(["inspect", str(tmp_path / name)]) == 0 and f"({to})" in capsys.readouterr().out
        assert main(["verify", first, str(tmp_path / name), "--tokens", "16", "--tolerance", "1e-9"]) == 0
    assert main(["convert", first, str(tmp_path / "d"), "--to", "meta", "--form", "Q4_0"]) != 0
    assert "not a number format of meta" in capsys.readouterr().err
