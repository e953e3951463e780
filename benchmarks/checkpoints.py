"""Opening, loading and converting checkpoints: seconds and memory, next to `transformers` and llama.cpp's converter, in one run.

    python benchmarks/checkpoints.py --converter llama.cpp/convert_hf_to_gguf.py
    python benchmarks/checkpoints.py --shape llama-3.2-1b --layers 2 --rounds 1       a small try

Writes a checkpoint of the shape of Llama 3.2 1B (bfloat16, random weights, and a SentencePiece vocabulary of made-up pieces, for
llama.cpp's converter knows byte-level ones by name only), then in turns, `--rounds` times:

    load      ours and `transformers.from_pretrained`, into bfloat16 and float32, each up to the first logits (what is mapped
              but not read has not been loaded), in a fresh process, counted after its imports
    convert   `puna convert` and `convert_hf_to_gguf.py`, whole processes from start to end
    memory    the peak of each process above what it has after its imports, as a share of the target's size

And a folder of the shape of Llama 3.1 8B, in bfloat16 and four files with an index, all holes: opened, every shape known, no
weight read. Nothing else should run on the machine. llama.cpp's converter is a file of its repository, not a package.
"""

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import command, processor, revision

from puna.model.checkpoint import hf_config
from puna.model.convert import hf_name
from puna.model.sizes import SIZES, LlamaConfig
from puna.model.tensorfile import write_tensors

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
# Each prints the seconds that it took and the peak of its memory, before and after, in bytes.
CHILD = """
import json, sys, time
import torch
{imports}
def peak():
    # Of this program alone: what getrusage tells begins with the memory of the process that started it.
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
path, dtype = sys.argv[1], getattr(torch, sys.argv[2])
ids = torch.tensor([[1, 2, 3]])
before, started = peak(), time.perf_counter()
with torch.no_grad():
    {work}
print(json.dumps({{"seconds": time.perf_counter() - started, "before": before, "after": peak()}}))
"""
LOADERS = {
    "ours": CHILD.format(
        imports="from pathlib import Path\nfrom puna.model.opening import load_checkpoint\nfrom puna.model.llama import attend_with",
        work="load_checkpoint(Path(path), dtype)(ids, torch.arange(3)[None], attend_with(None))",
    ),
    "transformers": CHILD.format(
        imports="from transformers import LlamaForCausalLM",
        work="LlamaForCausalLM.from_pretrained(path, dtype=dtype)(ids, use_cache=False)",
    ),
}
OPENING = CHILD.format(
    imports="from pathlib import Path\nfrom puna.model.opening import open_checkpoint",
    work="with open_checkpoint(Path(path)) as o: assert {n: o.weights.shape(n) for n in o.weights.names}",
)
CONVERTING = CHILD.format(
    imports="from pathlib import Path\nfrom puna.model.conversion import convert",
    work="convert(Path(path), Path(sys.argv[3]), sys.argv[4], sys.argv[5])",
)
FORMS = {"BF16": "bf16", "F16": "f16", "Q8_0": "q8_0"}  # ours and the converter's names


def hf_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face's names and shapes."""
    return {hf_name(name): shape for name, shape in config.shapes().items()}


def write_random(config: LlamaConfig, out: Path) -> None:
    """A Hugging Face folder with normal bfloat16 weights, and a vocabulary."""
    out.mkdir()
    (out / "config.json").write_text(
        json.dumps(hf_config(config, torch.bfloat16) | {"bos_token_id": 1, "eos_token_id": 2})
    )
    generator = torch.Generator().manual_seed(0)

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(0, 0.02, generator=generator)

    pending = {n: (torch.bfloat16, s, lambda s=s: values(s)) for n, s in hf_shapes(config).items()}
    write_tensors(out / "model.safetensors", pending, {"format": "pt"})
    (out / "tokenizer.model").write_bytes(vocabulary(config.vocab_size))


def vocabulary(size: int) -> bytes:
    """A SentencePiece model of `size` pieces: unknown, begin, end, the bytes, and numbered words."""
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
    pieces += [(f"\u2581w{number}", 1) for number in range(size - len(pieces))]
    parts = [
        message(1, string(1, text) + struct.pack("<Bf", 2 << 3 | 5, -id) + number(3, kind))
        for id, (text, kind) in enumerate(pieces)
    ]
    trainer = number(3, 2) + number(35, 1)  # byte pairs, falling back to bytes
    return (
        b"".join(parts)
        + message(2, trainer)
        + message(3, string(1, "identity") + number(3, 1) + number(4, 0) + number(5, 1))
    )


def number(field: int, value: int) -> bytes:
    """A whole number as protocol buffers write it."""
    return varint(field << 3) + varint(value)


def string(field: int, text: str) -> bytes:
    return message(field, text.encode())


