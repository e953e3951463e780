"""Opening, loading and converting checkpoints: seconds and memory, next to `transformers` and llama.cpp's converter, in one run.

    python benchmarks/checkpoints.py --converter llama.cpp/convert_hf_to_gguf.py      at most six minutes or so
    python benchmarks/checkpoints.py --shape llama-3.2-1b --layers 2 --rounds 1       a small try
    python benchmarks/checkpoints.py --stages load convert --rounds 5 --minutes 20

Writes a checkpoint of the shape of Llama 3.2 1B (bfloat16, random weights, and a SentencePiece vocabulary of made-up pieces, for
llama.cpp's converter knows byte-level ones by name only), then in turns, `--rounds` times:

    load      ours and `transformers.from_pretrained`, into bfloat16 and float32, each up to the first logits (what is mapped
              but not read has not been loaded), in a fresh process, counted after its imports
    convert   `puna convert` and `convert_hf_to_gguf.py`, whole processes from start to end
    quantise  `puna convert --form Q4_K_M` and Q4_0, and llama.cpp's quantiser (of `llama-cpp-python`, if it is installed)
              from our BF16 file: it cannot start from a folder, so what its converter took comes on top
    memory    the peak of our conversions above what they have after their imports, as a share of the target's size

The result is written after every measurement, so that a run which is cut short keeps what it has. No round begins after
`--minutes`: each row says how many it had.

And a folder of the shape of Llama 3.1 8B, in bfloat16 and four files with an index, all holes: opened, every shape known, no
weight read. Nothing else should run on the machine. llama.cpp's converter is a file of its repository, not a package.
"""

import argparse
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from machine import command, processor, revision

