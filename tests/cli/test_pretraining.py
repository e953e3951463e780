"""`puna pretrain`: what it says of a layout before anything runs, and what it refuses."""

import json

import pytest

from puna.cli import main


def told(capsys, *arguments: str) -> str:
    assert main(["pretrain", *arguments]) == 0
    return capsys.readouterr().out


def test_a_dry_run_says_who_holds_what_without_a_weight(capsys):
    pytest.importorskip("puna.planner.memory", reason="the planner's formulas")
    layout = ["tensor=8", "pipeline=16", "microbatches=16", "shard=128"]
    out = told(capsys, "405b", "lm.rows=2048", "--layout", *layout, "--dry-run")
    assert out.startswith("405,853,388,800 parameters over 16,384 processes: shard=128 pipeline=16 tensor=8")
    assert "pipeline rank 0: layers 0 to 6 and embedding, 1/8 of each matrix, cut over 128 ranks" in out
    assert "pipeline rank 1 (so do the 13 after it" in out
    assert "pipeline rank 15: layers 119 to 125 and output" in out
    assert "shard: gather of weights" in out and "tensor: gather of activations" in out


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["8c", "--dry-run"], "'8c' is no size"),
        (["8b", "--dry-run", "--layout", "tensor=16"], "n_kv_heads=8 is not divisible by tensor=16"),
        (["8b", "--dry-run", "--layout", "pipeline=64"], "32 layers cannot fill 64 stages"),
        (["8b", "--dry-run", "--layout", "context=3"], "sequence_length=8192 is not divisible by 2 * context = 6"),
        (["8b", "--dry-run", "--layout", "tensr=2"], "did you mean 'tensor'?"),
        (["8b"], "--data is not given"),
    ],
)
def test_what_cannot_be_laid_out_is_refused_with_a_hint(arguments, says, capsys):
    assert main(["pretrain", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and "hint:" in error


def test_processes_that_do_not_match_the_layout_are_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    from train_world import build

    world = build(tmp_path / "world")
    recipe = tmp_path / "run.json"
    recipe.write_text(json.dumps({"lm": {}, "model": {"vocab_size": 528, "context": 128, **SHAPE}}))
    monkeypatch.setenv("WORLD_SIZE", "3")
    given = ["--data", str(world.tokens.path), "--tokenizer", str(world.tokenizer.path), "--out", str(tmp_path / "out")]
    assert main(["pretrain", str(recipe), "--layout", "tensor=2", "shard=2", *given]) == 2
    assert "needs 4 processes, there are 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 64}
