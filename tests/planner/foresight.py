"""A law with known constants, so that plans can be tested without fits: Chinchilla's, refitted by Epoch AI."""

from functools import cache

from puna.model.sizes import LlamaConfig
from puna.planner.hardware import device
from puna.planner.wish import Wish
from puna.scaling.family import of_size

E, A, ALPHA, B, BETA = 1.8172, 482.01, 0.3478, 2085.43, 0.3658


@cache
def shaped(parameters: float, context: int) -> LlamaConfig:
    return of_size(parameters, vocab_size=128_256, context=context)


class Known:
    """`planner.wish.Foresight` by formula."""

    name, source, formula = "known", "a test", "E + A / N^alpha + B / D^beta"
    benchmark, accuracy_source = "coin", "a test"

    def loss(self, config: LlamaConfig, tokens: float) -> tuple[float, float, float]:
        value = E + A / config.parameters**ALPHA + B / tokens**BETA
        return value, 0.99 * value, 1.01 * value

    def accuracy(self, loss):
        return tuple(1 / x for x in loss)

    def optimal_tokens(self, config: LlamaConfig) -> float:
        return (BETA * B / (ALPHA * A) * config.parameters**ALPHA) ** (1 / BETA)

    def optimal_parameters(self, flops: float) -> float:
        return (ALPHA * A / (BETA * B) * (flops / 6) ** BETA) ** (1 / (ALPHA + BETA))

    def learning_rate(self, config: LlamaConfig, tokens: float) -> float:
        return 1e-3

    def shape(self, parameters: float, context: int) -> LlamaConfig:
        return shaped(float(f"{parameters:.3g}"), context)


def wish(devices: int = 64, name: str = "H100", **changed) -> Wish:
    return Wish(**{"devices": devices, "device": device(name), "days": 14.0, **changed})
