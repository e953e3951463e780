"""A small checkpoint whose matrices get unequal, correlated inputs, as trained ones do, and two texts to read."""

import random
from dataclasses import replace
from pathlib import Path

import torch

from puna.model.checkpoint import save_model
from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig
from puna.tokenizer.bpe import MODEL_FILE, write_ranks

SHAPE = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=128, vocab_size=512, context=64, rope_theta=5e5
)


def structured_model(tied: bool = False) -> Llama:
    """Random weights, every eighth channel of the hidden states ten times as loud, and neighbouring channels alike."""
    model = Llama(replace(SHAPE, tied=tied)).init_weights(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        model.tok_embeddings.weight.normal_(0.0, 0.12, generator=generator)
        model.tok_embeddings.weight[:, 1::2] += model.tok_embeddings.weight[:, ::2]
        for layer in model.layers:
            for norm in (layer.attention_norm, layer.ffn_norm):
                norm.weight[::8] = 10.0
            for weight in layer.parameters():
                if weight.ndim == 2:
                    weight.mul_(1.5)
        model.layers[0].feed_forward.w2.weight.mul_(3)  # a matrix that matters more than the others
    return model


def text(seed: int, words: int = 1500) -> str:
    """Words of a small vocabulary in random order."""
    rng = random.Random(seed)
    known = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)]
    return " ".join(random.Random(seed + 100).choices(known, k=words))


def write_all(folder: Path, tied: bool = False) -> Path:
    """The checkpoint at folder/model, with calibration.txt and heldout.txt beside it."""
    folder.mkdir(exist_ok=True)
    write_ranks(folder / MODEL_FILE, {bytes([b]): b for b in range(256)})
    save_model(structured_model(tied), folder, folder / "model")
    (folder / "calibration.txt").write_text(text(1))
    (folder / "heldout.txt").write_text(text(2))
    return folder
