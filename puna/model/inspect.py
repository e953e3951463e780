"""What a checkpoint is, without loading it: shape, tensors, size, the memory it takes to run, and what is odd about it.

Only headers are read, so the answer for 400 GB comes as fast as for 4 MB. Memory is that of the weights in one format,
plus the key/value cache in bfloat16 for a context; activations and the program come on top (some hundred megabytes).

    bytes = matrices * bits / 8 + cache bytes per token * tokens

Group-wise INT8 and INT4 carry a 16-bit scale for each 32 weights (8.5 and 4.5 bits); the embedding and the output stay at
8.5 and 6.5 bits, and norms at 16.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields

from puna.model.sizes import SIZES, LlamaConfig
from puna.model.weights import Headers

FORMATS = {"bf16": (16.0, 16.0), "int8": (8.5, 8.5), "int4": (4.5, 6.5)}  # bits of layers; of embedding and output
CONTEXTS = (2048, 8192, 32_768, 131_072)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found."""

    kind: str
    family: str  # the published size with this very shape, or ""
    config: LlamaConfig
    parameters: int
    tensors: int
    forms: Mapping[str, tuple[int, int]]  # storage format -> tensors, bytes
    memory: Mapping[str, Mapping[int, int]]  # number format -> context -> bytes
    oddities: tuple[str, ...]


def inspect(kind: str, config: LlamaConfig, weights: Headers) -> Inspection:
    """Describe the checkpoint that has these headers."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for name in weights.names:
        count[weights.form(name)] += 1
        size[weights.form(name)] += weights.bytes(name)
    return Inspection(
        kind=kind,
        family=family_of(config),
        config=config,
        parameters=config.parameters,
        tensors=len(weights.names),
        forms={form: (count[form], size[form]) for form in sorted(count)},
        memory={form: {n: run_bytes(config, form, n) for n in contexts(config)} for form in FORMATS},
        oddities=tuple(_oddities(config, weights)),
    )


def family_of(config: LlamaConfig) -> str:
    """The published Llamas with exactly this shape, joined by " or "; "" if there is none."""
    ours = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("context", "norm_eps")}
    return " or ".join(
        name for name, published in SIZES.items() if all(getattr(published, n) == v for n, v in ours.items())
    )


def contexts(config: LlamaConfig) -> list[int]:
    """The context lengths worth telling: the usual ones below the model's own, and that one."""
    return [*(n for n in CONTEXTS if n < config.context), config.context]


def run_bytes(config: LlamaConfig, form: str, tokens: int) -> int:
    """Bytes of the weights in `form` (`bf16`, `int8`, `int4`) and of a bfloat16 cache for `tokens`."""
    inside, outside = FORMATS[form]
    embeddings = config.vocab_size * config.dim * (1 if config.tied else 2)
    norms = config.dim * (2 * config.n_layers + 1)
    matrices = config.parameters - embeddings - norms
    return round((matrices * inside + embeddings * outside + norms * 16) / 8) + config.kv_bytes_per_token() * tokens


def _oddities(config: LlamaConfig, weights: Headers):
    if config.n_heads * config.head_dim != config.dim:
        yield f"{config.n_heads} heads of {config.head_dim} are {config.n_heads * config.head_dim}, not the width {config.dim}"
    if config.tied and "lm_head.weight" in weights.names:
        yield "the output matrix is stored although it is tied to the embedding: it is not read"
    if config.rope_scaling and config.context <= config.rope_scaling.original_context:
        stretch = config.rope_scaling
        yield f"positions are stretched from {stretch.original_context:,}, yet the context is {config.context:,}"
    inverse = [name for name in weights.names if name.endswith("rotary_emb.inv_freq")]
    if inverse:
        yield f"{len(inverse)} stored rotary frequencies: they follow from the configuration and are not read"
    forms = {weights.form(name) for name in weights.names if name.endswith("proj.weight")}
    if len(forms) > 1:
        yield f"the matrices of the layers are stored in several formats: {', '.join(sorted(forms))}"
    if config.vocab_size % 64:
        yield f"the vocabulary of {config.vocab_size:,} is not a multiple of 64: tokens were added"
