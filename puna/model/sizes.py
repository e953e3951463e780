"""Every published dense Llama, in one table, and what a size costs.

Feed-forward widths are the released ones (the papers give the rule `2/3 * 4 * dim * multiplier`, rounded up; the table
gives its results). Traps in public sources: some list Llama 2 7B and 13B with 8 key/value heads and a rotary base of 500,000
(the weights have 32 and 40, and 10,000), some give all of Llama 1 an epsilon of 1e-6 (65B has 1e-5), and Meta's code
stretches Llama 3.2's positions by 8 where the released configurations say 32. The table follows the released files.
"""

from dataclasses import dataclass

from puna.config import require
from puna.errors import shown

MOST = 1 << 31  # of any size of a model: no Llama comes near, and what is computed from sizes stays small


def _positive(name: str, value: object) -> None:
    real = type(value) in (int, float) and 1e-30 < value < 1e30  # a NaN is not between
    require(real, f"{name}={shown(value)} must be a number above 0")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretch of the rotary frequencies; see `llama.scale_frequencies`."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_context"):
            _positive(name, getattr(self, name))
        require(type(self.original_context) is int, f"original_context={self.original_context} must be a whole number")
        require(self.original_context <= MOST, f"original_context={self.original_context:,} must be at most {MOST:,}")
        low, high = self.low_freq_factor, self.high_freq_factor
        require(low < high, f"low_freq_factor={low} must be below high_freq_factor={high}")


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a Llama."""

    dim: int  # D
    n_layers: int  # L
    n_heads: int  # H
    n_kv_heads: int  # K
    head_dim: int  # E
    ffn_dim: int  # F
    vocab_size: int  # V
    context: int  # tokens
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied: bool = False  # the output matrix is the embedding

    def __post_init__(self) -> None:
        for name in (
            "dim",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "ffn_dim",
            "vocab_size",
            "context",
        ):
            value = getattr(self, name)
            whole = type(value) is int and 0 < value <= MOST
            require(whole, f"{name}={shown(value)} must be positive, a whole number of at most {MOST:,}")
        for name in ("rope_theta", "norm_eps"):
            _positive(name, getattr(self, name))
        require(type(self.tied) is bool, f"tied={shown(self.tied)} must be true or false")
        divides = self.n_heads % self.n_kv_heads == 0
        require(divides, f"n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}")
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: rotary positions turn pairs")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each weight, by Meta's names. Nothing is allocated, whatever the sizes claim."""
        heads, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        found = {"tok_embeddings.weight": (self.vocab_size, self.dim), "norm.weight": (self.dim,)}
        if not self.tied:
            found["output.weight"] = (self.vocab_size, self.dim)
        layer = {
            "attention.wq": (heads, self.dim),
            "attention.wk": (kv, self.dim),
            "attention.wv": (kv, self.dim),
            "attention.wo": (self.dim, heads),
            "feed_forward.w1": (self.ffn_dim, self.dim),
            "feed_forward.w2": (self.dim, self.ffn_dim),
            "feed_forward.w3": (self.ffn_dim, self.dim),
            "attention_norm": (self.dim,),
            "ffn_norm": (self.dim,),
        }
        for index in range(self.n_layers):
            found |= {f"layers.{index}.{module}.weight": shape for module, shape in layer.items()}
        return found

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer."""
        heads = 2 * self.n_heads + 2 * self.n_kv_heads
        return self.dim * (heads * self.head_dim + 3 * self.ffn_dim + 2)

    @property
    def parameters(self) -> int:
        """All weights; a tied output counts once."""
        embeddings = self.vocab_size * self.dim * (1 if self.tied else 2)
        return embeddings + self.n_layers * self.layer_parameters + self.dim

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """What the key/value cache grows by for each token."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * bytes_per_value

    def train_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> int:
        """Forward and backward floating-point operations per token: 6 per matrix weight, plus attention.

        Attention costs 12 * L * H * E * T when every pair counts; half of that with `causal`. The embedding lookup
        costs nothing, the output projection counts whether or not it is tied.
        """
        matrices = self.n_layers * (self.layer_parameters - 2 * self.dim) + self.vocab_size * self.dim
        attention = 12 * self.n_layers * self.n_heads * self.head_dim * sequence_length
        return 6 * matrices + attention // (2 if causal else 1)


def _llama1(dim: int, layers: int, heads: int, ffn: int, norm_eps: float = 1e-6) -> LlamaConfig:
    return LlamaConfig(
        dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=heads, head_dim=128, ffn_dim=ffn,
        vocab_size=32_000, context=2048, norm_eps=norm_eps,
    )  # fmt: skip


def _llama2(dim: int, layers: int, heads: int, kv_heads: int, ffn: int) -> LlamaConfig:
    return LlamaConfig(
        dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=kv_heads, head_dim=128, ffn_dim=ffn,
        vocab_size=32_000, context=4096,
    )  # fmt: skip


def _llama3(
    dim: int,
    layers: int,
    heads: int,
    ffn: int,
    scaling: RopeScaling | None,
    *,
    head_dim: int = 128,
    tied: bool = False,
) -> LlamaConfig:
    return LlamaConfig(
        dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=8, head_dim=head_dim, ffn_dim=ffn,
        vocab_size=128_256, context=131_072 if scaling else 8192, rope_theta=500_000.0, rope_scaling=scaling, tied=tied,
    )  # fmt: skip


_STRETCH_8 = RopeScaling(factor=8.0)  # Llama 3.1 and 3.3
_STRETCH_32 = RopeScaling(factor=32.0)  # Llama 3.2

SIZES: dict[str, LlamaConfig] = {
    "llama-1-7b": _llama1(4096, 32, 32, 11008),
    "llama-1-13b": _llama1(5120, 40, 40, 13824),
    "llama-1-33b": _llama1(6656, 60, 52, 17920),
    "llama-1-65b": _llama1(8192, 80, 64, 22016, norm_eps=1e-5),
    "llama-2-7b": _llama2(4096, 32, 32, 32, 11008),
    "llama-2-13b": _llama2(5120, 40, 40, 40, 13824),
    "llama-2-70b": _llama2(8192, 80, 64, 8, 28672),
    "llama-3-8b": _llama3(4096, 32, 32, 14336, None),
    "llama-3-70b": _llama3(8192, 80, 64, 28672, None),
    "llama-3.1-8b": _llama3(4096, 32, 32, 14336, _STRETCH_8),
    "llama-3.1-70b": _llama3(8192, 80, 64, 28672, _STRETCH_8),
    "llama-3.1-405b": _llama3(16384, 126, 128, 53248, _STRETCH_8),
    "llama-3.2-1b": _llama3(2048, 16, 32, 8192, _STRETCH_32, head_dim=64, tied=True),
    "llama-3.2-3b": _llama3(3072, 28, 24, 8192, _STRETCH_32, tied=True),
    "llama-3.3-70b": _llama3(8192, 80, 64, 28672, _STRETCH_8),
}
