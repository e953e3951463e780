"""`params.json`: what Meta's release says about a model's shape, and what it leaves to be known.

    {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-05,
     "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "rope_theta": 500000.0, "use_scaled_rope": true}

    key                   if absent                        said by
    n_kv_heads            n_heads                          Llama 2 70B and from Llama 3 on
    vocab_size            -1: as many as the weights have  -1 in Llama 1 and 2
    ffn_dim_multiplier    1                                as n_kv_heads
    rope_theta            10,000                           from Llama 3 on
    use_scaled_rope       false                            from Llama 3.1 on

The feed-forward width is a rule: two thirds of 4 * dim, times the multiplier, rounded down at each step, then up to
a multiple of `multiple_of`. Three things the file does not say at all:

    context    by family: Llama 1 has 2,048, Llama 2 4,096, Code Llama 16,384, Llama 3 8,192, from 3.1 on 131,072 tokens.
               Llama 1 and 2 can have the same params.json; only Llama 1's files hold rotary frequencies in every layer.
    tied       a model whose `output` is missing, or equals its embedding bit for bit, has one matrix for both.
    stretch    `use_scaled_rope` does not say how far. Meta's own code takes 8 for all; the released configurations say
               8 for 3.1 and 3.3 and 32 for the two small models of 3.2. We follow them: 32 if tied, else 8.

A folder that we wrote from a model to which these rules do not lead says so under the key `puna`.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.errors import ArtifactError, ConfigError
from puna.model.sizes import LlamaConfig, RopeScaling

PARAMS = "params.json"
OURS = "puna"
LLAMA_3_THETA = 500_000.0
_KNOWN = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "multiple_of", "ffn_dim_multiplier",
          "rope_theta", "use_scaled_rope", OURS}  # fmt: skip
_OTHER_MODELS = {
    "quantization_args": "a quantised release",
    "lora_args": "a release with adapters",
    "vision_num_layers": "a model that sees images",
    "moe_args": "a mixture of experts",
}
_SAYABLE = ("context", "rope_scaling", "tied")  # what the block `puna` may hold
_MOST = 1 << 24  # no dimension of a Llama comes near; keeps a hostile file's arithmetic small
_RULES = [(256, None), (256, 1.0), (256, 1.3), (256, 1.5), (1024, 1.3), (4096, 1.3), (4096, 1.2)]  # the released pairs
_HINT = "give the params.json that came with the weights"


@dataclass(frozen=True)
class Facts:
    """What only the weights can tell."""

    vocab_size: int
    tied: bool
    frequencies_per_layer: bool  # rotary frequencies are stored in every layer


def parse_params(data: Mapping[str, Any], file: Path, facts: Facts) -> tuple[LlamaConfig, list[str]]:
    """The shape of the model, and notes for the user: what was concluded, and what was not understood.

    Raises `ArtifactError` if `data`, read from `file`, does not describe a dense Llama.
    """
    for key, what in _OTHER_MODELS.items():
        if data.get(key) is not None:
            raise ArtifactError(
                f"{file} has {key!r}: {what}", hint="dense Llamas for text, versions 1 to 3.3, are read"
            )
    try:
        config, notes = _parse(data, facts)
    except KeyError as error:
        raise ArtifactError(f"{file} has no {error.args[0]!r}", hint=_HINT) from None
    except (TypeError, ValueError, OverflowError, ConfigError) as error:
        raise ArtifactError(f"{file} does not describe a Llama: {error}", hint=_HINT) from None
    unknown = sorted(str(key)[:40] for key in data.keys() - _KNOWN)
    if unknown:
        notes.append(f"{file} has keys that are not known and were ignored: {', '.join(unknown[:8])}")
    return config, notes


def _parse(data: Mapping[str, Any], facts: Facts) -> tuple[LlamaConfig, list[str]]:
    dim, heads = _whole(data, "dim"), _whole(data, "n_heads")
    if dim % heads:
        raise ValueError(f"dim={dim} is not a multiple of n_heads={heads}")
    vocab_size = data.get("vocab_size", -1)
    if vocab_size not in (-1, facts.vocab_size):
        raise ValueError(f"vocab_size is {vocab_size!r}, the weights have {facts.vocab_size}")
    theta = _real(data, "rope_theta", 10_000.0)
    scaled = data.get("use_scaled_rope", False)
    if type(scaled) is not bool:
        raise ValueError(f"use_scaled_rope is {scaled!r}, true or false was expected")
    family, context = _family(theta, scaled, facts)
    scaling = RopeScaling(factor=32.0 if facts.tied else 8.0) if scaled else None
    config = LlamaConfig(
        dim=dim,
        n_layers=_whole(data, "n_layers"),
        n_heads=heads,
        n_kv_heads=heads if data.get("n_kv_heads") is None else _whole(data, "n_kv_heads"),
        head_dim=dim // heads,
        ffn_dim=_ffn_dim(dim, _whole(data, "multiple_of"), _real(data, "ffn_dim_multiplier", None)),
        vocab_size=facts.vocab_size,
        context=context,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_real(data, "norm_eps", 1e-5),
        tied=facts.tied,
    )
    if data.get(OURS) is not None:
        return dataclasses.replace(config, **_our_block(data[OURS])), []
    notes = [f"context of {context:,} tokens: {family}"]
    if scaling is not None:
        why = "output and embedding are one matrix, as in Llama 3.2 1B and 3B" if facts.tied else "as in 3.1 and 3.3"
        other = " (Meta's own code takes 8, the released configurations say 32)" if facts.tied else ""
        notes.append(f"rotary positions stretched by {scaling.factor:g}: {why}{other}")
    return config, notes


def _family(theta: float, scaled: bool, facts: Facts) -> tuple[str, int]:
    """Which Llama it is, in words, and its context in tokens."""
    if scaled:
        return "Llama 3.1 or later, by use_scaled_rope", 131_072
    if theta == LLAMA_3_THETA:
        return "Llama 3, by rope_theta 500,000 without use_scaled_rope", 8192
    if theta == 1_000_000.0:
        return "Code Llama, by rope_theta 1,000,000", 16_384
    if theta != 10_000.0:
        return f"rope_theta {theta:g} is no released Llama's, the smallest context was taken", 2048
    if facts.frequencies_per_layer:
        return "Llama 1, by the rotary frequencies in every layer", 2048
    return "Llama 2, for there are no rotary frequencies in its layers", 4096


def _our_block(block: Any) -> dict[str, Any]:
    if not isinstance(block, dict) or not block.keys() <= set(_SAYABLE):
        raise ValueError(f"{OURS!r} can hold {', '.join(_SAYABLE)}")
    said = dict(block)
    if said.get("rope_scaling") is not None:
        said["rope_scaling"] = RopeScaling(**{key: _number(value, key) for key, value in said["rope_scaling"].items()})
    if "context" in said:
        _whole(said, "context")
    if type(said.get("tied", False)) is not bool:
        raise ValueError("'tied' is true or false")
    return said


def _whole(data: Mapping[str, Any], key: str) -> int:
    value = data[key]
    if type(value) is not int or not 0 < value <= _MOST:
        raise ValueError(f"{key} must be a whole number from 1 to {_MOST:,}")
    return value


def _real(data: Mapping[str, Any], key: str, default: float | None) -> Any:
    value = data.get(key)
    return default if value is None else _number(value, key)


def _number(value: Any, key: str) -> Any:
    if type(value) not in (int, float) or not 0 < value < 1e12 or not math.isfinite(value):
        raise ValueError(f"{key} must be a number above 0")
    return value if key == "original_context" else float(value)


def _ffn_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


def format_params(config: LlamaConfig) -> dict[str, Any]:
    """`params.json` for `config`: what `parse_params` reads back as the same shape.

    Raises `ConfigError` for a head width other than dim / n_heads, which this format cannot say.
    """
    if config.head_dim * config.n_heads != config.dim:
        heads = f"{config.n_heads} heads of width {config.head_dim} in a model of width {config.dim}"
        raise ConfigError(f"Meta's format has no key for {heads}", hint="write the Hugging Face format")
    multiple_of, multiplier = _ffn_rule(config.dim, config.ffn_dim)
    data = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": multiple_of,
        "norm_eps": config.norm_eps,
    }
    if config.n_kv_heads != config.n_heads:
        data["n_kv_heads"] = config.n_kv_heads
    if multiplier is not None:
        data["ffn_dim_multiplier"] = multiplier
    if config.rope_theta != 10_000.0:
        data["rope_theta"] = config.rope_theta
    if config.rope_scaling is not None:
        data["use_scaled_rope"] = True
    # Cut by columns, an embedding is no longer seen to equal the output matrix; then the block below says that it does.
    seen_tied = config.tied and config.rope_theta >= LLAMA_3_THETA
    facts = Facts(vocab_size=config.vocab_size, tied=seen_tied, frequencies_per_layer=False)
    concluded, _ = _parse(data, facts)
    wanted = dataclasses.asdict(config)
    differ = {key: wanted[key] for key in _SAYABLE if getattr(concluded, key) != getattr(config, key)}
    return data | ({OURS: differ} if differ else {})


def _ffn_rule(dim: int, ffn_dim: int) -> tuple[int, float | None]:
    """The released pair (multiple_of, multiplier) that gives this width, or one that gives it exactly."""
    for multiple_of, multiplier in _RULES:
        if _ffn_dim(dim, multiple_of, multiplier) == ffn_dim:
            return multiple_of, multiplier
    return 1, (ffn_dim + 0.5) / int(2 * (4 * dim) / 3)  # half a column above, so that rounding down ends at it