from puna.artifacts import write_atomic
from puna.model.checkpoint import hf_config
from puna.model.convert import hf_name
from puna.model.sizes import SIZES, LlamaConfig
from puna.model.tensorwriter import write_tensors

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
FORMS = {"BF16": "bf16", "Q8_0": "q8_0"}  # ours and the converter's names
KINDS = {"Q4_K_M": 15, "Q4_0": 2}  # ours and llama.cpp's numbers
QUANTISER = """
import sys, llama_cpp
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype, settings.nthread = int(sys.argv[3]), int(sys.argv[4])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), settings))
"""
STAGES = ("load", "convert", "quantise", "memory")
Save = Callable[[], None]


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
        if len(shape) == 1:
            return torch.ones(shape)
        drawn = torch.empty(1 << 20, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        return drawn.repeat(-(-math.prod(shape) // len(drawn)))[: math.prod(shape)].view(shape)

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


class Rounds:
    """At least one round, and no more than `most`, none of which begins after `deadline`."""

    def __init__(self, most: int, deadline: float):
        self.most, self.deadline = most, deadline

    def __iter__(self) -> Iterator[int]:
        for number in range(self.most):
            if number and time.monotonic() > self.deadline:
                return
            yield number

    @property
    def over(self) -> bool:
        return time.monotonic() > self.deadline


def say(what: str, run: dict[str, float]) -> None:
    print(f"{what}: {run.get('seconds', 0):.2f} s", file=sys.stderr, flush=True)


def loading(source: Path, config: LlamaConfig, rounds: Rounds, found: dict[str, Any], save: Save) -> None:
    """Both loaders in turns."""
    for dtype in ("bfloat16", "float32"):
        size = config.parameters * getattr(torch, dtype).itemsize
        runs: dict[str, list] = {name: [] for name in LOADERS}
        for _ in rounds:
            for name, script in LOADERS.items():
                runs[name].append(child(script, str(source), dtype))
                say(f"load {dtype}, {name}", runs[name][-1])
            found[dtype] = summed(runs, dict.fromkeys(runs, size), "after", "before")
            save()


def in_turns(
    commands: dict[str, list[str]], out: Path, label: str, rounds: Rounds, keep: Callable[[dict], None]
) -> None:
    """Whole processes that write `out`, each in its turn; `keep` gets what is known after each round."""
    runs: dict[str, list] = {name: [] for name in commands}
    sizes = {}
    for _ in rounds:
        for name, started in commands.items():
            runs[name].append(process(started))
            say(f"{label}, {name}", runs[name][-1])
            sizes[name] = out.stat().st_size
            out.unlink()
        keep(summed(runs, sizes, "peak", None))


def ours(source: Path, out: Path, form: str) -> list[str]:
    return [sys.executable, "-m", "puna.cli", "convert", str(source), str(out), "--to", "gguf", "--form", form]


def converting(
    source: Path, converter: Path | None, work: Path, rounds: Rounds, found: dict[str, Any], save: Save
) -> None:
    """Both converters in turns, each as a user starts it."""
    out = work / "out.gguf"
    for form, theirs in FORMS.items():
        commands = {"ours": ours(source, out, form)}
        if converter:
            convert = [sys.executable, str(converter), str(source), "--outfile", str(out), "--outtype", theirs]
            commands["llama.cpp"] = convert
        in_turns(commands, out, f"convert {form}", rounds, lambda row, form=form: (found.update({form: row}), save()))


def quantising(source: Path, work: Path, rounds: Rounds, found: dict[str, Any], save: Save) -> None:
    """Both quantisers in turns, with all cores; ours reads the folder, theirs our BF16 file."""
    out, plain = work / "out.gguf", work / "plain.gguf"
    has_peer = importlib.util.find_spec("llama_cpp") is not None
    if has_peer:
        say("BF16 for llama.cpp's quantiser", process(ours(source, plain, "BF16")))
    for form, number in KINDS.items():
        commands = {"ours": ours(source, out, form)}
        if has_peer:
            given = [str(plain), str(out), str(number), str(os.cpu_count())]
            commands["llama.cpp"] = [sys.executable, "-c", QUANTISER, *given]
        in_turns(commands, out, f"quantise {form}", rounds, lambda row, form=form: (found.update({form: row}), save()))
    plain.unlink(missing_ok=True)


def memory_of_conversions(source: Path, work: Path, rounds: Rounds, found: dict[str, Any], save: Save) -> None:
    """The peak of ours above what it has after its imports, for every target that there is time for."""
    targets = [("meta", "BF16"), ("huggingface", "BF16"), ("gguf", "Q4_K_M"), ("gguf", "BF16"), ("gguf", "Q8_0")]
    for to, form in [*targets, ("gguf", "Q4_0"), ("huggingface", "F32"), ("gguf", "F16"), ("gguf", "F32")]:
        if found and rounds.over:
            return
        out = work / ("out.gguf" if to == "gguf" else "out")
        run = child(CONVERTING, str(source), "bfloat16", str(out), to, form)
        say(f"memory of {to} {form}", run)
        files = [out] if out.is_file() else sorted(out.iterdir())
        size = sum(file.stat().st_size for file in files)
        peak = run["after"] - run["before"]
        found[f"{to} {form}"] = {"target": size, "peak": peak, "share": peak / size, "seconds": run["seconds"]}
        save()
        subprocess.run(["rm", "-r", str(out)], check=True)


def summed(runs: dict[str, list], sizes: dict[str, int], peak: str, less: str | None) -> dict[str, Any]:
    """Medians of each, and ours as a ratio."""
    found: dict[str, Any] = {}
    for name, many in runs.items():
        most = max(run[peak] - (run[less] if less else 0) for run in many)
        found[name] = {
            "rounds": len(many),
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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=5.0, help="after which no further round begins")
    parser.add_argument("--stages", choices=STAGES, nargs="+", default=list(STAGES))
    parser.add_argument("--out", type=Path, help="where to write the result")
    parser.add_argument(
        "--work", type=Path, help="a folder on the disk to measure on, with 12 GB free; the system's own"
    )
    given = parser.parse_args()
    config = shape_of(given.shape, given.layers)
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": f"{os.cpu_count()} cores of {processor()}",
        "revision": revision(),
        "command": command(),
        "parameters": config.parameters,
    }
    out = given.out or RESULTS / f"checkpoints-{record['date'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    rounds = Rounds(given.rounds, time.monotonic() + 60 * given.minutes)

    def save() -> None:
        write_atomic(out, json.dumps(record, indent=1) + "\n")

    with tempfile.TemporaryDirectory(dir=given.work) as work:
        holes, source = Path(work) / "holes", Path(work) / "source"
        size = write_holes(SIZES["llama-3.1-8b"], holes, 4)
        runs = [child(OPENING, str(holes), "bfloat16") for _ in range(given.rounds)]
        record["opening an 8B folder"] = {
            "bytes": size,
            "seconds, median": statistics.median(run["seconds"] for run in runs),
            "seconds, worst": max(run["seconds"] for run in runs),
            "memory, MB": max(run["after"] - run["before"] for run in runs) / 1e6,
        }
        print("writing the checkpoint", file=sys.stderr, flush=True)
        write_random(config, source)
        stages: dict[str, Callable[[dict], None]] = {
            "load": lambda found: loading(source, config, rounds, found, save),
            "convert": lambda found: converting(source, given.converter, Path(work), rounds, found, save),
            "quantise": lambda found: quantising(source, Path(work), rounds, found, save),
            "memory": lambda found: memory_of_conversions(source, Path(work), rounds, found, save),
        }
        for stage in given.stages:
            record[stage] = {}
            stages[stage](record[stage])
    print(json.dumps(record, indent=1))
    print(f"wrote {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
