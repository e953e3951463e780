"""A Llama in a GGUF file: its names, its shape and its weights.

    token_embd.weight           tok_embeddings.weight          blk.N.ffn_gate.weight   feed_forward.w1
    output_norm.weight          norm.weight                    blk.N.ffn_down.weight   feed_forward.w2
    output.weight               output.weight, if not tied     blk.N.ffn_up.weight     feed_forward.w3
    blk.N.attn_q, attn_k, attn_v, attn_output                  attention.wq, wk, wv, wo
    blk.N.attn_norm, ffn_norm                                  attention_norm, ffn_norm
    rope_freqs.weight           no weight: what Llama 3.1's scaling divides each rotary frequency by, (E/2,)

The rows of `attn_q` and `attn_k` stand in Meta's order, since llama.cpp turns neighbouring pairs; `GgufFile` hands them
out in Hugging Face's, under Hugging Face's names, so that whatever reads a folder's weights reads these.

The settings say the shape, but not Llama 3.1's scaling. Its four numbers are found from the divisors: the largest is
`factor`, and the published (1, 4, 8192) are tried for the rest, then the original context that the blend between the
two plateaus implies. What is found has to give the divisors back, or the file is refused. (Only ratios can be known:
the same divisors come from twice the context with twice the other two. Files of ours name the four numbers.)
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from puna.errors import ArtifactError, ConfigError, shown
from puna.model.checkpoint import empty_model, fill
from puna.model.convert import hf_name, is_rotary, to_hf_rows
from puna.model.gguf.blocks import BlockType
from puna.model.gguf.format import Container
from puna.model.gguf.vocabulary import Vocabulary, read_vocabulary
from puna.model.llama import Llama, rope_frequencies
from puna.model.sizes import LlamaConfig, RopeScaling

ROPE_FREQS = "rope_freqs.weight"
SCALING = "puna.rope_scaling"  # our own settings, one for each field of `RopeScaling`
_OUTSIDE = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
_INSIDE = {
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}
_PIECE_WEIGHTS = 1 << 20  # read at a time
_HINT = "only dense Llamas (general.architecture 'llama') can be read"


def gguf_name(name: str) -> str:
    """GGUF's name of the tensor that Meta calls `name`."""
    if not name.startswith("layers."):
        return _OUTSIDE[name.removesuffix(".weight")] + ".weight"
    _, layer, module = name.removesuffix(".weight").split(".", 2)
    return f"blk.{layer}.{_INSIDE[module]}.weight"


def load_gguf(path: Path, dtype: torch.dtype = torch.float32) -> Llama:
    """The model in a GGUF file, its weights in `dtype`, on the CPU.

    Needs the model's memory and some tens of megabytes more. Raises `ArtifactError` for a file that is damaged, is not
    GGUF, or does not hold a dense Llama.
    """
    with GgufFile(path) as files:
        model = empty_model(files.config, dtype)
        fill(model, files)
    return model


