"""Any checkpoint that a user may have, opened by what it is: one door to all formats.

with open_checkpoint(path) as opened:      headers only
    opened.kind, opened.config, opened.weights
model = load_checkpoint(path)              the weights, streamed
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from puna.errors import ArtifactError
from puna.model.checkpoint import CONFIG, QUANTISED, WeightFiles, load_config, load_model, read_json
from puna.model.inspect import Weights
from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint whose headers were read."""

    kind: str
    config: LlamaConfig
    weights: Weights


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Opened]:
    """Read the headers of the checkpoint at `path`. Raises `ArtifactError` for what is none."""
    config = load_config(path)
    if QUANTISED in read_json(path, CONFIG):
        raise ArtifactError(f"{path} holds a quantised model", hint="inspect the checkpoint that it was made from")
    with WeightFiles(path) as files:
        yield Opened(kind="huggingface", config=config, weights=files)


def load_checkpoint(path: Path, dtype: torch.dtype = torch.float32) -> Llama:
    """The model at `path`, whatever its format, with weights in `dtype`."""
    return load_model(path, dtype)
