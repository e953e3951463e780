"""Conversion: every way round leaves weights and token ids as they were, and nothing half-made."""

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puna.errors import ArtifactError, ConfigError
from puna.model import conversion
from puna.model.checkpoint import empty_model, save_model
from puna.model.conversion import convert
from puna.model.inspect import inspect
from puna.model.llama import Llama
from puna.model.opening import checkpoint_tokenizer, load_checkpoint, open_checkpoint
from puna.model.sizes import LlamaConfig, RopeScaling
from puna.model.verify import VerifyConfig, compare
from puna.tokenizer.bpe import MODEL_FILE, write_ranks
from puna.tokenizer.train import train_ranks

SHAPE = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=576, context=512,
    rope_theta=500_000.0, rope_scaling=RopeScaling(original_context=64),
)  # fmt: skip
TARGETS = ("huggingface", "meta", "gguf")
TEXT = "Llamas hum; 3141 herds, naïve <|eot_id|> hills.\n\n  x"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    ranks = train_ranks(
        [" ".join(f"{a}{b} hums" for a in "herd hill llama puna cold".split() for b in "abcdefghij")], 276
    )
    write_ranks(folder / MODEL_FILE, ranks)
    save_model(Llama(SHAPE).init_weights(0), folder, folder / "model")
    return folder / "model"


def weights(path):
    return dict(load_checkpoint(path).named_parameters())


@pytest.mark.parametrize(("first", "second"), list(itertools.product(TARGETS, TARGETS)))
def test_there_and_on_and_back_gives_the_same_bits_and_the_same_ids(source, tmp_path, first, second):
    places = [tmp_path / f"{number}-{to}" for number, to in enumerate((first, second, "huggingface"))]
    for place, before, to in zip(places, [source, *places], (first, second, "huggingface")):
        convert(before, place, to)
    before, after = weights(source), weights(places[-1])
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    expected = checkpoint_tokenizer(source).encode(TEXT)
    assert all(checkpoint_tokenizer(place).encode(TEXT) == expected for place in places)


@pytest.mark.parametrize(("kind", "tolerance"), [("BF16", 0.05), ("Q8_0", 0.05), ("Q4_K_M", 0.3), ("Q4_0", 0.3)])
def test_a_smaller_form_loses_no_more_than_its_bits(source, tmp_path, kind, tolerance):
    convert(source, tmp_path / "small.gguf", "gguf", kind)
    asked = VerifyConfig(prompts=2, tokens=32, tolerance=tolerance)
    assert compare(load_checkpoint(source), load_checkpoint(tmp_path / "small.gguf"), asked).same


def test_inspection_tells_the_formats_apart(source, tmp_path):
    for to in TARGETS:
        convert(source, tmp_path / to, to)
        with open_checkpoint(tmp_path / to) as opened:
            found = inspect(opened.kind, opened.config, opened.weights)
        assert found.kind == to and set(found.forms) == {"F32"}
        assert replace(found.config, context=SHAPE.context) == SHAPE


def test_transformers_reads_what_came_by_way_of_gguf(source, tmp_path):
    transformers = pytest.importorskip("transformers")
    convert(source, tmp_path / "a.gguf", "gguf")
    convert(tmp_path / "a.gguf", tmp_path / "b", "huggingface")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    tokens = torch.randint(500, (2, 40))
    from puna.model.llama import attend_with

    with torch.no_grad():
        ours = load_checkpoint(source)(tokens, torch.arange(40).expand_as(tokens), attend_with(None))
        assert (ours - theirs(tokens).logits).abs().max() < 1e-4


def test_what_cannot_be_is_refused_and_leaves_nothing(source, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="Q4_0"):
        convert(source, tmp_path / "a", "meta", "Q4_0")
    (tmp_path / "there").mkdir()
    with pytest.raises(ArtifactError, match="exists"):
        convert(source, tmp_path / "there", "meta")
    with pytest.raises(ArtifactError, match="does not exist"):
        convert(tmp_path / "missing", tmp_path / "b", "gguf")

    def broken(*_arguments, **_named):
        raise OSError("disk full")

    monkeypatch.setattr(conversion, "write_meta", broken)
    with pytest.raises(OSError, match="disk full"):
        convert(source, tmp_path / "c", "meta")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]


PEAK = """
import sys
from pathlib import Path
from puna.model.conversion import convert
# Of this program alone; what getrusage tells begins with the memory of the process that started it.
peak = lambda: next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
convert(Path(sys.argv[5]), Path(sys.argv[5] + "-out"), sys.argv[3], sys.argv[4])  # loads what is loaded on first use
before = peak()
convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux tells it")
@pytest.mark.parametrize(("to", "form"), [("gguf", "Q8_0"), ("huggingface", "F32"), ("meta", "BF16")])
def test_converting_takes_no_more_memory_than_the_target_is_large(tmp_path, to, form):
    """Quantised kinds are made from float32, which is four times their size: so the model must never be there whole."""
    config = replace(SHAPE, dim=1024, ffn_dim=4096, n_heads=16, n_kv_heads=16, head_dim=64, n_layers=8)
    model = empty_model(config, torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    save_model(model, None, tmp_path / "source")
    save_model(Llama(SHAPE).init_weights(0), None, tmp_path / "tiny")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "source"), str(tmp_path / "out"), to, form, str(tmp_path / "tiny")],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    out = tmp_path / "out"
    size = sum(file.stat().st_size for file in ([out] if out.is_file() else out.iterdir()))
    assert size > 130e6
    assert int(done.stdout.splitlines()[-1]) < (1.1 * size if to == "meta" else 0.6 * size)
