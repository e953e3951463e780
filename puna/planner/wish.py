"""What is asked of a plan, and who is asked what to expect of a model."""

import datetime
import math
from dataclasses import dataclass
from typing import Literal, Protocol

from puna.config import require
from puna.model.sizes import LlamaConfig
from puna.planner.hardware import Device
from puna.planner.serving import BITS

DAY_S = 86_400.0
TEXT = 3e14  # tokens of public text by people, 1e14 to 1e15 (Villalobos et al. 2024, arXiv 2211.04325)
MOST_TOKENS = 1000 * TEXT  # that are planned
Range = tuple[float, float, float]  # value, low, high


class Foresight(Protocol):
    """What is expected of a model before it is trained: a scaling law, as the planner needs it."""

    name: str
    source: str
    formula: str  # of the loss, with its constants
    benchmark: str  # what `accuracy` is of; empty if there is none
    accuracy_source: str

    def loss(self, config: LlamaConfig, tokens: float) -> Range:
        """Nats per token."""
        ...

    def accuracy(self, loss: Range) -> Range: ...

    def optimal_tokens(self, config: LlamaConfig) -> float:
        """For which this size is the best use of its computing."""
        ...

    def optimal_parameters(self, flops: float) -> float:
        """The best size for so much computing."""
        ...

    def learning_rate(self, config: LlamaConfig, tokens: float) -> float:
        """The peak for a run of so many tokens."""
        ...

    def shape(self, parameters: float, context: int) -> LlamaConfig:
        """A Llama of about so many parameters."""
        ...


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is asked for: devices, and days; or a size and its tokens, with or without days."""

    devices: int
    device: Device
    days: float | None = None
    tokens: float | None = None  # to train on
    size: LlamaConfig | None = None
    parameters: float | None = None  # that were asked for, where `size` is the nearest that is made
    serve_tokens: float = 0.0  # to be generated in the model's life
    fits_bytes: float | None = None  # of the device that must hold it
    bits: tuple[int, ...] = BITS  # of the weights, when served
    serve_context: int = 8192  # tokens of a sequence, when served
    sequence_length: int = 8192  # when trained
    precision: str = "bf16"
    software: Literal["puna", "tuned"] = "puna"  # whose trainer: this one, or one with everything fused
    price: float | None = None  # of a device-hour, any currency
    start: datetime.date | None = None
    tolerance: float = 0.01  # of the loss, given up for cheaper serving

    def __post_init__(self) -> None:
        for name in ("days", "tokens", "fits_bytes", "price"):
            value = getattr(self, name)
            good = value is None or (0 < value < 1e40)
            hint = "leave it out if it does not matter"
            require(good, f"{name}={value} must be above 0 and below 1e40", hint=hint)
        for name in ("serve_context", "sequence_length", "devices"):
            value = getattr(self, name)
            require(0 < value < 1 << 31, f"{name}={value:,} must be above 0 and below {1 << 31:,}")
        good = math.isfinite(self.serve_tokens) and self.serve_tokens >= 0
        require(good, f"serve_tokens={self.serve_tokens} must not be negative")
        require(0 <= self.tolerance < 1, f"tolerance={self.tolerance} must be a share, 0 to 1")
        hint = (
            "say how many days the devices are yours (--days), or a size and how many tokens to train it on (--tokens)"
        )
        enough = self.days is not None or (self.tokens is not None and self.size is not None)
        require(enough, "a plan needs to know for how long", hint=hint)
