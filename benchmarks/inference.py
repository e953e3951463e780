"""Our inference engine beside llama.cpp, transformers, torchao and OpenVINO, in one run, on the same weights.

    python benchmarks/inference.py --quick                      two minutes: does it work here, roughly how fast
    python benchmarks/inference.py                              the 1B shape in bf16, 8 and 4 bits, with 2 threads; 8 bits
                                                                in groups of 32 and of 128
    python benchmarks/inference.py --shape 8b --formats int4    the 8B shape, which fits 16 GB at 4 bits
    python benchmarks/inference.py --threads 1 --measures decode:0 prefill:512

The weights are random and made here, once, into `--into`; every file holds the very same numbers (`inference_peers/weights.py`),
so the engines should also say the same tokens: the first answers are printed for comparison. Each engine is a process that
sleeps while others are measured. They take turns at each question, with a probe of the memory's bandwidth before every
measurement, for several rounds. Medians and quartiles over the rounds go to standard output, all measurements to
`benchmarks/results/inference-DATE-SHAPE.json`. Nothing else should run on the machine meanwhile.

What engines do the same: greedy decoding of one token at a time; a cache of 16-bit numbers; prompts in pieces of 512 (transformers
and OpenVINO: at once). How the cache gets its contents before decoding is measured: ours and transformers' by writing random
keys and values, llama.cpp's by reading a prompt (once; then it is restored from a file), OpenVINO's by reading one each time.
An engine that is not installed, or fails, is named and left out. OpenVINO may live in another environment: `--python openvino=PATH`.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path

from inference_peers import weights
from inference_peers.exchange import Child, PeerError
from inference_peers.measures import Measure, Record, plain, summary, table
from inference_peers.probe import Probe
from machine import command, processor, revision

from puna import log

RESULTS = Path(__file__).parent / "results"
# engine -> format -> the file that it reads, and settings of its own
FILES = {
    "ours": {"bf16": "hf", "int8": "int8", "int8-128": "int8-128", "int4": "int4"},
    "llama.cpp": {"bf16": "bf16.gguf", "int8": "q8_0.gguf", "int4": "q4_0.gguf"},
    "transformers": {"bf16": "hf"},
    "torchao": {"int8": "hf", "int4": "hf"},
    "openvino": {"bf16": "hf", "int8": "hf", "int4": "hf"},
}
MEASURES = [*(("prefill", n) for n in (32, 512, 4096)), *(("decode", n) for n in (0, 4096, 16384)),
            *(("batch", n) for n in (1, 8, 32, 64))]  # fmt: skip
QUICK = [("prefill", 32), ("prefill", 512), ("decode", 0), ("batch", 8)]


class Line:
    """Who takes part: running engines by (engine, format), and why others do not."""

    def __init__(self, args: argparse.Namespace, threads: int):
        self.args, self.threads = args, threads
        self.children: dict[tuple[str, str], Child] = {}
        self.facts: dict[tuple[str, str], dict] = {}
        self.absent: dict[str, str] = {}

    def open(self, engine: str, form: str) -> Child:
        """Start an engine and load its weights. Raises `PeerError`."""
        file = self.args.folder / FILES[engine][form]
        weights.write(weights.shape(self.args.shape), FILES[engine][form], file)
        settings = {"path": str(file), "threads": self.threads}
        if engine in ("torchao", "openvino"):
            settings["scheme"] = form
        name = self.args.ours if engine == "ours" else engine
        python = self.args.python.get(engine, sys.executable)
        child = Child(name, settings, self.args.folder / f"{engine}-{form}.log", python)
        try:
            child.loaded = child.ask("load")
        except PeerError:
            child.close()
            raise
        facts = child.loaded["result"]
        if engine == "llama.cpp":
            facts["read per token"] = weights.read_per_token(file)
        self.facts[engine, form] = facts
        return child

    def __enter__(self) -> "Line":
        for engine, form in pairs(self.args):
            try:
                self.children[engine, form] = self.open(engine, form)
                loaded = self.children[engine, form].loaded
                read = self.facts[engine, form]["read per token"] / 1e6
                log.info(
                    f"{engine} {form}: loaded in {loaded['seconds']:.1f} s, reads {read:,.0f} MB of weights a token"
                )
            except PeerError as error:
                self.drop(engine, form, str(error))
        return self

    def drop(self, engine: str, form: str, why: str) -> None:
        log.warn(f"{engine} {form} is left out: {why}")
        self.absent[f"{engine} {form}, {self.threads} threads"] = why
        if child := self.children.pop((engine, form), None):
            child.close()

    def __exit__(self, *_: object) -> None:
        for child in self.children.values():
            child.close()


def pairs(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(engine, format) in the order of their turns."""
    return [(e, f) for f in args.formats for e in args.engines if f in FILES[e]]


def measure_all(line: Line, probe: Probe, args: argparse.Namespace, records: list[Record]) -> None:
    """All rounds, onto `records`: what was measured before an interruption is kept."""
    for number in range(args.rounds):
        for measure in args.measures:
            for (engine, form), child in list(line.children.items()):
                try:
                    measure.prepare(child)
                    bandwidth = probe()
                    speed, said = measure.take(child, args.tokens)
                except PeerError as error:
                    line.drop(engine, form, f"{measure}: {error}")
                    continue
                read = line.facts[engine, form]["read per token"]
                records.append(Record(line.threads, engine, form, str(measure), number, bandwidth, speed, read))
                note = f"  says {said}" if number == 0 else ""
                log.info(
                    f"round {number + 1}, {measure}, {engine} {form}: {speed:.1f} tok/s, probe {bandwidth:.0f} GB/s{note}"
                )


