"""What it costs to serve a model: bytes on the device that must hold it, device-hours for so many tokens.

Decoding reads all weights once for a batch of sequences, and each sequence's keys and values; it takes as long as the
slower of that reading and the products. The batch is what the memory holds beside the weights. Prompts are cheaper than
that, so a price by generated tokens is the upper end.
"""

from dataclasses import dataclass

from puna.model.sizes import LlamaConfig
from puna.planner.hardware import Device

GROUP = 64  # weights that share a 16-bit scale, as `puna quantize` does from a billion parameters on
USABLE = 0.9  # of a serving device's memory
REACHED = 0.6  # of what the formula gives: batches that come and go, prompts between; assumed
MOST_SEQUENCES = 256  # of a batch on one device
BITS = (16, 8, 4)
# Loss in nats per token, measured (docs/log.md, 2026-11-22, groups of 32, 4 bits calibrated; 3.1M parameters, which lose
# more than large models do).
QUANTISATION_LOSS = {16: 0.0, 8: 0.0007, 4: 0.0313}


@dataclass(frozen=True, kw_only=True)
class Serving:
    """One way to serve: weights of `bits`, on `devices` devices together."""

    bits: int
    weight_bytes: float
    cache_bytes: float  # of one sequence of `context` tokens
    context: int
    devices: int
    batch: int  # sequences at a time
    tokens_per_s_per_device: float

    @property
    def loss(self) -> float:
        """Nats per token that these weights lose."""
        return QUANTISATION_LOSS[self.bits]

    @property
    def bytes(self) -> float:
        """To hold the weights and one full sequence."""
        return self.weight_bytes + self.cache_bytes

    def device_hours(self, tokens: float) -> float:
        return tokens / self.tokens_per_s_per_device / 3600


def stored_bytes(config: LlamaConfig, bits: int) -> float:
    """Bytes of the weights as `puna quantize` stores them: scales counted, embedding and output at 6 bits beside 4."""
    if bits == 16:
        return 2.0 * config.parameters
    tables = config.vocab_size * config.dim * (1 if config.tied else 2)
    scale = 16 / GROUP
    return ((config.parameters - tables) * (bits + scale) + tables * (max(bits, 6) + scale)) / 8


def least_bytes(config: LlamaConfig, bits: int, context: int) -> float:
    """To hold the weights, and the keys and values of one sequence in bfloat16."""
    return stored_bytes(config, bits) + config.kv_bytes_per_token() * context


def serving(config: LlamaConfig, bits: int, device: Device, context: int) -> Serving:
    """How `device`s serve the model: as few together as hold it and eight sequences, as many sequences as then fit."""
    weights, cache = stored_bytes(config, bits), config.kv_bytes_per_token() * context
    devices = 1
    while weights + 8 * cache > USABLE * devices * device.memory_bytes:
        devices *= 2
    free = USABLE * devices * device.memory_bytes - weights
    batch = max(1, min(int(free / cache), MOST_SEQUENCES * devices))
    products = 2 * config.parameters * batch / (devices * max(device.matmul.values()))
    reading = (weights + batch * cache / 2) / (devices * device.read)  # a sequence is half full on average
    rate = REACHED * batch / max(products, reading) / devices
    return Serving(
        bits=bits, weight_bytes=weights, cache_bytes=cache, context=context, devices=devices, batch=batch,
        tokens_per_s_per_device=rate,
    )  # fmt: skip


def fitting_bits(
    config: LlamaConfig, context: int, fits_bytes: float | None, allowed: tuple[int, ...] = BITS
) -> list[int]:
    """The bits whose weights fit, with a sequence of `context` tokens; most first."""
    limit = fits_bytes or float("inf")
    return [bits for bits in sorted(allowed, reverse=True) if least_bytes(config, bits, context) <= limit]
