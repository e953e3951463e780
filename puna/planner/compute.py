"""How long a rank computes: matrix products at the speed measured for them, attention at its kernel's, the rest by the bytes it moves.

A layer's products cost 2 operations per weight and token forward and twice that backward. Causal attention over T
tokens costs 2 H E T per token forward; its backward pass computes the scores again, 2.5 times as much in all. What is
neither (norms, rotation, SwiGLU, additions, casts, the loss, the optimizer) is limited by memory: the tables below
count bytes per token in units of the widths d, q, k, f. Small products are limited by memory too, and by the time it
takes to start a kernel.
"""

from dataclasses import dataclass

from puna.model.sizes import LlamaConfig
from puna.parallel.layout import Layout
from puna.planner.hardware import Device
from puna.planner.work import Work, local_tokens

COMPLEX_BYTES = 20  # of a rotated number: cast to float32 (6), multiplied (8), cast back (6)
LAUNCH_S = 4e-6  # to start one kernel and wait for its end; CUDA's, on current hosts
ATTENTION_BACKWARD = 2.5  # times the forward operations: five products for two (arXiv 2307.08691, section 4)
OPTIMIZER_BYTES = 32  # per weight: AdamW reads weight, gradient and two moments, writes three; the norm reads once more
FOREACH = 2.5  # times those bytes, when AdamW is a sequence of operations instead of one kernel
# Of a logit, as PyTorch's operators do the loss. A row of 128,256 does not stay on the chip, so log-softmax reads it for the
# largest, for the sum and for the result, and its gradient once more for a sum (ATen's SoftMax.cu): cast 6, forward 16,
# zeros 4, backward 16, cast back 6.
LOSS_BYTES = 48
COPY_BYTES = 4  # per gathered weight: FSDP copies it out of the buffer; twice as much for a float32 gradient


@dataclass(frozen=True)
class Seconds:
    """A forward and a backward pass of something, and what of it is recomputed forward once more."""

    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.recomputed

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)


@dataclass(frozen=True)
class LayerTime:
    """One layer, one micro-batch, one rank: seconds by what limits them."""

    products: Seconds
    attention: Seconds
    elementwise: Seconds

    @property
    def total(self) -> Seconds:
        return self.products + self.attention + self.elementwise


def layer_time(config: LlamaConfig, layout: Layout, work: Work, device: Device) -> LayerTime:
    """How long a rank computes on its part of a layer for one micro-batch."""
    tokens = local_tokens(layout, work)
    forward = sum(product_seconds(tokens, k, n, work.precision, device) for k, n in _products(config, layout))
    again = {"none": 0.0, "products": 0.0, "selective": _selective_share(config), "attention": 1.0, "full": 1.0}
    share = again[work.recompute]
    products = Seconds(forward, 2 * forward, share * forward)
    attention = _attention(config, layout, work, device, tokens)
    return LayerTime(products, attention, _elementwise(config, layout, work, device, tokens))


def head_time(config: LlamaConfig, layout: Layout, work: Work, device: Device) -> Seconds:
    """Output matrix and loss of one micro-batch: products in bf16 even where layers have fp8."""
    tokens, vocabulary = local_tokens(layout, work), config.vocab_size / layout.tensor
    precision = "bf16" if work.precision == "fp8" else work.precision
    forward = product_seconds(tokens, config.dim, vocabulary, precision, device)
    loss = tokens * vocabulary * LOSS_BYTES / device.read
    return Seconds(forward + loss / 2, 2 * forward + loss / 2)


def product_seconds(m: float, k: float, n: float, precision: str, device: Device) -> float:
    """An (m, k) by (k, n) product: limited by the units, by memory, or by being started."""
    size = {"fp8": 1, "bf16": 2, "fp32": 4}[precision]
    moved = size * (m * k + k * n) + max(size, 2) * m * n
    return max(2 * m * k * n / device.matmul[precision], moved / device.read, LAUNCH_S)


def _products(config: LlamaConfig, layout: Layout) -> list[tuple[float, float]]:
    """(inputs, outputs) of a layer's matrices on one tensor rank."""
    tp, d, f = layout.tensor, config.dim, config.ffn_dim / layout.tensor
    q, k = config.n_heads * config.head_dim / tp, config.n_kv_heads * config.head_dim / tp
    return [(d, q), (d, k), (d, k), (q, d), (d, f), (d, f), (f, d)]


def _selective_share(config: LlamaConfig) -> float:
    """Of a layer's forward products, those that selective recomputation makes again: every second one (wk, wo, w3)."""
    q, k = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return (k + q + config.ffn_dim) / (2 * q + 2 * k + 3 * config.ffn_dim)


def _attention(config: LlamaConfig, layout: Layout, work: Work, device: Device, tokens: float) -> Seconds:
    flops = attention_flops(config, work.sequence_length) * tokens / layout.tensor
    forward, backward = device.attention_flops(work.attention, work.sequence_length)
    again = flops / forward if work.recompute == "full" else 0.0
    return Seconds(flops / forward, ATTENTION_BACKWARD * flops / backward, again)


def attention_flops(config: LlamaConfig, length: int) -> float:
    """Forward operations of causal attention in one layer, per token: 4 H E for each pair, half of the pairs."""
    return 2 * config.n_heads * config.head_dim * length


def _elementwise(config: LlamaConfig, layout: Layout, work: Work, device: Device, tokens: float) -> Seconds:
    tp = layout.tensor
    stream = config.dim / (tp if layout.sequence_parallel else 1)
    q, k = config.n_heads * config.head_dim / tp, config.n_kv_heads * config.head_dim / tp
    f = config.ffn_dim / tp
    c = work.activation_bytes
    if work.compiled:
        # Forward: two norms with the addition before them (4 d each), rotation in and out, SwiGLU (3 f).
        # Backward: the same norms, rotation, SwiGLU's six (two in, gradient in, two out, and w2's input again).
        turned = COMPLEX_BYTES / c if work.complex_rotation else 2
        forward = c * (8 * stream + turned * (q + k) + 3 * f)
        backward = c * (8 * stream + turned * (q + k) + 2 * q + 6 * f)
    else:
        # One kernel each, norms and rotation through float32: 36 bytes d for a norm, COMPLEX_BYTES for each rotated number,
        # additions 6 d, SwiGLU 10 f; backward half as much again.
        forward = c / 2 * (84 * stream + COMPLEX_BYTES * (q + k) + 10 * f)
        backward = 1.5 * forward
    if work.copied_heads:  # both read as they are and written for each query head; their gradients summed
        forward += 2 * c * (q + k)
        backward += 2 * c * (q + k)
    if work.precision == "fp8":  # each input and each gradient
        forward += work.cast_bytes * (2 * config.dim + q + f)
        backward += work.cast_bytes * (2 * config.dim + q + 2 * k + 2 * f)
    again = 0.0 if work.recompute == "none" else forward
    kernels = 8 if work.compiled else 30
    started = kernels * LAUNCH_S
    return Seconds(
        max(tokens * forward / device.read, started),
        max(tokens * backward / device.read, started),
        max(tokens * again / device.read, started) if again else 0.0,
    )


def optimizer_time(own: float, work: Work, device: Device) -> float:
    """AdamW and the gradient's norm over the `own` weights of a rank."""
    return own * OPTIMIZER_BYTES * (1 if work.fused_optimizer else FOREACH) / device.read
