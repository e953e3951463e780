"""Feeds the readers of checkpoints and tokenizers with broken files, and counts: each must be read, or refused with our error.

    python benchmarks/fuzz.py --seconds 180                       every target, one after the other
    python benchmarks/fuzz.py --seconds 60 --target gguf tokenizer

A target is a small valid checkpoint (`fuzz_targets.py`), one of whose files is broken per input (`fuzz_damage.py`). What is
accepted is used. Anything but `ArtifactError` naming the place is a crash: it is printed and its
input kept in `fuzz-crashes/`. So are an input of more than 20 seconds and one that takes 4 GB.

Two engines take the same time each. `seeded` breaks the valid file anew for each input, by a random generator with a seed.
`atheris`, where it is installed (`pip install atheris`), is led by the coverage of the package and breaks further what went
furthest. Each target runs in a process of its own. Prints inputs, refusals and crashes, and writes them to
`benchmarks/results/fuzz-DATE.json` (or `--out`).
"""

import argparse
import datetime
import json
import mmap
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

from fuzz_damage import mutated
from fuzz_targets import target
from machine import processor, revision

TARGETS = ("safetensors", "config", "tokenizer", "gguf", "meta")
ENGINES = ("seeded", "atheris")
RESULTS = Path(__file__).parent / "results"
MOST_SECONDS, MOST_BYTES = 20, 4 << 30  # of one input; of the process
COUNTS = struct.Struct("<3Q")  # inputs, refused, crashed


class Trial:
    """One target, in a folder of its own; counts what became of each input."""

    def __init__(self, name: str, folder: Path, counts: mmap.mmap | None = None, keep: Path | None = None):
        self.name, self.folder, self.keep = name, folder / "checkpoint", keep
        self.target = target(name)
        self.inputs = self.refused = self.crashed = 0
        self._counts = counts
        for file, content in self.target.files.items():
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / file).write_bytes(content)
        for file in self.target.broken:  # the valid one must be read
            self.target.use(self.folder / self.target.scope(file))

    def attempt(self, file: str, content: bytes) -> str:
        """The traceback if `content` in the place of `file` ended in anything but our error; else ""."""
        from puna.errors import ArtifactError

        self.inputs += 1
        self._tell()
        (self.folder / file).write_bytes(content)
        fault = ""
        signal.alarm(MOST_SECONDS)
        try:
            self.target.use(self.folder / self.target.scope(file))
        except ArtifactError as error:
            self.refused += 1
            if str(self.folder) not in error.message or not error.hint or len(str(error)) > 2000:
                fault = f"the message names no file, has no hint or no end: {str(error)[:500]}"
        except BaseException:
            fault = traceback.format_exc()
        finally:
            signal.alarm(0)
            (self.folder / file).write_bytes(self.target.files[file])
        if fault:
            self.crashed += 1
            if self.keep is not None:
                self.keep.mkdir(exist_ok=True)
                (self.keep / f"{self.name}-{self.crashed}-{file.replace('/', '-')}").write_bytes(content)
        self._tell()
        return fault

    def seeded(self, rng: random.Random) -> str:
        """One input drawn from `rng`."""
        file = rng.choice(self.target.broken)
        return self.attempt(file, mutated(self.target.files[file], rng))

    def _tell(self) -> None:
        if self._counts is not None:
            self._counts[: COUNTS.size] = COUNTS.pack(self.inputs, self.refused, self.crashed)


def _too_slow(*_: object) -> None:
    raise TimeoutError(f"more than {MOST_SECONDS} seconds")


