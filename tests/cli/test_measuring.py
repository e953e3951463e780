"""`puna eval` and `puna quantize` as a user runs them, on every format."""

import json

import pytest
import torch

from puna.cli import main
from puna.model.checkpoint import save_model
from puna.model.conversion import convert
from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig
from puna.tokenizer.bpe import MODEL_FILE, write_ranks

SHAPE = LlamaConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=64, vocab_size=512, context=2048, rope_theta=5e5
)
TEXT = "Herds hum on the high grassland.\nThey count: 3, 1, 4, 1, 5.\n" * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a tokenizer of bytes, and a text of two excerpts."""
    folder = tmp_path_factory.mktemp("made")
    write_ranks(folder / MODEL_FILE, {bytes([b]): b for b in range(256)})
    save_model(Llama(SHAPE).init_weights(0), folder, folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


def evaluated(capsys, *arguments) -> dict:
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("to", ["meta", "gguf", "huggingface"])
def test_every_format_reads_the_same_text_with_the_same_bits(folder, tmp_path, capsys, to):
    convert(folder / "model", tmp_path / "other", to)
    ours = evaluated(capsys, folder / "model", "--text", folder / "text.txt")["text"]
    theirs = evaluated(capsys, tmp_path / "other", "--text", folder / "text.txt")["text"]
    assert ours["overall"] == theirs["overall"] and ours["bytes"] == len(TEXT.encode())
    assert ours["tokens"] == ours["bytes"]  # a token is a byte, so perplexity is 2 to the power of bits per byte
    assert ours["perplexity"]["value"] == pytest.approx(2 ** ours["overall"]["value"], rel=1e-4)
    assert ours["overall"]["low"] <= ours["overall"]["value"] <= ours["overall"]["high"]


def test_a_quantised_checkpoint_is_made_and_read(folder, tmp_path, capsys):
    convert(folder / "model", tmp_path / "llama.gguf", "gguf")
    command = ["quantize", str(tmp_path / "llama.gguf"), str(tmp_path / "small"), "--bits", "8", "--group", "64"]
    assert main(command) == 0
    assert "bits each" in capsys.readouterr().out
    before = evaluated(capsys, folder / "model", "--text", folder / "text.txt")["text"]["overall"]["value"]
    after = evaluated(capsys, tmp_path / "small", "--text", folder / "text.txt")["text"]["overall"]["value"]
    assert before != after and after == pytest.approx(before, rel=1e-3)
    assert main(command) == 0  # complete: nothing is done again


def test_a_checkpoint_from_elsewhere_reads_the_sample_chooses_and_is_set_tasks(folder, tmp_path, capsys):
    items = [{"context": "Herds", "options": [" hum", " count"], "answer": 0, "group": "animals"}] * 3
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    asked = ["--max-bytes", 3000, "--suite", "text", "choice", "tasks", "--choice", tmp_path / "items.jsonl"]
    found = evaluated(capsys, folder / "model", *asked, "--limit", 1)
    assert found["text"]["documents"] >= 1 and "Python" in found["text"]["origin"]
    assert found["choice"]["animals"]["items"] == 3
    assert found["tasks"]["verified"]["passed"] == 0 and "invented" in found["tasks"]["origin"]
    assert not {"facts", "unknown"} & found["tasks"]["tasks"].keys()


def test_the_lines_for_a_person_name_the_measures(folder, capsys):
    assert main(["eval", str(folder / "model"), "--text", str(folder / "text.txt")]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("bits per byte", "perplexity", "tokens/s", "["))


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "no text"), (b" \n ", "no text"), (b"\xff\xfe", "UTF-8"), (b"a", "too short")]
)
def test_text_that_cannot_be_measured_is_an_error_with_a_hint(folder, tmp_path, capsys, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    assert main(["eval", str(folder / "model"), "--text", str(tmp_path / "bad.txt")]) != 0
    told = capsys.readouterr().err
    assert message in told and "hint:" in told


def test_what_is_missing_is_named(folder, tmp_path, capsys):
    save_model(Llama(SHAPE).init_weights(0), None, tmp_path / "bare", torch.bfloat16)
    for arguments, message in (
        ([tmp_path / "bare"], "has no tokenizer"),
        ([tmp_path / "missing"], "does not exist"),
        ([folder / "model", "--text", tmp_path / "missing.txt"], "missing.txt"),
        ([folder / "model", "--suite", "choice"], "no multiple choice"),
        ([folder / "model", "--choice", folder / "text.txt"], "line 1"),
        ([folder / "model", "--limit", "0"], "--limit 0"),
    ):
        assert main(["eval", *map(str, arguments)]) != 0
        told = capsys.readouterr().err
        assert message in told and "hint:" in told


def test_a_budget_says_what_each_layer_got_and_what_it_cost(folder, tmp_path, capsys):
    text = str(folder / "text.txt")
    command = ["quantize", str(folder / "model"), str(tmp_path / "mixed"), "--budget", "6bpw", "--calibrate", text]
    assert main([*command, "--tokens", "1024", "--heldout", text, "--quality-tokens", "512"]) == 0
    told = capsys.readouterr().out
    assert all(part in told for part in ("layer 0", "layer 1", "tok_embeddings", "predicted KL", "perplexity x"))
    assert main([*command[:2], str(tmp_path / "none"), "--budget", "1bpw", "--calibrate", text]) != 0
    assert "the smallest that this can be is" in capsys.readouterr().err
    assert main([*command[:2], str(tmp_path / "none2"), "--budget", "little"]) == 2


def test_quantize_leaves_what_is_not_its_own_alone(folder, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    assert main(["quantize", str(folder / "model"), str(tmp_path / "full")]) != 0
    assert "exists" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("verb", ["eval", "quantize"])
def test_no_threads_is_a_setting_that_is_refused_and_leaves_nothing(folder, tmp_path, capsys, verb):
    out = [str(tmp_path / "none")] if verb == "quantize" else []
    assert main([verb, str(folder / "model"), *out, "--threads", "0"]) == 2
    assert "--threads 0 must be positive" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
