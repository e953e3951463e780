"""The Llama transformer, every dense generation of it, in one file that can be checked against the papers.

    x = embed(tokens)
    per layer:  x += wo . attend(rope(wq . norm(x)), rope(wk . norm(x)), wv . norm(x))
                x += w2 . (silu(w1 . norm(x)) * w3 . norm(x))
    logits = output . norm(x)

Llama 1 (arXiv 2302.13971) set the form: RMSNorm before each block, SwiGLU, rotary positions, no biases. Llama 2
(2307.09288) and 3 (2407.21783) added grouped-query attention: `K` key/value heads serve `H` query heads. Llama 3.1
stretched the rotary frequencies to reach 128K positions; Llama 3.2's small models tie output and embedding.

Modules carry Meta's names, so released weights load without a map. Rotary pairs are Meta's too: components (2i, 2i+1)
of a head rotate together (Hugging Face pairs i with i + E/2, hence the permutation in `convert.py`).

Shapes: B batch, T query tokens, S key/value tokens, D width, F feed-forward width, H query heads, K key/value heads,
E head width, V vocabulary, L layers.
"""

import math
from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.kernels.attention import attention
from puna.model.sizes import LlamaConfig, RopeScaling

# attend(layer, q (B, T, H, E), k (B, T, K, E), v (B, T, K, E)) -> (B, T, H, E). It owns the mask and any cache: training
# passes causal or document-masked attention, inference one that also reads the keys and values of earlier tokens.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Llama(nn.Module):
    """A Llama of any published size. `forward` is the only way through it."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        # Given its weights it draws none: on the meta device that would import PyTorch's compiler, which takes two seconds.
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.zeros(config.vocab_size, config.dim), freeze=False)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.output.weight = self.tok_embeddings.weight

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Logits (B, T, V) for `tokens` (B, T) at `positions` (B, T), both int64."""
        return self.output(self.hidden(tokens, positions, attend))

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The normalised last hidden states (B, T, D), for a head other than the vocabulary's (a reward model)."""
        x = self.tok_embeddings(tokens)
        rotation = rope_rotation(self.config, positions)
        for layer in self.layers:
            x = layer(x, rotation, attend)
        return self.norm(x)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Llama":
        """Draw all weights anew; the result depends on `seed` and the shapes alone.

        A matrix is normal with deviation 1/sqrt(its inputs), which at Llama's widths is the customary 0.02, and lets
        a small model's attention tell tokens apart from the first step; the embedding has 0.02. Matrices that write
        into the residual stream (wo, w2) are scaled by 1/sqrt(2 L), so that its variance does not grow with depth.
        Norms are one.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            draw(name, weight, self.config.n_layers, generator)
        return self


def draw(name: str, weight: Tensor, n_layers: int, generator: torch.Generator) -> None:
    """Fill one weight of a new model, as `init_weights` says."""
    if weight.ndim == 1:
        weight.fill_(1.0)
        return
    std = 0.02 if name.startswith(("tok_embeddings", "output")) else weight.shape[1] ** -0.5
    if name.endswith(("wo.weight", "w2.weight")):
        std /= math.sqrt(2 * n_layers)
    weight.normal_(0.0, std, generator=generator)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on a normalised copy and added back."""

    def __init__(self, config: LlamaConfig, index: int):
        super().__init__()
        self.attention = Attention(config, index)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, rotation: Tensor, attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, attend)
        return x + self.feed_forward(self.ffn_norm(x))


class Attention(nn.Module):
    """Projections and rotation; what attends to what is `attend`'s business."""

    def __init__(self, config: LlamaConfig, index: int):
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, attend: Attend) -> Tensor:
        B, T, _ = x.shape
        q = rotate(self.wq(x).view(B, T, -1, self.head_dim), rotation)  # (B, T, H, E)
        k = rotate(self.wk(x).view(B, T, -1, self.head_dim), rotation)  # (B, T, K, E)
        v = self.wv(x).view(B, T, -1, self.head_dim)
        return self.wo(attend(self.index, q, k, v).reshape(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """The angle per position of each rotary pair, (E/2,), float32, after Llama 3.1's scaling if the config has it."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    return frequencies if config.rope_scaling is None else scale_frequencies(frequencies, config.rope_scaling)


def scale_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's stretch: slow components by `factor`, fast ones not at all, a linear blend between.

    "Slow" means a wavelength above original_context / low_freq_factor, "fast" below original_context / high_freq_factor.
    """
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_context / wavelengths
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rope_rotation(config: LlamaConfig, positions: Tensor) -> Tensor:
    """The turn of each pair at `positions` (B, T) as unit complex numbers, (B, T, 1, E/2)."""
    angles = positions[..., None, None].float() * rope_frequencies(config).to(positions.device)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair (2i, 2i+1) of the heads `x` (B, T, heads, E): one complex product."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def attend_with(mask: Tensor | None) -> Attend:
    """Attention within the given tokens: causal if `mask` is None, else where `mask` (B or 1, 1, T, T) is true."""
    return lambda _layer, q, k, v: attention(q, k, v, mask)


class WithinDocuments:
    """Attention within the given tokens and within each document: causal, where `documents` (B, T) is the same."""

    def __init__(self, documents: Tensor):
        self.documents = documents

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, T, T), true where a token may attend."""
        return document_mask(self.documents)

    def __call__(self, _layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, self.mask)


def document_mask(documents: Tensor) -> Tensor:
    """(B, 1, T, T), true where a token may attend: not ahead, and within its own document.

    `documents` (B, T) numbers the document of each token.
    """
    T = documents.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=documents.device).tril()
    return (documents[:, None, :, None] == documents[:, None, None, :]) & causal
