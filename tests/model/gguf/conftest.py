import pytest

from puna.model.sizes import LlamaConfig, RopeScaling
from puna.tokenizer import Tokenizer

# Grouped queries, Llama 3.1's scaling, and heads that are not dim / n_heads wide.
CONFIG = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, ffn_dim=96, vocab_size=530, context=256, rope_theta=5e5,
    rope_scaling=RopeScaling(original_context=32),
)  # fmt: skip


@pytest.fixture(scope="session")
def config() -> LlamaConfig:
    return CONFIG


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    words = [b"th", b"an", b"the", b"than", b" the", b" than", "é".encode(), "山".encode()[:2], "山".encode()]
    return Tokenizer({word: id for id, word in enumerate([*(bytes([b]) for b in range(256)), *words])})