def message(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def write_holes(config: LlamaConfig, out: Path, files: int) -> int:
    """A folder with true headers and no weights: files of holes, which take no room. Returns their size."""
    out.mkdir()
    (out / "config.json").write_text(json.dumps(hf_config(config, torch.bfloat16)))
    where, size, names = {}, 0, list(hf_shapes(config).items())
    for index in range(files):
        name, header, offset = f"model-{index + 1:05}-of-{files:05}.safetensors", {}, 0
        for tensor, shape in names[len(names) * index // files : len(names) * (index + 1) // files]:
            end = offset + 2 * torch.Size(shape).numel()
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            where[tensor], offset = name, end
        text = json.dumps(header).encode()
        (out / name).write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(out / name, 8 + len(text) + offset)
        size += offset
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": where})
    )
    return size


def child(script: str, *arguments: str) -> dict[str, float]:
    """Run one of the scripts above in a process of its own."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    if done.returncode:
        raise SystemExit(f"{command[3:]} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def process(command: list[str]) -> dict[str, float]:
    """A whole process: its seconds, and its peak memory in bytes, as it was a hundredth of a second before its end."""
    peak, started = 0, time.perf_counter()
    with tempfile.TemporaryFile() as said:
        running = subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | {"PYTHONPATH": str(ROOT)})
        while running.poll() is None:
            peak = max(peak, high_water(running.pid))
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        if running.returncode:
            said.seek(0)
            raise SystemExit(f"{command} failed:\n{said.read().decode()[-2000:]}")
    return {"seconds": seconds, "peak": peak}


def high_water(pid: int) -> int:
    """The most memory that a process has had; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def loading(source: Path, config: LlamaConfig, rounds: int) -> dict[str, Any]:
    """Both loaders in turns."""
    found = {}
    for dtype in ("bfloat16", "float32"):
        size = config.parameters * getattr(torch, dtype).itemsize
        runs: dict[str, list] = {name: [] for name in LOADERS}
        for _ in range(rounds):
            for name, script in LOADERS.items():
                runs[name].append(child(script, str(source), dtype))
        found[dtype] = summed(runs, dict.fromkeys(runs, size), "after", "before")
    return found


def converting(source: Path, converter: Path | None, rounds: int, work: Path) -> dict[str, Any]:
    """Both converters in turns, each as a user starts it."""
    found = {}
    for form, theirs in FORMS.items():
        commands: dict[str, Callable[[Path], list[str]]] = {
            "ours": lambda out, form=form: [
                sys.executable,
                "-m",
                "puna.cli",
                "convert",
                str(source),
                str(out),
                "--to",
                "gguf",
                "--form",
                form,
            ]
        }
        if converter:
            commands["llama.cpp"] = lambda out, theirs=theirs: [
                sys.executable, str(converter), str(source), "--outfile", str(out), "--outtype", theirs
            ]  # fmt: skip
        runs: dict[str, list] = {name: [] for name in commands}
        sizes = {}
        for _ in range(rounds):
            for name, started in commands.items():
                out = work / "out.gguf"
                runs[name].append(process(started(out)))
                sizes[name] = out.stat().st_size
                out.unlink()
        found[form] = summed(runs, sizes, "peak", None)
    return found


def memory_of_conversions(source: Path, work: Path) -> dict[str, Any]:
    """The peak of ours above what it has after its imports, for every target."""
    found = {}
    targets = [("gguf", form) for form in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K_M")]
    for to, form in [*targets, ("huggingface", "BF16"), ("huggingface", "F32"), ("meta", "BF16")]:
        out = work / ("out.gguf" if to == "gguf" else "out")
        run = child(CONVERTING, str(source), "bfloat16", str(out), to, form)
        files = [out] if out.is_file() else sorted(out.iterdir())
        size = sum(file.stat().st_size for file in files)
        found[f"{to} {form}"] = {
            "target": size,
            "peak": run["after"] - run["before"],
            "share": (run["after"] - run["before"]) / size,
        }
        subprocess.run(["rm", "-r", str(out)], check=True)
    return found


def summed(runs: dict[str, list], sizes: dict[str, int], peak: str, less: str | None) -> dict[str, Any]:
    """Medians of each, and ours as a ratio."""
    found: dict[str, Any] = {}
    for name, many in runs.items():
        most = max(run[peak] - (run[less] if less else 0) for run in many)
        found[name] = {
            "seconds": round(statistics.median(run["seconds"] for run in many), 3),
            "peak memory, GB": round(most / 1e9, 3),
            "peak memory as a share of the target": round(most / sizes[name], 3),
        }
    for name in found.keys() - {"ours"}:
        found[name]["its time as a multiple of ours"] = round(found[name]["seconds"] / found["ours"]["seconds"], 2)
    return found


def shape_of(name: str, layers: int | None) -> LlamaConfig:
    """A released shape, of fewer layers if asked."""
    return dataclasses.replace(SIZES[name], n_layers=layers or SIZES[name].n_layers)


def main() -> None:
    """Write, measure in turns, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py; without it ours stands alone"
    )
    parser.add_argument("--shape", choices=SIZES, default="llama-3.2-1b", metavar="NAME")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where to write the result")
    given = parser.parse_args()
    config = shape_of(given.shape, given.layers)
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": f"{os.cpu_count()} cores of {processor()}",
        "revision": revision(),
        "command": command(),
        "parameters": config.parameters,
    }
    with tempfile.TemporaryDirectory() as work:
        holes, source = Path(work) / "holes", Path(work) / "source"
        size = write_holes(SIZES["llama-3.1-8b"], holes, 4)
        runs = [child(OPENING, str(holes), "bfloat16") for _ in range(given.rounds)]
        record["opening an 8B folder"] = {
            "bytes": size,
            "seconds, median": statistics.median(run["seconds"] for run in runs),
            "seconds, worst": max(run["seconds"] for run in runs),
            "memory, MB": max(run["after"] - run["before"] for run in runs) / 1e6,
        }
        write_random(config, source)
        record["memory of conversions"] = memory_of_conversions(source, Path(work))
        record["loading"] = loading(source, config, given.rounds)
        record["converting"] = converting(source, given.converter, given.rounds, Path(work))
    print(json.dumps(record, indent=1))
    out = given.out or RESULTS / f"checkpoints-{record['date'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
