# ruff: noqa: E402 (the benchmarks cannot be imported where the peer is not there)
"""llama.cpp itself: it loads our files, computes what we compute, cuts text as we do; and we read the files that it makes."""

from pathlib import Path

import pytest
import torch

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make test-peers")
transformers = pytest.importorskip("transformers")

from encode import documents
from families import BYTES, RELEASED, Cut, reference
from llamacpp import (
    Theirs,
    agrees,
    quantised_by_llama_cpp,
    read_by_both,
    same_greedy,
    strings,
    tokens_compared,
    widened,
)
from parity import TEXT, greedy

from puna.model.gguf import KINDS, load_gguf, write_gguf
from puna.model.llama import Llama, attend_with
from puna.model.opening import load_checkpoint
from puna.model.sizes import LlamaConfig
from puna.tokenizer import Tokenizer
from puna.tokenizer.train import train_ranks

pytestmark = pytest.mark.peers
# Kinds that we read and do not write, by llama.cpp's numbers.
ONLY_READ = {"Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_M": 12, "Q5_K_M": 17, "Q6_K": 18}


@pytest.fixture(scope="module")
def quantisable(tmp_path_factory) -> Path:
    """An F32 file whose rows divide by 256, so that no kind has to give way to another."""
    folder = tmp_path_factory.mktemp("quantisable")
    reference(RELEASED["llama-3.1-8b"], Cut(layers=8, width=512, ffn=512), 0).save_pretrained(folder)
    write_gguf(load_checkpoint(folder), BYTES, folder / "F32.gguf", "F32")
    return folder / "F32.gguf"


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    ids = torch.randint(BYTES.vocab_size, (8, 127), generator=torch.Generator().manual_seed(5)).tolist()
    return [[BYTES.bos, *row] for row in ids]


@pytest.fixture(scope="module", params=["llama-1-7b", "llama-3.1-8b", "llama-3.1-405b", "llama-3.2-1b"])
def folder(request, tmp_path_factory) -> Path:
    """A narrow model of a family, as transformers writes it."""
    folder = tmp_path_factory.mktemp("family")
    reference(RELEASED[request.param], Cut(width=1024, ffn=256), 0).save_pretrained(folder)
    return folder


def test_llama_cpp_our_engine_and_transformers_draw_the_same_greedy_tokens(tmp_path, folder):
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert greedy(theirs, folder, 96)["same"] == 96
    write_gguf(load_checkpoint(folder), BYTES, tmp_path / "m.gguf", "F32")
    prompt = torch.tensor([[BYTES.bos, *BYTES.encode(TEXT)]])
    wanted = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=96, do_sample=False)
    drawn = Theirs(tmp_path / "m.gguf", 256).greedy(prompt[0].tolist(), 96)
    assert drawn == wanted[0, prompt.shape[1] :].tolist()
    assert len(set(drawn)) > 20


def test_in_half_precision_greedy_tokens_differ_only_where_two_are_as_good(tmp_path, folder):
    """llama.cpp rounds what it multiplies F16 weights with to float16: logits move by some thousandths."""
    write_gguf(load_checkpoint(folder), BYTES, tmp_path / "m.gguf", "F16")
    prompts = [[BYTES.bos, *BYTES.encode(TEXT[start : start + 24])] for start in range(4)]
    said = same_greedy(tmp_path / "m.gguf", prompts, 64, 128)
    assert all(gap < 0.02 for gap in said["gaps at first differences"]), said
    assert said["same"] > 100


@pytest.mark.parametrize("kind", KINDS)
def test_both_read_one_file_to_the_same_perplexity(tmp_path, quantisable, texts, kind):
    write_gguf(load_gguf(quantisable), BYTES, tmp_path / "m.gguf", kind)
    read = read_by_both(tmp_path / "m.gguf", quantisable, texts)
    assert agrees(read), read
    if kind == "F32":  # where llama.cpp rounds nothing
        assert read["largest logit difference"] < 1e-4


@pytest.mark.parametrize("kind", ONLY_READ)
def test_files_that_llama_cpp_quantised_are_read_to_its_perplexity(tmp_path, quantisable, texts, kind):
    quantised_by_llama_cpp(quantisable, tmp_path / "m.gguf", ONLY_READ[kind])
    assert tmp_path.joinpath("m.gguf").stat().st_size < quantisable.stat().st_size / 2
    read = read_by_both(tmp_path / "m.gguf", quantisable, texts)
    assert agrees(read), read


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K_M"])
def test_our_quantisers_lose_no_more_than_llama_cpps(tmp_path, quantisable, texts, kind):
    write_gguf(load_gguf(quantisable), BYTES, tmp_path / "ours.gguf", kind)
    quantised_by_llama_cpp(quantisable, tmp_path / "theirs.gguf", KINDS[kind][0])
    ours, theirs = (read_by_both(tmp_path / f"{who}.gguf", quantisable, texts) for who in ("ours", "theirs"))
    assert ours["KL from F32, nats per token"] < 1.02 * theirs["KL from F32, nats per token"]
    assert ours["bytes"] < 1.01 * theirs["bytes"]


def test_llama_cpp_cuts_and_merges_text_as_we_and_tiktoken_do(tmp_path):
    tokenizer = Tokenizer(train_ranks(documents(None, 0.3), 1200))
    model = Llama(LlamaConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=16, ffn_dim=32, vocab_size=tokenizer.vocab_size, context=64))  # fmt: skip
    write_gguf(model.init_weights(0), tokenizer, tmp_path / "m.gguf", "F16")
    told = tokens_compared(tmp_path / "m.gguf", tokenizer, strings(600, 1))
    assert (told["unlike llama.cpp"], told["unlike tiktoken"]) == (0, 0), told["differing"][:3]
    peer = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    first = len(tokenizer.ranks)
    named = {name: peer.tokenize(name.encode(), add_bos=False, special=True) for name in tokenizer.special_names}
    assert named == {name: [first + place] for place, name in enumerate(tokenizer.special_names)}
    assert peer.tokenize(b"the", add_bos=True) == [tokenizer.bos, *tokenizer.encode("the")]


@torch.no_grad()
def test_a_widened_model_computes_the_same():
    config = LlamaConfig(dim=192, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=32, ffn_dim=200, vocab_size=300, context=64)  # fmt: skip
    model = Llama(config).init_weights(0)
    wide = widened(model)
    assert (wide.config.dim, wide.config.n_heads * 32 % 256, wide.config.ffn_dim) == (256, 0, 256)
    tokens = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))
    logits = [m(tokens, torch.arange(40).expand(2, -1), attend_with(None)) for m in (model, wide)]
    assert (logits[0] - logits[1]).abs().max() < 1e-5
