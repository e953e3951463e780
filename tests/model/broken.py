"""A small checkpoint and all the ways in which it is broken here. As a program, tries each under a limit of memory.

python tests/model/broken.py FOLDER     prints {case: [the error, seconds], ..., "peak": megabytes} as JSON
"""

import json
import os
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load, save

from puna.errors import ArtifactError
from puna.model.checkpoint import save_model
from puna.model.llama import Llama
from puna.model.opening import checkpoint_tokenizer, load_checkpoint, open_checkpoint
from puna.model.sizes import LlamaConfig
from puna.tokenizer.bpe import write_ranks

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
CONFIG = LlamaConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=520, context=64
)  # fmt: skip
SPARE_MEMORY = 400 << 20  # bytes of addresses that reading a broken checkpoint may take


def sound(folder: Path) -> Path:
    """Write the whole checkpoint, in two shards with an index, and a tokenizer."""
    folder.mkdir(parents=True)
    tokenizer = folder / "ranks"
    tokenizer.mkdir()
    write_ranks(tokenizer / "tokenizer.model", {bytes([b]): b for b in range(256)} | {b"th": 256, b"the": 257})
    save_model(Llama(CONFIG).init_weights(0), tokenizer, folder)
    shutil.rmtree(tokenizer)
    state = load((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    halves = [dict(list(state.items())[n::2]) for n in range(2)]
    for name, half in zip(SHARDS, halves, strict=True):
        (folder / name).write_bytes(save(half))
    names = {tensor: name for name, half in zip(SHARDS, halves, strict=True) for tensor in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def read(folder: Path) -> dict:
    """All that the verbs read: shape, weights, tokenizer."""
    with open_checkpoint(folder):
        pass
    checkpoint_tokenizer(folder)
    return load_checkpoint(folder).state_dict()


@dataclass(frozen=True)
class Case:
    """How to break the folder, and what the error must say. `tokenizer`: only readers of the vocabulary notice."""

    harm: Callable[[Path], object]
    says: str
    tokenizer: bool = False


def shard(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / SHARDS[0]).write_bytes(content)


def safetensors(header: object, data: int = 64) -> Callable[[Path], object]:
    """The first shard, made of any header: text as it is, else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return shard(struct.pack("<Q", len(text)) + text + bytes(data))


def tensor(shape: object, begin: object, end: object, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def header(change: Callable[[dict], object]) -> Callable[[Path], object]:
    """The first shard with its own header changed, and its own data."""

    def harm(folder: Path) -> None:
        content = (folder / SHARDS[0]).read_bytes()
        size = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + size])
        change(entries)
        text = json.dumps(entries).encode()
        (folder / SHARDS[0]).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return harm


def first(entries: dict) -> dict:
    return next(e for name, e in entries.items() if name != "__metadata__")


def config(**fields: object) -> Callable[[Path], object]:
    def harm(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(data))

    return harm


def index(change: Callable[[dict[str, object]], object]) -> Callable[[Path], object]:
    def harm(folder: Path) -> None:
        data = json.loads((folder / INDEX).read_text())
        change(data["weight_map"])
        (folder / INDEX).write_text(json.dumps(data))

    return harm


def every(name: object) -> Callable[[Path], object]:
    return index(lambda names: names.update(dict.fromkeys(names, name)))


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """`make` something in the place of the file `name`."""

    def harm(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return harm


def content(name: str, text: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(text)


def repeated(folder: Path) -> None:
    states = [load((folder / name).read_bytes()) for name in SHARDS]
    name = next(iter(states[0]))
    (folder / SHARDS[1]).write_bytes(save(states[1] | {name: states[0][name]}))


def long_vocabulary(folder: Path) -> None:
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    vocab = {letter: id for id, letter in enumerate(letters)} | {"a" * 3_000_000: 256}
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"] |= {"vocab": vocab, "merges": []}
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(data))


DEEP = b'{"a":' * 200_000
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32}  # fmt: skip

BROKEN = {
    # the header of a safetensors file
    "empty": Case(shard(b""), "cut off in its header"),
    "a header of 100 MB in 1 KB": Case(shard(struct.pack("<Q", 100_000_000) + bytes(1000)), "cut off in its header"),
    "a header whose length overflows": Case(shard(struct.pack("<Q", 2**64 - 1) + bytes(1000)), "cut off in its header"),
    "a header of 100 MB, and all of it there": Case(
        lambda f: (shard(struct.pack("<Q", 100_000_000))(f), os.truncate(f / SHARDS[0], 100_000_100)), "claims a header"
    ),
    "ten gigabytes": Case(safetensors({"a": tensor([2_500_000_000], 0, 10_000_000_000)}), "cut off"),
    "sizes that overflow": Case(safetensors({"a": tensor([2**62, 2**62], 0, 2**126)}), "has the shape"),
    "a product that overflows": Case(safetensors({"a": tensor([2**40, 2**40, 0], 0, 0)}), "disagree"),
    "a size beyond 64 bits": Case(safetensors({"a": tensor([10**300], 0, 10**300)}), "has the shape"),
    "a negative size": Case(safetensors({"a": tensor([-4, -4], 0, 64)}), "has the shape"),
    "a negative place": Case(safetensors({"a": tensor([4, 4], -64, 0)}), "has the shape"),
    "a broken size": Case(safetensors({"a": tensor([4.0, 4], 0, 64)}), "has the shape"),
    "a broken place": Case(safetensors({"a": tensor([4, 4], 0.0, 64.0)}), "has the shape"),
    "an infinite size": Case(safetensors(b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,64]}}'), "has the shape"),
    "a size that is no number": Case(safetensors(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,64]}}'), "shape"),
    "a size that is text": Case(safetensors({"a": tensor("16", 0, 64)}), "has the shape"),
    "a size that is true": Case(safetensors({"a": tensor([True, 16], 0, 64)}), "has the shape"),
    "thousand dimensions": Case(safetensors({"a": tensor([1] * 1000, 0, 4)}, 4), "has the shape"),
    "an end before the beginning": Case(safetensors({"a": tensor([4, 4], 64, 0)}), "disagree"),
    "one tensor on another": Case(safetensors({"a": tensor([16], 0, 64), "b": tensor([8], 32, 64)}), "overlaps 'a'"),
    "two tensors in one place": Case(safetensors({"a": tensor([16], 0, 64), "b": tensor([16], 0, 64)}), "overlaps"),
    "tensors in a circle": Case(
        safetensors({"a": tensor([8], 32, 64), "b": tensor([8], 32, 64), "c": tensor([8], 0, 32)}), "overlaps"
    ),
    "a gap": Case(safetensors({"a": tensor([4], 0, 16), "b": tensor([8], 32, 64)}), "leaves 16 bytes after 'a'"),
    "a gap in front": Case(safetensors({"a": tensor([8], 32, 64)}), "leaves 32 bytes after the header"),
    "a place beyond the file": Case(safetensors({"a": tensor([16], 0, 64), "b": tensor([16], 64, 128)}), "cut off"),
    "bytes after the last tensor": Case(safetensors({"a": tensor([4], 0, 16)}), "48 bytes after its last tensor"),
    "a tensor twice": Case(
        safetensors(b'{"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64]},"a":{}}'), "'a' is given twice"
    ),
    "a type that is too wide": Case(header(lambda e: first(e).update(dtype="F64")), "disagree"),
    "a type that is too narrow": Case(header(lambda e: first(e).update(dtype="F16")), "disagree"),
    "a type that is whole": Case(header(lambda e: first(e).update(dtype="I32")), "is of type I32"),
    "a type that nobody has": Case(header(lambda e: first(e).update(dtype="F\x1b[31m")), r"of type 'F\\x1b\[31m'"),
    "a type that is a list": Case(header(lambda e: first(e).update(dtype=["F32"])), "cannot be read"),
    "another shape": Case(header(lambda e: first(e).update(shape=[1, *first(e)["shape"]])), "has shape"),
    "a tensor without a place": Case(header(lambda e: first(e).pop("data_offsets")), "cannot be read"),
    "a tensor that is a number": Case(safetensors({"a": 5}), "cannot be read"),
    "a header that is a list": Case(safetensors([1, 2]), "cannot be read"),
    "a header of nothing but depth": Case(safetensors(DEEP), "cannot be read"),
    "a header in UTF-16": Case(safetensors('{"a":{}}'.encode("utf-16")), "cannot be read"),
    "a header that is no text": Case(safetensors(b"\xff\xfe" * 10), "cannot be read"),
    "metadata that is a list": Case(safetensors({"__metadata__": [1], "a": tensor([16], 0, 64)}), "cannot be read"),
    "metadata of numbers": Case(safetensors({"__metadata__": {"a": 1}}, 0), "no text"),
    "a name of a megabyte": Case(safetensors({"a" * 1_000_000: tensor([16], 0, 64)}), "has the shape|lacks"),
    "no tensors": Case(safetensors({}, 0), "lacks"),
    # the index
    "an index that climbs out": Case(every("../../../../../etc/passwd"), "not the name of a file beside it"),
    "an index that climbs out with the right ending": Case(every("../x.safetensors"), "not the name of a file beside it"),
    "an index with an absolute path": Case(every("/etc/x.safetensors"), "not the name of a file beside it"),
    "an index of the folder itself": Case(every(".."), "not the name of a file beside it"),
    "an index with a zero byte": Case(every("a\0.safetensors"), "not the name of a file beside it"),
    "an index with half a character": Case(every("\ud800.safetensors"), "not the name of a file beside it"),
    "an index with an endless name": Case(every("a" * 5000 + ".safetensors"), "not the name of a file beside it"),
    "an index of lists": Case(every(["a"]), "not the name of a file beside it"),
    "an index of numbers": Case(every(7), "not the name of a file beside it"),
    "an index of a file that is not there": Case(every("model-00003.safetensors"), "has no model-00003"),
    "an index of tensors that are not there": Case(
        index(lambda names: names.update({"model.nothing.weight": SHARDS[0]})), "lacks 'model.nothing.weight'"
    ),
    "an index that mixes the files up": Case(
        index(lambda names: names.update({n: SHARDS[f == SHARDS[0]] for n, f in names.items()})), "says it holds"
    ),
    "an index without a map": Case(content(INDEX, b'{"weight_map": {}}'), "no usable weight_map"),
    "an index of nothing but depth": Case(content(INDEX, DEEP), "is not JSON"),
    "a tensor in two files": Case(repeated, "both hold the tensor"),
    # config.json
    "a billion layers": Case(config(num_hidden_layers=10**9), "claims 1,000,000,000 layers"),
    "a trillion tokens": Case(config(vocab_size=10**12), "vocab_size=1000000000000"),
    "a vocabulary of two billion": Case(config(vocab_size=2**31), "config.json asks for"),
    "heads of no width": Case(config(head_dim=0), "head_dim=0"),
    "no heads": Case(config(num_attention_heads=0), "does not describe a Llama"),
    "no key/value heads": Case(config(num_key_value_heads=0), "n_kv_heads=0"),
    "a negative width": Case(config(hidden_size=-32), "does not describe a Llama"),
    "half a layer": Case(config(num_hidden_layers=2.0), "n_layers=2.0"),
    "a width that is text": Case(config(hidden_size="32"), "does not describe a Llama"),
    "a width that is a list": Case(config(hidden_size=[32]), "does not describe a Llama"),
    "a context that is true": Case(config(max_position_embeddings=True), "context=True"),
    "an epsilon that is no number": Case(config(rms_norm_eps=float("nan")), "norm_eps=nan"),
    "an epsilon that is text": Case(config(rms_norm_eps="1e-5"), "norm_eps='1e-5'"),
    "a rotary base of zero": Case(config(rope_theta=0), "rope_theta=0"),
    "an infinite rotary base": Case(config(rope_theta=float("inf")), "rope_theta=inf"),
    "a rotary base of 10**400": Case(config(rope_theta=10**400), "does not describe a Llama"),
    "a rotary base that is text": Case(config(rope_theta="10000"), "rope_theta='10000'"),
    "a rotary scaling that is a list": Case(config(rope_scaling=[8]), "does not describe a Llama"),
    "a rotary scaling without its numbers": Case(config(rope_scaling={"rope_type": "llama3"}), "has no 'factor'"),
    "a stretch of zero": Case(config(rope_scaling=SCALING | {"factor": 0}), "factor=0.0"),
    "a stretch without a blend": Case(config(rope_scaling=SCALING | {"low_freq_factor": 4.0}), "must be below"),
    "a stretch from half a position": Case(
        config(rope_scaling=SCALING | {"original_max_position_embeddings": 0.5}), "original_context=0.5"
    ),
    "tied by a word": Case(config(tie_word_embeddings="no"), "tied='no'"),
    "another model": Case(config(model_type="gpt2"), "model_type is 'gpt2'"),
    "another model, at length": Case(config(model_type="x" * 1_000_000), "model_type is 'x"),
    "a configuration that is a list": Case(content("config.json", b"[]"), "is not a JSON object"),
    "a configuration with a key twice": Case(content("config.json", b'{"vocab_size":1,"vocab_size":2}'), "given twice"),
    "a configuration of nothing but depth": Case(content("config.json", DEEP), "is not JSON"),
    "a configuration of 17 MB": Case(content("config.json", b" " * 17_000_000), "at most"),
    "a configuration of 10 GB": Case(lambda f: os.truncate(f / "config.json", 10 << 30), "at most"),
    "a number of 5,000 digits": Case(content("config.json", b'{"vocab_size":' + b"9" * 5000 + b"}"), "is not JSON"),
    "a configuration that is no text": Case(content("config.json", b"\xff\xfe"), "is not JSON"),
    # what is no file
    "a folder for a file": Case(instead(SHARDS[0], Path.mkdir), "is a folder, not a file"),
    "a pipe for a file": Case(instead(SHARDS[0], os.mkfifo), "is a pipe, a device or a socket"),
    "an endless file": Case(instead(SHARDS[0], lambda p: p.symlink_to("/dev/zero")), "is a pipe, a device or a socket"),
    "a link to nowhere": Case(instead(SHARDS[0], lambda p: p.symlink_to("nowhere")), "cannot be read"),
    "a link to itself": Case(instead(SHARDS[0], lambda p: p.symlink_to(p.name)), "cannot be read"),
    "a link to something else": Case(instead(SHARDS[0], lambda p: p.symlink_to("/etc/passwd")), "header"),
    "a pipe for a configuration": Case(instead("config.json", os.mkfifo), "is a pipe, a device or a socket"),
    "a folder for an index": Case(instead(INDEX, Path.mkdir), "is a folder, not a file"),
    # the vocabulary
    "a pipe for a vocabulary": Case(instead("tokenizer.model", os.mkfifo), "is a pipe", tokenizer=True),
    "an endless vocabulary": Case(
        instead("tokenizer.model", lambda p: p.symlink_to("/dev/zero")), "is a pipe", tokenizer=True
    ),
    "a vocabulary of 10 GB": Case(lambda f: os.truncate(f / "tokenizer.model", 10 << 30), "more than", tokenizer=True),
    "a vocabulary of empty lines": Case(
        content("tokenizer.model", b"AA== 0\n" + b"\n" * 60_000_000), "line 2", tokenizer=True
    ),
    "a token of three million letters": Case(
        content("tokenizer.model", b"A" * 4_000_000 + b" 0\n"), "begins with|is not a rank", tokenizer=True
    ),
    "a long token in JSON": Case(long_vocabulary, "a token of 3,000,000 bytes", tokenizer=True),
    "a rank of 5,000 digits": Case(content("tokenizer.model", b"AA== " + b"9" * 5000), "begins with|rank", tokenizer=True),
    "a vocabulary that is a program": Case(content("tokenizer.model", b"\x7fELF" * 100), "is no tokenizer", tokenizer=True),
    "pieces that claim 10 GB": Case(
        content("tokenizer.model", b"\x0a\x80\xc8\xaf\xa0\x25" + bytes(1000)), "claims", tokenizer=True
    ),
    "JSON of nothing but depth": Case(
        lambda f: (os.remove(f / "tokenizer.model"), content("tokenizer.json", DEEP)(f)), "is not JSON", tokenizer=True
    ),
}  # fmt: skip


def main(folder: Path) -> None:
    """Try every case, with little memory to spare."""
    whole = sound(folder / "whole")
    read(whole)  # what reading needs is loaded now
    found = {}
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + SPARE_MEMORY,) * 2)
    for number, (name, case) in enumerate(BROKEN.items()):
        path = Path(shutil.copytree(whole, folder / str(number)))
        case.harm(path)
        began = time.perf_counter()
        try:
            read(path)
            error = "accepted"
        except ArtifactError as raised:
            error = str(raised)
        except Exception as raised:
            error = f"crash: {raised!r}"
        found[name] = [error, time.perf_counter() - began]
        shutil.rmtree(path)
    json.dump(found | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
