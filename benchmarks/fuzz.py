"""Feeds the readers of checkpoints and tokenizers with broken files, and counts: each must be read, or refused with our error.

    python benchmarks/fuzz.py --seconds 180                       every target, one after the other
    python benchmarks/fuzz.py --seconds 60 --target gguf tokenizer

A target is a small valid checkpoint, one of whose files is broken per input: bytes flipped, cut, repeated, whole numbers
overwritten by extreme ones, values of JSON replaced by absurd ones. What is accepted is used: inspected, loaded, run on a few
tokens, its tokenizer encodes and decodes. Anything but `ArtifactError` naming the place is a crash: it is printed and its
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
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from machine import processor, revision

TARGETS = ("safetensors", "config", "tokenizer", "gguf", "meta")
ENGINES = ("seeded", "atheris")
RESULTS = Path(__file__).parent / "results"
MOST_SECONDS, MOST_BYTES = 20, 4 << 30  # of one input; of the process
TEXT = "The llama's 1,234 steps — 山! <|eot_id|> </s> \x00"
COUNTS = struct.Struct("<3Q")  # inputs, refused, crashed

# --- what is broken


@dataclass(frozen=True)
class Target:
    """A valid checkpoint: the content of its files, those to break, and what is then done with the broken one."""

    files: Mapping[str, bytes]
    broken: tuple[str, ...]
    use: Callable[[Path], None]
    scope: Callable[[str], str] = lambda _: "."  # the file that was broken -> what is used, in the folder


def target(name: str) -> Target:
    """The target `name`, made anew."""
    with tempfile.TemporaryDirectory() as folder:
        return _MAKERS[name](Path(folder))


def _weights(folder: Path) -> Target:
    """A Hugging Face folder in two shards."""
    _save(folder)
    from safetensors.torch import load, save

    state = load((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    halves = [dict(list(state.items())[n::2]) for n in range(2)]
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        (folder / name).write_bytes(save(half, {"format": "pt"}))
    index = {"metadata": {}, "weight_map": {t: n for n, half in zip(names, halves, strict=True) for t in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return Target(_contents(folder), (*names, "model.safetensors.index.json"), use_model)


def _config(folder: Path) -> Target:
    _save(folder)
    return Target(_contents(folder), ("config.json",), use_model)


def _meta(folder: Path) -> Target:
    from puna.model.meta import write_meta

    write_meta(_model(), None, folder, 2)
    return Target(_contents(folder), ("consolidated.00.pth", "consolidated.01.pth", "params.json"), use_model)


def _gguf(folder: Path) -> Target:
    from puna.model.gguf import write_gguf

    write_gguf(_model(), _byte_level(), folder / "a.gguf", "Q4_0")
    write_gguf(_model(), _llama2_vocabulary(), folder / "b.gguf", "F32")
    return Target(_contents(folder), ("a.gguf", "b.gguf"), use_gguf, lambda file: file)


def _tokenizer(folder: Path) -> Target:
    from puna.tokenizer.bpe import write_ranks
    from puna.tokenizer.export import write_hugging_face

    tokenizer = _byte_level()
    for name in ("ranks", "llama3", "llama2", "pieces"):
        (folder / name).mkdir()
    write_ranks(folder / "ranks/tokenizer.model", tokenizer.ranks)
    write_hugging_face(folder / "llama3", tokenizer, context=64)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / "llama3" / name).unlink()
    (folder / "llama2/tokenizer.json").write_text(json.dumps(_llama2_json()))
    (folder / "pieces/tokenizer.model").write_bytes(_sentencepiece())
    decoder = {"added_tokens_decoder": {str(len(_pieces())): {"content": "<pad>"}}}
    (folder / "pieces/tokenizer_config.json").write_text(json.dumps(decoder))
    files = _contents(folder)
    return Target(files, tuple(files), use_tokenizer, os.path.dirname)


_MAKERS = {"safetensors": _weights, "config": _config, "tokenizer": _tokenizer, "gguf": _gguf, "meta": _meta}


def _model():
    from puna.model.llama import Llama
    from puna.model.sizes import LlamaConfig, RopeScaling

    config = LlamaConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=32, vocab_size=544, context=64,
        rope_theta=5e5, rope_scaling=RopeScaling(original_context=16),
    )  # fmt: skip
    return Llama(config).init_weights(0)


def _save(folder: Path) -> None:
    from puna.model.checkpoint import save_model

    save_model(_model(), None, folder)


def _byte_level():
    from puna.tokenizer import Tokenizer

    words = [b"th", b"the", b" the", b"ll", b"am", b"llam", "é".encode(), "山".encode()[:2], "山".encode()]
    return Tokenizer({word: id for id, word in enumerate([*(bytes([b]) for b in range(256)), *words])})


def _pieces() -> list[tuple[str, float, int]]:
    """A vocabulary of Llama 2's kind: text, score, kind."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{b:02X}>", 0.0, 6) for b in range(256)]
    words = ["▁▁", "▁t", "he", "▁the", "ll", "am", "llam", "llama"]
    letters = sorted(set("".join(words)) | set("abc"))
    return pieces + [(w, float(-n), 1) for n, w in enumerate([*words, *letters])]


def _sentencepiece() -> bytes:
    """The same as SentencePiece stores it: see `protobuf.py`."""

    def field(number: int, content: bytes) -> bytes:
        size, head = len(content), bytes([number << 3 & 127 | 2 | (128 if number > 15 else 0)])
        head += bytes([number >> 4]) if number > 15 else b""
        return head + (bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])) + content

    pieces = b"".join(
        field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind]))
        for text, score, kind in _pieces()
    )
    return pieces + field(2, b"\x18\x02\x98\x02\x01") + field(3, b"\x18\x01\x20\x00\x28\x01")


