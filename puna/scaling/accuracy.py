"""From a loss to accuracy on a benchmark: the second of Llama 3's two stages."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from puna.scaling.law import Estimate, Z, interval


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Accuracy on a benchmark as a sigmoid of a loss: floor + (top - floor) / (1 + exp(slope * (loss - middle))).

    The second stage of Llama 3's prediction (3.2.1). `loss` is whatever the law was fitted with.
    """

    name: str
    source: str
    floor: float  # chance
    top: float
    slope: float
    middle: float
    draws: np.ndarray = field(repr=False)  # (R, 4): floor, top, slope, middle
    scatter: float = 0.0  # standard deviation of a model's accuracy around the curve

    def at(self, loss: Estimate | float) -> Estimate:
        """Accuracy, a share. An interval of the loss is carried through the curve."""
        value, low, high = loss if isinstance(loss, Estimate) else (loss, loss, loss)
        best = np.array([[self.floor, self.top, self.slope, self.middle]])
        middle = float(_sigmoid(best, value)[0])
        drawn = interval(middle, _sigmoid(self.draws, value))
        by_loss = (float(_sigmoid(best, high)[0]), float(_sigmoid(best, low)[0]))
        down = math.hypot(middle - drawn.low, middle - by_loss[0], Z * self.scatter)
        up = math.hypot(drawn.high - middle, by_loss[1] - middle, Z * self.scatter)
        return Estimate(middle, max(0.0, middle - down), min(1.0, middle + up))

    def to_json(self) -> dict[str, Any]:
        plain = {n: getattr(self, n) for n in ("name", "source", "floor", "top", "slope", "middle", "scatter")}
        return {"kind": "accuracy", **plain, "draws": self.draws.tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Accuracy":
        names = {n: data[n] for n in ("name", "source", "floor", "top", "slope", "middle", "scatter")}
        return cls(**names, draws=np.array(data["draws"], dtype=float).reshape(-1, 4))


def _sigmoid(rows: np.ndarray, loss: float) -> np.ndarray:
    floor, top, slope, middle = rows.T
    return floor + (top - floor) / (1 + np.exp(np.clip(slope * (loss - middle), -60, 60)))
