"""One size on the devices of a wish: its fastest layout, the tokens it sees, the loss to expect, the hours it costs."""

import math
from dataclasses import dataclass, replace
from typing import Any

from puna.errors import ConfigError
from puna.model.sizes import LlamaConfig
from puna.planner.layouts import RECOMPUTE, Found, search
from puna.planner.risk import Risk, risk
from puna.planner.serving import Serving, fitting_bits, serving
from puna.planner.wish import DAY_S, Foresight, Range, Wish
from puna.planner.work import Work

MOST_BATCH_TOKENS = 16 << 20  # Llama 3 405B's largest (arXiv 2407.21783, 3.4.1)
# How a step is computed: as `puna pretrain` does it (PyTorch's operators and its fused attention, the stream in float32,
# the loss in chunks), or with everything fused and Hopper's attention kernel, as tuned trainers do.
SOFTWARE: dict[str, dict[str, Any]] = {
    "puna": {"attention": "flash2", "compiled": False, "autocast": True, "chunked_loss": True},
    "tuned": {"attention": "flash3", "compiled": True, "chunked_loss": True},
}
# What is kept (`work.Recompute`), and our trainer's `speed.recompute` for it: one process can, several cannot yet.
OURS = {"none": "none", "products": "selective", "full": "full"}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One size, trained as the wish allows."""

    config: LlamaConfig
    found: Found
    risk: Risk
    tokens: float
    loss: Range  # before quantisation
    serving: Serving | None  # None: it does not fit where it must
    serve_hours: float
    devices: int

    @property
    def total_loss(self) -> float:
        """Expected, with what the weights' bits lose when served."""
        return self.loss[0] + (self.serving.loss if self.serving else 0.0)

    @property
    def served_loss(self) -> Range:
        lost = self.serving.loss if self.serving else 0.0
        return (self.loss[0] + lost, self.loss[1] + lost, self.loss[2] + lost)

    @property
    def train_seconds(self) -> float:
        """Of wall clock, interruptions included."""
        return self.tokens / self.found.best.step.tokens_per_s / self.risk.effective

    @property
    def train_hours(self) -> float:
        """Device-hours."""
        return self.devices * self.train_seconds / 3600

    @property
    def hours(self) -> float:
        """Device-hours of training and serving."""
        return self.train_hours + self.serve_hours

    @property
    def flops(self) -> float:
        """Of the training: model FLOPs, causal attention."""
        return self.tokens * self.found.best.step.flops_per_token[0]

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / self.found.best.work.tokens))


def choose(config: LlamaConfig, wish: Wish, foresight: Foresight, *, quick: bool = False) -> Choice:
    """What the wish's devices make of this size. Raises `ConfigError` if it does not fit them."""
    found = fastest(config, wish, quick=quick)
    danger = risk(found.best.layout.world, found.best.step.seconds, wish.device)
    tokens = wish.tokens or found.best.step.tokens_per_s * danger.effective * wish.days * DAY_S
    bits = fitting_bits(config, wish.serve_context, wish.fits_bytes, wish.bits)
    made = Choice(
        config=config,
        found=found,
        risk=danger,
        tokens=tokens,
        loss=foresight.loss(config, tokens),
        serving=None,
        serve_hours=0.0,
        devices=wish.devices,
    )
    return served(made, wish, bits[0]) if bits else made


def served(choice: Choice, wish: Wish, bits: int) -> Choice:
    """The same model, served with weights of `bits`."""
    how = serving(choice.config, bits, wish.device, wish.serve_context)
    return replace(choice, serving=how, serve_hours=how.device_hours(wish.serve_tokens))


def ways_to_serve(choice: Choice, wish: Wish) -> list[Choice]:
    """The same model with each number of bits that fits."""
    bits = fitting_bits(choice.config, wish.serve_context, wish.fits_bytes, wish.bits)
    return [served(choice, wish, b) for b in bits] or [choice]


def fastest(config: LlamaConfig, wish: Wish, *, quick: bool = False) -> Found:
    """The fastest layout of the wish's devices for this size. Raises `ConfigError` if none fits."""
    world = in_use(wish.devices, wish.sequence_length)
    rows = batch_rows(config, world, wish.sequence_length)
    work = Work(sequence_length=wish.sequence_length, rows=rows, precision=wish.precision, **SOFTWARE[wish.software])
    # A size that was asked for and that our trainer cannot hold is still planned, for a trainer that recomputes more.
    modes = [ways_to_recompute(wish), RECOMPUTE][: 2 if wish.size is not None else 1]
    batches = [
        rows * 2**i for i in range(max(1, (world // rows).bit_length() + 1))
    ]  # more devices than rows: larger ones
    failed: ConfigError | None = None
    for recompute in modes:
        for size in batches:
            try:
                how = replace(work, rows=size)
                return search(config, world, how, wish.device, quick=quick, recompute=recompute)
            except ConfigError as error:
                failed = error
    assert failed is not None
    raise failed


def in_use(devices: int, sequence_length: int) -> int:
    """How many of the devices are laid out: all, unless their number has an odd factor that no batch can be shared by.

    The next smaller number then whose odd factor is at most an eighth of the largest batch's rows, or 15; the others wait as
    spares. 100,000 are 3,125 x 32: a batch of 2,048 rows has none for each of 3,125 ranks. 99,840 are 195 x 512.
    """
    most = max(15, MOST_BATCH_TOKENS // sequence_length // 8)
    for zeros in range(devices.bit_length()):
        part = devices >> zeros
        if part // (part & -part) <= most:
            return part << zeros
    return 1


def ways_to_recompute(wish: Wish) -> tuple[str, ...]:
    """What the wish's trainer can make again, the cheapest first: ours everything in one process, nothing in several."""
    if wish.software == "tuned":
        return RECOMPUTE
    return tuple(OURS) if wish.devices == 1 else ("none",)


def batch_rows(config: LlamaConfig, world: int, sequence_length: int) -> int:
    """Sequences of a step: 2048 * 160 * (N / 108M)^(2/3) tokens, as OLMo's ladder has it, at most Llama 3's 16M.

    Rounded to a power of two times the odd part of `world`, so that the ranks can share them.
    """
    body = config.n_layers * config.layer_parameters
    wanted = min(MOST_BATCH_TOKENS, 2048 * 160 * (body / 108e6) ** (2 / 3)) / sequence_length
    odd = world // (world & -world)
    return odd * 2 ** max(0, round(math.log2(max(1.0, wanted / odd))))
