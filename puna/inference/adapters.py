"""LoRA adapters: small changes to a model that a request chooses by name.

    y = W x  becomes  y = W x + s B (A x)        A (r, in), B (out, r), s = alpha / r   (Hu et al. 2021, arXiv 2106.09685)

An adapter is a folder in the form that the library `peft` writes: `adapter_config.json` and `adapter_model.safetensors`.
Names there are Hugging Face's, and so is the order of the rotary rows; both become Meta's here. The weights W stay
untouched, so requests with and without an adapter run in one batch: each span's tokens get what its adapter adds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from puna.errors import ArtifactError
from puna.inference.spans import Span
from puna.model.convert import is_rotary, meta_name, meta_order
from puna.model.folder import read_json
from puna.model.sizes import LlamaConfig
from puna.model.tensorfile import TensorFile

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_NEUTRAL = {  # settings that change what the weights mean, and the values at which they don't
    "use_dora": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None, []),
}


@dataclass(frozen=True)
class Adapter:
    """What is added to which matrix: Meta's name of the module -> (A, s B), float32."""

    factors: dict[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def load(cls, path: Path, config: LlamaConfig) -> "Adapter":
        """The adapter in the folder `path`, for a model of shape `config`. Raises `ArtifactError` if it does not fit."""
        path = Path(path)
        settings = read_json(path, CONFIG)
        if settings.get("peft_type", "LORA") != "LORA":
            raise ArtifactError(f"{path} is a {settings['peft_type']} adapter", hint="only LoRA adapters can be loaded")
        for name, neutral in _NEUTRAL.items():
            if settings.get(name) not in neutral:
                found = f"{path / CONFIG} has {name}={settings[name]!r}, which is not supported"
                raise ArtifactError(found, hint="merge the adapter into the checkpoint with the tool that made it")
        scale = _scale(path, settings)
        if not (path / WEIGHTS).is_file():
            raise ArtifactError(f"{path} has no {WEIGHTS}", hint="save the adapter in safetensors form")
        shapes = config.shapes()
        factors = {}
        with TensorFile(path / WEIGHTS) as file:
            for name in file.entries:
                if not name.endswith((_A, _B)):
                    raise ArtifactError(f"{path / WEIGHTS}: {name!r} is no LoRA matrix", hint="only A and B are read")
            for name in (n for n in file.entries if n.endswith(_A)):
                stem = name.removesuffix(_A)
                ours = meta_name(stem.removeprefix(_PREFIX) + ".weight")
                if ours is None or not ours.startswith("layers."):
                    raise ArtifactError(f"{path / WEIGHTS}: {stem!r} is no matrix of a Llama's layer")
                if stem + _B not in file.entries:
                    raise ArtifactError(f"{path / WEIGHTS}: {stem + _B!r} is missing")
                a, b = file.numbers(name), file.numbers(stem + _B) * np.float32(scale)
                if ours not in shapes or (b.shape[0], a.shape[1]) != shapes[ours] or a.shape[0] != b.shape[1]:
                    found = f"{path / WEIGHTS}: {stem!r} changes a matrix of {b.shape[0]} x {a.shape[1]}"
                    raise ArtifactError(found, hint=f"this model has {shapes.get(ours, 'no such matrix')}")
                rows = b[meta_order(len(b), config.head_dim)] if is_rotary(ours) else b
                factors[ours.removesuffix(".weight")] = (a, rows)
        return cls(factors)


def _scale(path: Path, settings: dict) -> float:
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ArtifactError(f"{path / CONFIG}: r={rank!r}, lora_alpha={alpha!r} are not a rank and a number")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def tokens_of_adapters(spans: Sequence[Span]) -> dict[int, list[int]]:
    """Which tokens of the row of all tokens each adapter is asked for."""
    rows: dict[int, list[int]] = {}
    begin = 0
    for span in spans:
        if span.adapter is not None:
            rows.setdefault(span.adapter, []).extend(range(begin, begin + len(span.tokens)))
        begin += len(span.tokens)
    return rows