def child(name: str, engine: str, seconds: int, seed: int, counts: Path) -> None:
    """Run one target until the time is over; what happened stands in the file `counts`."""
    with counts.open("r+b") as file:
        shared = mmap.mmap(file.fileno(), COUNTS.size)
    instrument = nullcontext()
    import torch

    torch.set_num_threads(1)
    if engine == "atheris":
        import atheris

        instrument = atheris.instrument_imports(include=["puna"])
    with instrument:
        import puna.model.opening
        import puna.tokenizer  # noqa: F401
    signal.signal(signal.SIGALRM, _too_slow)
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (virtual + MOST_BYTES,) * 2)
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        trial = Trial(name, Path(folder), shared, Path("fuzz-crashes"))
        if engine == "atheris":
            _led_by_coverage(trial, seconds, seed)  # ends the process
        rng, end = random.Random(seed), time.monotonic() + seconds
        while time.monotonic() < end:
            fault = trial.seeded(rng)
            if fault:
                print(f"{name}: {fault}", flush=True)


def _led_by_coverage(trial: Trial, seconds: int, seed: int) -> None:
    import atheris

    files = trial.target.broken

    def one(data: bytes) -> None:
        fault = trial.attempt(files[data[0] % len(files)] if data else files[0], data[1:])
        if fault:
            print(f"{trial.name}: {fault}", flush=True)

    def mutator(data: bytes, most: int, number: int) -> bytes:
        rng = random.Random(number)
        if len(data) < 2 or rng.random() < 0.2:
            return atheris.Mutate(data, most)
        return (data[:1] + mutated(data[1:], rng))[:most]

    with tempfile.TemporaryDirectory() as corpus:
        for number, file in enumerate(files):
            (Path(corpus) / str(number)).write_bytes(bytes([number]) + trial.target.files[file])
        options = [
            f"-max_total_time={seconds}",
            f"-seed={seed + 1}",
            "-max_len=200000",
            "-rss_limit_mb=8000",
            "-verbosity=0",
        ]
        atheris.Setup([sys.argv[0], corpus, *options], one, custom_mutator=mutator)
        atheris.Fuzz()


def run(name: str, engine: str, seconds: int, seed: int) -> dict[str, int]:
    """One target in a process of its own."""
    with tempfile.NamedTemporaryFile() as counts:
        counts.write(bytes(COUNTS.size))
        counts.flush()
        command = [sys.executable, __file__, "--child", counts.name, "--target", name, "--engine", engine]
        command += ["--seconds", str(seconds), "--seed", str(seed)]
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds * 2 + 300)
        inputs, refused, crashed = COUNTS.unpack(Path(counts.name).read_bytes())
    if done.stdout:
        print(done.stdout[-10_000:])
    if done.returncode:
        print(f"{name}: the process ended with {done.returncode}\n{done.stderr[-3000:]}")
    found = {"inputs": inputs, "refused": refused, "accepted": inputs - refused - crashed, "crashes": crashed}
    ended = {} if done.returncode == 0 else {"process ended with": done.returncode}
    return {**found, **ended, "seconds": round(time.monotonic() - began)}


def main() -> None:
    """Each target for its time; a table, and a dated record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=int, default=180, help="for each target and engine")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--engine", nargs="+", choices=ENGINES, help="both by default, where atheris is installed")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the result")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    engines = given.engine or (ENGINES if _has_atheris() else ENGINES[:1])
    if given.child:
        child(given.target[0], engines[0], given.seconds, given.seed, given.child)
        return
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": f"{os.cpu_count()} cores of {processor()}",
        "revision": revision(),
        "command": " ".join(["python benchmarks/fuzz.py", *sys.argv[1:]]),
    }
    tasks = [(name, engine) for name in given.target for engine in engines]
    with ThreadPoolExecutor(given.jobs) as pool:
        found = dict(zip(tasks, pool.map(lambda task: run(*task, given.seconds, given.seed), tasks), strict=True))
    for (name, engine), counts in found.items():
        print(f"{name:12} {engine:8} " + "  ".join(f"{value:>9,} {what}" for what, value in counts.items()))
        record.setdefault(name, {})[engine] = counts
    record["all inputs"] = sum(counts["inputs"] for counts in found.values())
    out = given.out or RESULTS / f"fuzz-{record['date'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}")
    sys.exit(any(counts["crashes"] or "process ended with" in counts for counts in found.values()))


def _has_atheris() -> bool:
    try:
        import atheris  # noqa: F401
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    main()
