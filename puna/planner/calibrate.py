"""A device's speeds from a measurement, in the place of the table's.

Two kinds of measurement. A training run that is known (its tokens per second and everything about it) says by how much
the machine differs from the table: all speeds of computing are scaled so that the planner's time for that run is the
measured one; links stay. Or the machine at hand is measured for a few seconds (`puna plan --calibrate`): products,
attention and reading memory. That needs PyTorch, which is imported only then; the result is a hardware file that later
plans take with `--hardware`.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from puna.artifacts import write_atomic
from puna.config import require
from puna.model.sizes import LlamaConfig
from puna.parallel.layout import Layout
from puna.planner.compute import ATTENTION_BACKWARD
from puna.planner.hardware import Device, built_in
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


def measure(name: str = "here", *, seconds: float = 10.0) -> dict[str, Any]:
    """The machine at hand as an entry of a hardware file: products, attention, reading, the peak taken for the best product.

    Takes about `seconds`. On a GPU the table's entry of the same name gives what is not measured here (links, node),
    else the CPU's.
    """
    import torch

    cuda = torch.cuda.is_available()
    kind = torch.cuda.get_device_name() if cuda else "CPU"
    like = next((n for n in built_in() if cuda and n in kind), "H100" if cuda else "CPU")
    place, each = torch.device("cuda" if cuda else "cpu"), seconds / 5
    size = 8192 if cuda else 1024
    matmul = {
        precision: _products(torch, place, dtype, size, each)
        for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }
    forward, backward = _attention(torch, place, 8192 if cuda else 1024, each)
    measured = f"measured by `puna plan --calibrate` on {kind}"
    entry: dict[str, Any] = {
        "like": like,
        "memory_bytes": float(torch.cuda.mem_get_info()[1]) if cuda else _ram(),
        "read": _reading(torch, place, 1 << (30 if cuda else 27), each),
        "matmul": matmul if not cuda else {**dict(built_in()[like].matmul), "bf16": matmul["bf16"]},
        "attention": {"plain": [forward, backward]},
    }
    if not cuda:
        entry["peak"] = matmul  # no data sheet: MFU is then a share of the best product
    entry["sources"] = dict.fromkeys(
        ("memory_bytes", "read", "matmul", "attention", *(("peak",) if not cuda else ())), measured
    )
    return {name: entry}


def save(entry: dict[str, Any], path: Path) -> None:
    """Write a hardware file in TOML or, by its ending, JSON; entries of others that it holds are kept."""
    import json
    import tomllib

    hint = "give a name that ends in .json or .toml"
    require(path.suffix in (".json", ".toml"), f"{path} is neither JSON nor TOML", hint=hint)
    old: dict[str, Any] = {}
    if path.exists():
        text = path.read_text()
        old = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    made = old | entry
    write_atomic(path, json.dumps(made, indent=1) + "\n" if path.suffix == ".json" else _toml(made))


def _toml(sections: dict[str, Any]) -> str:
    """Sections of numbers, texts, lists and one level of tables."""
    import json

    lines = []
    for name, section in sections.items():
        lines.append(f"[{json.dumps(name)}]")
        for key, value in section.items():
            if key == "sources":
                continue
            inner = ", ".join(f"{k} = {json.dumps(v)}" for k, v in value.items()) if isinstance(value, dict) else ""
            lines.append(f"{key} = {{ {inner} }}" if inner else f"{key} = {json.dumps(value)}")
        lines += [f"[{json.dumps(name)}.sources]"] + [
            f"{k} = {json.dumps(v)}" for k, v in section.get("sources", {}).items()
        ]
        lines.append("")
    return "\n".join(lines)


def _best(run: Callable[[], Any], work: float, budget_s: float, settle: Callable[[], Any]) -> float:
    """Work per second of the fastest of the runs that fit the budget."""
    run()
    settle()
    least, ends = float("inf"), time.perf_counter() + budget_s
    while least == float("inf") or time.perf_counter() < ends:
        started = time.perf_counter()
        run()
        settle()
        least = min(least, time.perf_counter() - started)
    return float(f"{work / least:.4g}")


def _settle(torch: Any, place: Any) -> Callable[[], Any]:
    return torch.cuda.synchronize if place.type == "cuda" else lambda: None


def _products(torch: Any, place: Any, dtype: Any, size: int, budget_s: float) -> float:
    """FLOP/s of a product of a Llama's shape: many tokens, width by feed-forward width."""
    a = torch.randn(size, size, device=place).to(dtype)
    b = torch.randn(size, 7 * size // 2, device=place).to(dtype)
    return _best(lambda: a @ b, 2 * size * size * b.shape[1], budget_s, _settle(torch, place))


def _attention(torch: Any, place: Any, length: int, budget_s: float) -> tuple[float, float]:
    """FLOP/s of causal attention, forward and backward, at 8,192 tokens by the shape of `Device.attention_flops`."""
    import torch.nn.functional as F

    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    q, k, v = (torch.randn(1, 8, length, 128, device=place, dtype=dtype, requires_grad=True) for _ in range(3))

    def forward() -> Any:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def both() -> None:
        forward().sum().backward()

    flops, settle = 2 * 8 * 128 * length * length, _settle(torch, place)
    once = _best(forward, flops, budget_s, settle)
    together = _best(both, 1.0, budget_s, settle)
    shape = (8192 / (8192 + 450)) / (length / (length + 450))
    back = ATTENTION_BACKWARD * flops / max(1 / together - flops / once, 0.1 / together)
    return float(f"{once * shape:.4g}"), float(f"{back * shape:.4g}")


def _reading(torch: Any, place: Any, size: int, budget_s: float) -> float:
    """Bytes per second of adding two vectors: two read, one written."""
    a, b = (torch.ones(size // 4, device=place) for _ in range(2))
    out = torch.empty_like(a)
    return _best(lambda: torch.add(a, b, out=out), 3 * size, budget_s, _settle(torch, place))


def _ram() -> float:
    import os

    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
