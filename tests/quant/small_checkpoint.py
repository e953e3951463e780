import dataclasses
from pathlib import Path

import torch

from puna.artifacts import stage
from puna.model.checkpoint import save_model
from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig

CONFIG = LlamaConfig(
    dim=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=12, ffn_dim=72, vocab_size=300, context=64, rope_theta=5e5
)


@stage("checkpoint")
def make_checkpoint(config: dict, *, out: Path) -> None:
    shape = dataclasses.replace(CONFIG, tied=config["tied"])
    model = Llama(shape)
    generator = torch.Generator().manual_seed(config["seed"])
    with torch.no_grad():  # its own weights: how far quantisation moves the logits depends on their size
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0.0, 0.08, generator=generator)
    save_model(model, None, out, torch.bfloat16)
