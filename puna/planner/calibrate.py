"""A device's speeds from a measurement, in the place of the table's.

Two kinds of measurement. A training run that is known (its tokens per second and everything about it) says by how much
the machine differs from the table: all speeds of computing are scaled so that the planner's time for that run is the
measured one; links stay. Or the machine at hand is measured for a few seconds (`puna plan --calibrate`): products,
attention and reading memory. That needs PyTorch, which is imported only then; the result is a hardware file that later
plans take with `--hardware`.
"""

from dataclasses import replace

from puna.model.sizes import LlamaConfig
from puna.parallel.layout import Layout
from puna.planner.hardware import Device
from puna.planner.step import step_time
from puna.planner.work import Work


def scaled(device: Device, factor: float, source: str) -> Device:
    """`device` with all that it computes `factor` times as fast."""
    named = dict.fromkeys(("matmul", "attention", "read"), f"{source}: the table's times {factor:.3f}")
    return replace(
        device,
        matmul={precision: factor * speed for precision, speed in device.matmul.items()},
        attention={kernel: (factor * f, factor * b) for kernel, (f, b) in device.attention.items()},
        read=factor * device.read,
        sources={**device.sources, **named},
    )


def from_run(
    device: Device, config: LlamaConfig, layout: Layout, work: Work, tokens_per_s_per_device: float, source: str
) -> Device:
    """`device` as a measured run shows it: computing scaled until the planner gives the measured speed."""
    low, high = 0.05, 5.0
    for _ in range(50):
        factor = (low * high) ** 0.5
        speed = step_time(config, layout, work, scaled(device, factor, source)).tokens_per_s_per_device
        low, high = (factor, high) if speed < tokens_per_s_per_device else (low, factor)
    return scaled(device, factor, source)