def _llama2_json() -> dict:
    vocab = {text: id for id, (text, _, _) in enumerate(_pieces())}
    merges = [["▁", "t"], ["h", "e"], ["▁t", "he"], ["l", "l"], ["a", "m"], ["ll", "am"], ["llam", "a"]]
    special = [{"id": i, "content": name, "special": True} for i, name in enumerate(["<unk>", "<s>", "</s>"])]
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    back = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [*back, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab, "merges": merges},
    }  # fmt: skip


def _llama2_vocabulary():
    from puna.model.gguf.vocabulary import Vocabulary

    pieces = _pieces()
    pieces += [(f"[PAD{id}]", 0.0, 5) for id in range(len(pieces), _model().config.vocab_size)]
    texts, scores, kinds = zip(*pieces, strict=True)
    ids = {"bos": 1, "eos": 2, "unknown": 0}
    return Vocabulary(model="llama", tokens=texts, scores=scores, types=kinds, ids=ids, add_bos=True)


def _contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- what is done with it


def use_model(path: Path) -> None:
    """Open, inspect, load and run."""
    import torch

    from puna.model.inspect import inspect
    from puna.model.llama import attend_with
    from puna.model.opening import load_checkpoint, open_checkpoint

    with open_checkpoint(path) as opened:
        inspect(opened.kind, opened.config, opened.weights)
    model = load_checkpoint(path)
    tokens = torch.arange(3).view(1, 3) % model.config.vocab_size
    with torch.no_grad():
        assert model(tokens, torch.arange(3).view(1, 3), attend_with(None)).shape == (1, 3, model.config.vocab_size)


def use_gguf(path: Path) -> None:
    """The model, and the vocabulary in the file."""
    from puna.model.opening import checkpoint_tokenizer

    use_model(path)
    _round_trip(checkpoint_tokenizer(path))


def use_tokenizer(path: Path) -> None:
    """Read, encode, decode."""
    from puna.tokenizer import load_tokenizer

    _round_trip(load_tokenizer(path))


def _round_trip(tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert all(0 <= id < tokenizer.vocab_size for id in ids)
    tokenizer.decode(range(tokenizer.vocab_size))
    if type(tokenizer).__name__ == "Tokenizer":
        assert tokenizer.decode(ids) == TEXT


# --- how it is broken

WORDS = (0, 1, 2, 3, 9, 31, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1)
TEXTS = ("0", "-1", "1.5", "1e400", "-1e400", "NaN", "Infinity", "null", "true", "[]", "{}", '""', "9" * 30, "9" * 4400, '"\\ud800"',
         "1000000000", "1000000000000", '"../../x"', "[[[[[[]]]]]]", "0.0", '"a"', "18446744073709551615")  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    """`data`, broken in one to three ways."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(_WAYS)(data, rng)
    return data


def _flip(data: bytes, rng: random.Random) -> bytes:
    made = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 8))):
        made[_place(made, rng)] = rng.randrange(256)
    return bytes(made)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start = _place(data, rng)
    piece = data[start : start + rng.randrange(1, 64)]
    at = rng.choice((start, _place(data, rng)))
    return data[:at] + piece * rng.choice((1, 1, 1, 100)) + data[at:]


def _remove(data: bytes, rng: random.Random) -> bytes:
    start = _place(data, rng)
    return data[:start] + data[start + rng.randrange(1, 32) :]


def _extreme(data: bytes, rng: random.Random) -> bytes:
    form, at = rng.choice(("<Q", "<I", "<H", "<f", "<d")), _place(data, rng)
    if form in ("<f", "<d"):
        word = struct.pack(form, rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf"))))
    else:
        word = struct.pack(form, rng.choice(WORDS) % (1 << 8 * struct.calcsize(form)))
    return data[:at] + word + data[at + len(word) :]


def _number(data: bytes, rng: random.Random) -> bytes:
    """Another value in place of a number, or of a text, in JSON."""
    where = [
        m.span()
        for m in re.finditer(rb'(?<=[:\[, ])-?\d+(\.\d+)?|(?<=[:\[,] )"[^"]*"|(?<=[:\[,])"[^"]*"', data[: 1 << 15])
    ]
    if not where:
        return _extreme(data, rng)
    start, stop = rng.choice(where)
    made = data[:start] + rng.choice(TEXTS).encode() + data[stop:]
    return _lengthened(data, made)


def _key(data: bytes, rng: random.Random) -> bytes:
    """A key of JSON twice, or another's."""
    keys = [m.span() for m in re.finditer(rb'"[^"]*"(?=\s*:)', data[: 1 << 15])]
    if len(keys) < 2:
        return _remove(data, rng)
    (start, stop), (other, end) = rng.sample(keys, 2)
    return _lengthened(data, data[:start] + data[other:end] + data[stop:])


def _lengthened(before: bytes, after: bytes) -> bytes:
    """The length before a safetensors header, set right again: else nothing behind it is looked at."""
    if before[8:10] == b'{"' and len(before) > 8:
        length = int.from_bytes(before[:8], "little") + len(after) - len(before)
        return max(0, length).to_bytes(8, "little") + after[8:]
    return after


def _place(data: bytes, rng: random.Random) -> int:
    """Mostly in the beginning, where the headers are, or at the end, where zip has its directory."""
    size = max(1, len(data))
    return min(size - 1, rng.choice((rng.randrange(size), rng.randrange(min(size, 400)), rng.randrange(min(size, 4000)),
                                     size - 1 - rng.randrange(min(size, 2000)))))  # fmt: skip


_WAYS = (_flip, _flip, _cut, _repeat, _remove, _extreme, _extreme, _number, _number, _number, _key)

# --- the trial


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
