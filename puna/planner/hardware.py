"""Machines as numbers: what one device computes, reads and sends in a second, each figure with its source.

The table is `hardware.toml`; a file of the user's own (TOML or JSON, the same fields) adds to it or replaces entries.
Times are computed from measured speeds; the data sheet's peak is only what MFU is a share of.
"""

import difflib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from puna.config import require
from puna.errors import ConfigError

PRECISIONS = ("bf16", "fp8", "fp32")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator (or a CPU) and its share of the links. FLOP/s, bytes, bytes/s, seconds."""

    name: str
    memory_bytes: float
    read: float  # memory bandwidth that elementwise kernels reach, bytes/s
    peak: Mapping[str, float]  # data sheet, dense, by precision: the denominator of MFU
    matmul: Mapping[str, float]  # measured on a Llama's shapes, by precision
    attention: Mapping[str, tuple[float, float]]  # causal, at 8,192 tokens: forward, backward; by kernel
    node: int  # devices that `link` joins
    link: float  # bus bandwidth of a collective inside a node, bytes/s
    link_latency_s: float  # of a collective inside a node
    network: float  # of a device's share between nodes, bytes/s
    network_latency_s: float  # for each hop between nodes
    comm_share: float  # of the processors, that a collective takes from the products it overlaps with
    spread: float  # standard deviation of equal devices' speeds: the slowest sets the pace
    power_w: float
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "read", "link", "network", "power_w"):
            value = getattr(self, name)
            require(_above_0(value), f"hardware {self.name}: {name}={value!r} must be a number above 0")
        for name, most in (("link_latency_s", 10.0), ("network_latency_s", 10.0), ("comm_share", 1.0), ("spread", 1.0)):
            value = getattr(self, name)
            good = type(value) in (int, float) and 0 <= value <= most
            require(good, f"hardware {self.name}: {name}={value!r} must be a number from 0 to {most:g}")
        good = type(self.node) is int and self.node > 0
        require(good, f"hardware {self.name}: node={self.node!r} must be a whole number above 0")
        for name in ("peak", "matmul"):
            values = getattr(self, name)
            hint = "for example { bf16 = 720e12 }"
            require(isinstance(values, Mapping) and values, f"hardware {self.name}: {name} is no table", hint=hint)
            unknown = sorted(set(values) - set(PRECISIONS))
            require(not unknown, f"hardware {self.name}: {name} of {unknown}", hint=f"known: {', '.join(PRECISIONS)}")
            wrong = {k: v for k, v in values.items() if not _above_0(v)}
            require(not wrong, f"hardware {self.name}: {name}={wrong} must be numbers above 0")
        kernels = self.attention
        good = isinstance(kernels, Mapping) and kernels and all(_pair(speeds) for speeds in kernels.values())
        hint = "for example { flash2 = [333e12, 286e12] }"
        require(bool(good), f"hardware {self.name}: attention needs [forward, backward] for each kernel", hint=hint)
        texts = isinstance(self.sources, Mapping) and all(isinstance(v, str) for v in self.sources.values())
        require(texts, f"hardware {self.name}: sources must be texts, one for each field")
        missing = sorted(set(self.matmul) - set(self.peak))
        require(not missing, f"hardware {self.name}: peak lacks {missing}", hint="MFU needs the data sheet's peak")

    def precision(self, wanted: str) -> str:
        """`wanted`, or what the device has instead: raises `ConfigError` if it cannot compute in it."""
        have = ", ".join(self.matmul)
        require(wanted in self.matmul, f"{self.name} has no {wanted} products", hint=f"it has {have}")
        return wanted

    def slowest(self, count: int) -> float:
        """How much longer the slowest of `count` equal devices takes: the mean largest of that many normal draws."""
        if count < 2:
            return 1.0
        far = math.sqrt(2 * math.log(count))
        return 1 + self.spread * max(0.56, far - (math.log(math.log(count)) + math.log(4 * math.pi)) / (2 * far))

    def attention_flops(self, kernel: str, length: int) -> tuple[float, float]:
        """Forward and backward FLOP/s of causal attention over `length` tokens.

        The best kernel the device has, if not `kernel`. Shorter rows are slower, by the shape of the published curves:
        half of the limit at about 450 tokens (arXiv 2407.08608, figure 5); the table's figures are those at 8,192.
        """
        forward, backward = self.attention.get(kernel) or max(self.attention.values())
        slower = (length / (length + 450)) / (8192 / (8192 + 450))
        return forward * slower, backward * slower


def _above_0(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30


def _pair(speeds: Any) -> bool:
    return isinstance(speeds, list | tuple) and len(speeds) == 2 and all(map(_above_0, speeds))


@cache
def built_in() -> dict[str, Device]:
    """The devices of `hardware.toml`."""
    return _devices(tomllib.loads(files("puna.planner").joinpath("hardware.toml").read_text()), {})


def devices(extra: Path | None = None) -> dict[str, Device]:
    """All known devices; those of the file `extra` (TOML or JSON) come on top. Raises `ConfigError` if it is wrong."""
    if extra is None:
        return built_in()
    try:
        text = extra.read_text()
        data = json.loads(text) if extra.suffix == ".json" else tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{extra}: {error}", hint="give a readable TOML or JSON file") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{extra} is not {'JSON' if extra.suffix == '.json' else 'TOML'}: {error}") from None
    require(isinstance(data, dict), f"{extra} holds no devices", hint="one section for each: [NAME] and its numbers")
    return built_in() | _devices(data, built_in())


def device(name: str, extra: Path | None = None) -> Device:
    """The device called `name`, in any case. Raises `ConfigError` with the nearest name if there is none."""
    known = devices(extra)
    found = next((d for n, d in known.items() if n.lower() == name.lower()), None)
    if found is None:
        near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.8)  # a slip of the finger, not a V100
        hint = f"did you mean {near[0]}? " if near else ""
        hint += f"known: {', '.join(known)}; others by --hardware FILE"
        raise ConfigError(f"no device is called {name!r}", hint=hint)
    return found


def cluster(text: str, extra: Path | None = None) -> tuple[int, Device]:
    """`64xH100` as a count and a device; a device alone is one of it. Raises `ConfigError` if it is neither."""
    if any(text.strip().lower() == name.lower() for name in devices(extra)):
        return 1, device(text.strip(), extra)
    match = re.fullmatch(r"\s*(\d[\d_,]*)\s*[xX*×]\s*(\S+)\s*", text)
    hint = "write COUNTxNAME, for example 64xH100; 1xCPU is a computer without a GPU"
    require(match is not None, f"{text!r} is not a number of devices", hint=hint)
    count = int(re.sub(r"[_,]", "", match[1]))
    hint = "give 1 to 10,000,000; 1xCPU is a computer without a GPU"
    require(0 < count <= 10_000_000, f"{count:,} devices cannot be planned", hint=hint)
    return count, device(match[2], extra)


def _devices(data: Mapping[str, Any], known: Mapping[str, Device]) -> dict[str, Device]:
    found: dict[str, Device] = {}
    for name, section in data.items():
        require(isinstance(section, Mapping), f"hardware {name!r} is not a section of numbers")
        require(bool(re.fullmatch(r"\S+", name)), f"hardware {name!r} is no name", hint="one word, for --gpus 8xNAME")
        given = dict(section)
        like = given.pop("like", None)
        require(like is None or isinstance(like, str), f"hardware {name!r} is like {like!r}, which is no name")
        base = {**known, **found}.get(like) if like is not None else None
        require(like is None or base is not None, f"hardware {name!r} is like {like!r}, which is not known before it")
        found[name] = _device(name, given, base)
    return found


def _device(name: str, given: dict[str, Any], base: Device | None) -> Device:
    names = {f.name for f in fields(Device)} - {"name"}
    unknown = sorted(set(given) - names)
    hint = f"a device has {', '.join(sorted(names))}, and may be `like` another"
    require(not unknown, f"hardware {name!r} has no {', '.join(map(repr, unknown))}", hint=hint)
    missing = sorted(names - {"sources"} - set(given)) if base is None else []
    require(not missing, f"hardware {name!r} lacks {', '.join(missing)}", hint="give them, or say what it is `like`")
    if "attention" in given:
        kernels = given["attention"]
        require(isinstance(kernels, Mapping), f"hardware {name!r}: attention is no table of kernels")
        given["attention"] = {k: tuple(v) if isinstance(v, list) else v for k, v in kernels.items()}
    require(isinstance(given.get("sources", {}), Mapping), f"hardware {name!r}: sources is no table of texts")
    if base is not None:
        return replace(base, name=name, **{**given, "sources": {**base.sources, **given.get("sources", {})}})
    return Device(name=name, **given)