def cold(args: argparse.Namespace, threads: int) -> list[dict]:
    """New processes, one after the other: seconds to the first token, and memory after a little work."""
    line = Line(args, threads)
    found: dict[tuple[str, str], list[dict]] = {pair: [] for pair in pairs(args)}
    for _ in range(args.cold):
        for (engine, form), runs in found.items():
            if runs is None:
                continue
            try:
                runs.append(one_start(line, engine, form))
            except PeerError as error:
                line.drop(engine, form, f"cold start: {error}")
                found[engine, form] = None
    rows = []
    for (engine, form), runs in found.items():
        if runs:
            middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            rows.append({"threads": threads, "engine": engine, "form": form, "n": len(runs)} | middle)
    return rows


def one_start(line: Line, engine: str, form: str) -> dict:
    """A process from its start to its first token; then a prompt of 512 and a few steps, and the memory they took."""
    child = line.open(engine, form)
    try:
        first = child.ask("prefill", tokens=32)
        whole = time.perf_counter() - child.started
        child.ask("prefill", tokens=512)
        child.ask("start", contexts=[512], room=16)
        child.ask("decode", steps=16)
        memory = child.ask("memory")
    finally:
        child.close()
    loaded = child.loaded["seconds"] + first["seconds"]
    return {"process to token, s": whole, "load to token, s": loaded, "imports, s": child.imports,
            "peak MB": memory["peak"] / 1e6, "own MB": memory["own"] / 1e6}  # fmt: skip


def cold_table(rows: list[dict]) -> str:
    if not rows:
        return ""
    lines = [
        "\nnew process, prompt of 32, files in the page cache: seconds to the first token (from load on), peak memory"
    ]
    for row in sorted(rows, key=lambda r: (r["threads"], r["form"], r["process to token, s"])):
        lines.append(
            f"  {row['form']:5} {row['engine']:13} {row['process to token, s']:6.2f} s  ({row['load to token, s']:.2f} s)"
            f"  {row['peak MB']:7,.0f} MB, {row['own MB']:,.0f} MB of it not of files"
        )
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(weights.SHAPES), default="1b")
    parser.add_argument("--formats", nargs="+", choices=list(FILES["ours"]), help="default: all; int4 of the 8b")
    parser.add_argument("--engines", nargs="+", choices=list(FILES), default=list(FILES))
    parser.add_argument(
        "--ours", choices=["runner", "engine"], default="runner", help="the runner, or all of the engine"
    )
    parser.add_argument("--measures", nargs="+", metavar="KIND:SIZE", help="prefill, decode (at a context) or batch")
    parser.add_argument("--threads", nargs="+", type=int, default=[2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="steps of a decode; a fourth of it for batches")
    parser.add_argument("--cold", type=int, default=3, help="how often each is started anew; 0: not")
    parser.add_argument("--into", type=Path, default=Path("out/benchmarks/inference"), help="where the weights lie")
    parser.add_argument("--python", nargs="+", default=[], metavar="ENGINE=PATH", help="an engine's own environment")
    parser.add_argument("--quick", action="store_true", help="one round of four questions, 4 and 8 bits")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.cold, args.tokens = 1, 1, 16
    default = ["int8", "int4"] if args.quick else list(FILES["ours"])
    args.formats = args.formats or (["int4"] if args.shape == "8b" else default)
    asked = [m.split(":") for m in args.measures] if args.measures else QUICK if args.quick else MEASURES
    args.measures = [Measure(kind, int(size)) for kind, size in asked]
    args.python = dict(pair.split("=", 1) for pair in args.python)
    args.folder = args.into / args.shape
    return args


def main() -> None:
    args = parsed()
    args.folder.mkdir(parents=True, exist_ok=True)
    records, starts, absent, facts = [], [], {}, {}
    probe = None
    try:
        for threads in args.threads:
            probe = Probe(threads)
            with Line(args, threads) as line:
                try:
                    measure_all(line, probe, args, records)
                finally:
                    absent |= line.absent
                    facts |= {f"{engine} {form}": fact for (engine, form), fact in line.facts.items()}
            starts += cold(args, threads)
    except KeyboardInterrupt:
        log.warn("stopped: what follows is of the rounds so far")
    rows = summary(records, "ours")
    print(table(rows) + cold_table(starts))
    for who, why in absent.items():
        print(f"not measured: {who}: {why}")
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"inference-{datetime.date.today()}-{args.shape}{'-quick' * args.quick}.json"
    result = {
        "command": command(), "machine": processor(), "revision": revision(), "shape": args.shape,
        "probe": probe.kind if probe else None, "engines": facts, "not measured": absent, "summary": rows,
        "cold starts": starts, "measurements": plain(records),
    }  # fmt: skip
    file.write_text(json.dumps(result, indent=1) + "\n")
    log.info(f"written to {file}")


if __name__ == "__main__":
    main()
