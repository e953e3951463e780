"""A checkpoint is answered from, on the kernels for the CPU, without PyTorch: importing it takes longer than answering."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tiny_llama import hand_made_tokenizer
from worlds import WIDE

from puna.inference.native import unfit
from puna.model.checkpoint import save_model
from puna.model.llama import Llama
from puna.model.llama import rope_frequencies as torch_frequencies
from puna.model.rope import rope_frequencies
from puna.model.sizes import SIZES
from puna.quant import QuantConfig, quantise

kernels = pytest.mark.skipif(unfit(WIDE) is not None, reason=str(unfit(WIDE)))

ANSWERS = """
import json, sys
from puna.chat import Continuation, Request, Sampling, user
from puna.inference.engine import Engine

engine = Engine.load(sys.argv[1], threads=2, cache_bytes=1 << 22, lookahead=2)
kinds = [
    Sampling(max_tokens=9, ignore_end=True),
    Sampling(max_tokens=9, temperature=0.8, top_p=0.9, seed=1, repetition_penalty=1.2, logprobs=2, ignore_end=True),
    Sampling(max_tokens=9, temperature=1.2, min_p=0.01, seed=2, prompt_logprobs=1, logit_bias=((65, 1.0),)),
]
asked = [Request(prompt="the sea", sampling=sampling) for sampling in kinds]
texts = [answer.text for answer in engine.generate([*asked, Request(dialog=(user("hi"),), sampling=kinds[1])])]
texts += ["".join(piece.text for piece in engine.stream(asked[1]))]
scores = engine.score([Continuation(text=" and the sand", context="the sea")])
print(json.dumps([texts, scores, "torch" in sys.modules]))
"""
CHAT = """
import sys
from puna.cli import main

code = main(["chat", sys.argv[1], "hi", "--max-tokens", "5", "--seed", "1", "--no-tools"])
print("torch" in sys.modules, code)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with a tokenizer: in bfloat16 as Hugging Face has it, and quantised."""
    root = tmp_path_factory.mktemp("cold")
    shape = replace(WIDE, dim=64, head_dim=16, n_heads=4, n_kv_heads=2, ffn_dim=96)
    save_model(Llama(shape).init_weights(0), hand_made_tokenizer(), root / "numbers", torch.bfloat16)
    quantise(QuantConfig(bits=4), root / "numbers", out=root / "codes")
    return root


def run(script: str, path) -> str:
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@kernels
@pytest.mark.parametrize("folder", ["numbers", "codes"])
def test_the_engine_answers_without_pytorch_what_it_answers_with_it(folders, folder):
    texts, scores, imported = json.loads(run(ANSWERS, folders / folder))
    assert not imported
    assert json.loads(run("import torch\n" + ANSWERS, folders / folder)) == [texts, scores, True]


@kernels
def test_a_chat_in_the_terminal_needs_no_pytorch(folders):
    assert run(CHAT, folders / "codes") == "False 0"


@pytest.mark.parametrize("name", SIZES)
def test_rotary_frequencies_are_the_models_to_the_last_bit(name):
    assert torch.equal(torch.from_numpy(rope_frequencies(SIZES[name])), torch_frequencies(SIZES[name]))