class GgufFile:
    """The weights of a Llama in a GGUF file, under Hugging Face's names and in its row order. Use as a context.

    `config` is the model's shape, `settings` all of the file's. Opening checks every tensor's name and shape and raises
    `ArtifactError` for anything that is not a dense Llama.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._container = Container(self.path)
        try:
            self.settings = self._container.metadata
            self.config = _read_config(self._container)
            wanted = self.config.shapes()
            self._home = {hf_name(name): gguf_name(name) for name in wanted}
            self._rotary = {hf_name(name) for name in wanted if is_rotary(name)}
            self._check({gguf_name(name): shape for name, shape in wanted.items()})
        except BaseException:
            self._container.__exit__()
            raise

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._container.__exit__()

    @property
    def names(self) -> set[str]:
        return set(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._container.tensors[self._home[name]].shape

    def bytes(self, name: str) -> int:
        """Bytes in the file, packed as they are."""
        return self._container.tensors[self._home[name]].bytes

    def form(self, name: str) -> str:
        """How the tensor is packed, such as "Q4_K"."""
        return self._container.tensors[self._home[name]].kind.name

    def kind(self, name: str) -> BlockType:
        """The same as a block type."""
        return self._container.tensors[self._home[name]].kind

    def read(self, name: str) -> Tensor:
        """A whole tensor: float32 if it is quantised, else in its stored type."""
        return self._in_order(name, self._container.read(self._home[name]))

    def place(self, name: str) -> tuple[int, int]:
        """Where a tensor's bytes lie, rows in Meta's order: a file descriptor and the first byte."""
        return self._container.place(self._home[name])

    def packed(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a matrix as they are packed, uint8 (rows, bytes), in the file's order: Meta's."""
        return self._container.raw(self._home[name], start, stop)

    def pieces(self, name: str, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        """A tensor as (first row, rows), each piece a multiple of `multiple` rows and about a million weights long."""
        info = self._container.tensors[self._home[name]]
        multiple = math.lcm(multiple, self.config.head_dim) if name in self._rotary else multiple
        step = max(1, _PIECE_WEIGHTS // (math.prod(info.shape[1:]) * multiple)) * multiple
        for start in range(0, info.rows, step):
            yield start, self._in_order(name, self._container.read(self._home[name], start, start + step))

    def expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises `ArtifactError` unless exactly these tensors are there, in these shapes."""
        ours = {name: self.shape(name) for name in self.names}
        wrong = sorted(name for name in ours.keys() | shapes.keys() if ours.get(name) != shapes.get(name))
        if wrong:
            found, asked = ours.get(wrong[0], "missing"), shapes.get(wrong[0], "not there")
            message = f"{self.path}: {wrong[0]!r} is {found}, it should be {asked}"
            raise ArtifactError(message, hint="the model and the file do not belong together")

    def vocabulary(self) -> Vocabulary:
        """The vocabulary in the file; see `vocabulary.py`."""
        return read_vocabulary(self._container)

    def _in_order(self, name: str, rows: Tensor) -> Tensor:
        return to_hf_rows(rows, self.config.head_dim) if name in self._rotary else rows

    def _check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        tensors = self._container.tensors
        for names, what in (
            (wanted.keys() - tensors.keys(), "lacks"),
            (tensors.keys() - wanted.keys(), "has unexpected"),
        ):
            names = sorted(names - {ROPE_FREQS})
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise ArtifactError(f"{self.path} {what} tensors: {', '.join(map(shown, names[:3]))}{more}", hint=_HINT)
        for name, shape in wanted.items():
            if tensors[name].shape != shape:
                message = f"{self.path}: tensor {name!r} has shape {list(tensors[name].shape)}"
                raise ArtifactError(f"{message}, the settings ask for {list(shape)}", hint=_HINT)


class _Settings:
    """A Llama's settings, each checked for its type."""

    def __init__(self, container: Container):
        self.path, self._values = container.path, container.metadata

    def fail(self, fault: str, hint: str = _HINT) -> NoReturn:
        raise ArtifactError(f"{self.path}: {fault}", hint=hint)

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number; a list of one for each layer must say the same for all."""
        value = self._get(key, default)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()
        if type(value) is not int or value < 1:
            said = "a list" if isinstance(value, np.ndarray) else shown(value)
            self.fail(f"llama.{key} is {said}, not a positive whole number for all layers")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number. The file has 32 bits of it: the shortest decimal that is stored so is meant."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not 1e-30 < value < 1e30:
            self.fail(f"llama.{key} is {shown(value)}, not a positive number")
        return _shortest(value)

    def choice(self, key: str, *accepted: Any) -> None:
        value = self._values.get(key, accepted[0])
        if isinstance(value, np.ndarray) or value not in accepted:
            self.fail(f"{key} is {shown(value)}, read here: {', '.join(map(repr, accepted))}")

    def _get(self, key: str, default: Any) -> Any:
        value = self._values.get(f"llama.{key}", default)
        if value is None:
            self.fail(f"it has no setting llama.{key}")
        return value


def _shortest(value: float) -> float:
    """The shortest decimal that is `value` in 32 bits."""
    return float(str(np.float32(value)))


def _read_config(container: Container) -> LlamaConfig:
    settings = _Settings(container)
    architecture = container.metadata.get("general.architecture")
    if architecture != "llama":
        settings.fail(f"the architecture is {str(architecture)[:40]!r}")
    settings.choice("llama.expert_count", 0)
    settings.choice("llama.rope.scaling.type", "none")
    settings.choice("llama.rope.scale_linear", 1.0)
    dim, heads = settings.whole("embedding_length"), settings.whole("attention.head_count")
    head_dim = settings.whole("attention.key_length", dim // heads or None)
    for key in ("attention.value_length", "rope.dimension_count"):
        if settings.whole(key, head_dim) != head_dim:
            settings.fail(f"llama.{key} is {settings.whole(key)}, a head is {head_dim} wide")
    layers = settings.whole("block_count")
    if layers > len(container.tensors):
        settings.fail(f"it claims {layers:,} layers and has {len(container.tensors):,} tensors")
    if "token_embd.weight" not in container.tensors:
        settings.fail("it lacks the tensor token_embd.weight")
    try:
        config = LlamaConfig(
            dim=dim,
            n_layers=layers,
            n_heads=heads,
            n_kv_heads=settings.whole("attention.head_count_kv", heads),
            head_dim=head_dim,
            ffn_dim=settings.whole("feed_forward_length"),
            vocab_size=container.tensors["token_embd.weight"].shape[0],
            context=settings.whole("context_length"),
            rope_theta=settings.real("rope.freq_base", 10_000.0),
            norm_eps=settings.real("attention.layer_norm_rms_epsilon"),
            tied="output.weight" not in container.tensors,
        )
    except ConfigError as error:
        settings.fail(f"its settings do not describe a Llama: {error.message}")
    return dataclasses.replace(config, rope_scaling=_read_scaling(container, config))


def frequency_divisors(config: LlamaConfig) -> Tensor:
    """What Llama 3.1's scaling divides each rotary frequency by, float32 (E/2,)."""
    return rope_frequencies(dataclasses.replace(config, rope_scaling=None)) / rope_frequencies(config)


def _read_scaling(container: Container, config: LlamaConfig) -> RopeScaling | None:
    """The scaling that gives the file's divisors; None where there are none, or all are one."""
    if ROPE_FREQS not in container.tensors:
        return None
    shape = container.tensors[ROPE_FREQS].shape
    if shape != (config.head_dim // 2,):
        raise ArtifactError(f"{container.path}: {ROPE_FREQS} has shape {list(shape)}", hint=_HINT)
    divisors = container.read(ROPE_FREQS).float()
    if (divisors == 1).all():
        return None
    if divisors.isfinite().all() and divisors.min() > 0:
        try:
            for scaling in _scalings(container.metadata, divisors, config):
                told = frequency_divisors(dataclasses.replace(config, rope_scaling=scaling))
                if torch.allclose(told, divisors, rtol=1e-5, atol=0):
                    return scaling
        except (ArithmeticError, ValueError, ConfigError):
            pass  # what the divisors imply is no number, or no scaling
    hint = "rotary positions can be plain or Llama 3.1's, with low and high frequency factors of 1 and 4"
    raise ArtifactError(f"{container.path}: {ROPE_FREQS} is not Llama 3.1's scaling", hint=hint)


def _scalings(settings: Mapping[str, Any], divisors: Tensor, config: LlamaConfig) -> Iterator[RopeScaling]:
    """What the file names, what was published, what the divisors imply."""
    named = [settings.get(f"{SCALING}.{field.name}") for field in dataclasses.fields(RopeScaling)]
    if all(type(value) in (int, float) and 0 < value < 2**31 for value in named) and named[1] != named[2]:
        factor, low, high = (_shortest(value) for value in named[:3])
        yield RopeScaling(factor=factor, low_freq_factor=low, high_freq_factor=high, original_context=int(named[3]))
    factor = _shortest(divisors.max().item())
    yield RopeScaling(factor=factor)
    yield RopeScaling(factor=factor, original_context=_implied_context(divisors, factor, config))


def _implied_context(divisors: Tensor, factor: float, config: LlamaConfig) -> int:
    """The original context for low and high frequency factors of 1 and 4."""
    frequencies = rope_frequencies(config) / (2 * math.pi)  # turns per position
    blend = (1 / divisors - 1 / factor) / (1 - 1 / factor)  # 0 where slow, 1 where fast
    between = (blend > 1e-3) & (blend < 1 - 1e-3)
    if between.any():
        return max(1, round(((3 * blend + 1) / frequencies)[between].median().item()))
    fast, slow = frequencies[blend > 0.5], frequencies[blend < 0.5]
    least = 4 / fast.min().item() if len(fast) else 1.0
    most = 1 / slow.max().item() if len(slow) else math.inf
    power = 2 ** math.ceil(math.log2(max(1.0, least)))
    return power if power <= most else max(1, round((least + most) / 2))
