"""A small world for the engine: a random Llama that knows 700 tokens, and a tokenizer made by hand."""

import torch

from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig
from puna.tokenizer import Tokenizer

CONFIG = LlamaConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=700, context=96, rope_theta=5e5
)


def hand_made_tokenizer() -> Tokenizer:
    """Single bytes, and a few hundred pairs and words."""
    letters = "abcdefghijklmnopqrstuvwxyz "
    words = [a + b for a in letters for b in "aeiou "] + [" the", " and", "é", "東京", "ing", "\n\n"]
    ranks = {bytes([b]): b for b in range(256)}
    for word in words:
        ranks.setdefault(word.encode(), len(ranks))
    return Tokenizer(ranks)


def random_model(config: LlamaConfig = CONFIG, seed: int = 0) -> Llama:
    """Weights so large that every token's distribution is sharp and depends on all that precedes it."""
    model = Llama(config).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                scale = 0.6 if "output" in name or "embeddings" in name else 0.25
                weight.normal_(0.0, scale, generator=generator)
    return model
