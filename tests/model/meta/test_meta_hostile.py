"""Files that were damaged, or made to do harm: each ends in one clear error, and nothing of them is carried out."""

import io
import json
import os
import pickle
import random
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from released import model_of, params_of, release

from puna.errors import ArtifactError
from puna.model.llama import Llama
from puna.model.meta import MetaFiles, load_meta, write_meta
from puna.model.meta.torchfile import TorchFile
from puna.model.meta.unpickle import MOST_BYTES, MOST_OPCODES, read_tensors
from puna.model.sizes import LlamaConfig

SMALL = LlamaConfig(
    dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, ffn_dim=24, vocab_size=20, context=8192, rope_theta=5e5
)
FILE = Path("consolidated.00.pth")


def archive(path: Path, index: bytes, storages: dict[str, bytes] | None = None, **options) -> Path:
    """A file as torch.save lays it out, around any index."""
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("archive/data.pkl", index)
        for key, content in (storages or {}).items():
            file.writestr(f"archive/data/{key}", content)
        file.writestr("archive/version", "3\n")
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(digits)]) + digits


def numbers(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(shape, stride, offset=0, count=6, key="0", kind=b"FloatStorage") -> bytes:
    """The opcodes that describe a tensor."""
    storage = b"(" + text("storage") + b"ctorch\n" + kind + b"\n" + text(key) + text("cpu") + number(count) + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + numbers(shape) + numbers(stride)
    return call + b"\x89ccollections\nOrderedDict\n)RtR"


def index(**tensors: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in tensors.items()) + b"u."


def test_a_handmade_index_is_read_as_torch_reads_it(tmp_path):
    numbers = torch.arange(6.0)
    path = archive(tmp_path / "x.pth", index(a=tensor([2, 3], [3, 1])), {"0": numbers.numpy().tobytes()})
    with TorchFile(path) as file:
        assert torch.equal(file.read("a"), numbers.view(2, 3)) and torch.equal(file.read("a", 1), numbers[None, 3:])
    assert torch.equal(torch.load(path, weights_only=True)["a"], numbers.view(2, 3))


class Harm:
    """What a pickle can carry: it touches a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class HarmByState(Harm):
    def __reduce__(self):
        return pickle.Unpickler, (io.BytesIO(b"N."),), {"persistent_load": os.system}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("inside", [False, True])
def test_a_pickle_that_would_run_a_command_runs_nothing(tmp_path, protocol, inside):
    touched = tmp_path / "touched"
    payload = pickle.dumps({"norm.weight": Harm(touched)} if inside else Harm(touched), protocol)
    with pytest.raises(ArtifactError, match=r"x\.pth: the pickle (asks for|uses the opcode|is broken)"):
        TorchFile(archive(tmp_path / "x.pth", payload))
    assert not touched.exists()
    pickle.loads(payload)
    assert touched.exists(), "the payload does no harm, so this test shows nothing"


COMMANDS = {
    "GLOBAL": b"cos\nsystem\n" + text("touch harmed") + b"\x85R.",
    "STACK_GLOBAL": b"\x80\x04" + text("os") + text("system") + b"\x93" + text("touch harmed") + b"\x85R.",
    "STACK_GLOBAL of names from the memo": b"\x80\x04" + text("os") + b"q\1" + text("system") + b"h\1" + b"\x93.",
    "INST": b"(S'touch harmed'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\n" + text("touch harmed") + b"o.",
    "NEWOBJ": b"\x80\x02cos\nsystem\n" + text("touch harmed") + b"\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04cos\nsystem\n)}\x92.",
    "EXT1": b"\x80\x02\x82\x01" + text("touch harmed") + b"\x85R.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "BUILD with __setstate__": b"}" + text("__setstate__") + b"cos\nsystem\nsb" + text("touch harmed") + b"b.",
    "BUILD of a name": b"ctorch\nFloatStorage\n}" + text("x") + b"\x88sb.",
    "REDUCE of eval": b"cbuiltins\neval\n" + text("1") + b"\x85R.",
    "REDUCE of getattr": b"cbuiltins\ngetattr\n" + text("1") + b"\x85R.",
    "a nested load": b"ctorch.storage\n_load_from_bytes\n" + text("x") + b"\x85R.",
    "a dotted name": b"ctorch\n_utils._rebuild_tensor_v2\n.",
    "a name with a space": b"ctorch._utils _rebuild_tensor_v2\nx\n.",
    "a dict made from arguments": b"ccollections\nOrderedDict\n(](" + text("a") + b"N\x86etR.",
    "a tensor called for no storage": b"ctorch._utils\n_rebuild_tensor_v2\n(NK\0))tR.",
    "a storage class that is called": b"ctorch\nFloatStorage\nK\5\x85R.",
    "a number that is called": b"K\5)R.",
    "a tensor of tensors": b"ctorch._utils\n_rebuild_parameter\n(NNNtR.",
    "PERSID": b"Pstorage\n.",
    "BINPERSID of a text": text("storage") + b"Q.",
    "BINPERSID of a foreign class": b"(" + text("storage") + text("FloatStorage") + text("0") + text("cpu") + b"K\1tQ.",
    "NEXT_BUFFER": b"\x97.",
    "BYTEARRAY8": b"\x96" + struct.pack("<Q", 1 << 62) + b".",
    "a module as its own name": b"cposix\nsystem\n.",
}


@pytest.mark.parametrize("what", COMMANDS)
def test_every_way_to_call_something_is_refused(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match=r"consolidated\.00\.pth: the pickle ") as raised:
        read_tensors(COMMANDS[what], FILE)
    assert raised.value.hint and not (tmp_path / "harmed").exists() and len(str(raised.value)) < 500


def test_no_name_is_imported(tmp_path, monkeypatch):
    (tmp_path / "trap_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ArtifactError, match=r"asks for 'trap_module\.x'"):
        read_tensors(b"ctrap_module\nx\n.", FILE)


NESTED = {
    "tuples": b")" + b"\x85" * 100_000,
    "lists": b"]" * 100_000 + b"a" * 99_999,
    "dictionaries": b"}" + (text("k") + b"}") * 50_000 + b"s" * 50_000,
    "marks": b"(" * 100_000,
    "a list in itself": b"]q\0h\0a",
    "a dictionary in itself": b"}q\0" + text("a") + b"h\0s",
    "doubling": b")q\0" + b"h\0h\0\x86q\0" * 60_000,
    "memo": b"N" + b"".join(b"r" + struct.pack("<I", i * 40_000) for i in range(50_000)),
    "a far memo": b"Nr\xff\xff\xff\xff",
}


@pytest.mark.parametrize("what", NESTED)
def test_depth_cycles_and_repetition_end_in_an_error_soon(what):
    begun = time.perf_counter()
    with pytest.raises(ArtifactError):
        read_tensors(b"\x80\x02" + NESTED[what] + b".", FILE)
    assert time.perf_counter() - begun < 60


def test_pickles_beyond_the_limits_are_refused():
    with pytest.raises(ArtifactError, match=f"more than {MOST_OPCODES:,} opcodes"):
        read_tensors(b"\x80\x02" + b"N" * MOST_OPCODES + b".", FILE)
    with pytest.raises(ArtifactError, match="at most"):
        read_tensors(bytes(MOST_BYTES + 1), FILE)


TENSORS = {
    "a huge shape": tensor([1 << 40, 1 << 40], [1 << 40, 1]),
    "ten gigabytes": tensor([2_500_000_000], [1]),
    "ten gigabytes, storage and all": tensor([2_500_000_000], [1], count=2_500_000_000),
    "a number of two thousand bits": tensor([1 << 2000], [1], count=1 << 2000),
    "many dimensions": tensor([1] * 200, [1] * 200),
    "a negative shape": tensor([-1, 3], [3, 1]),
    "a negative stride": tensor([2, 3], [-3, 1]),
    "a negative offset": tensor([2, 3], [3, 1], offset=-1),
    "rows that overlap": tensor([2, 3], [1, 1]),
    "a stride of zero": tensor([1000, 1000], [0, 0]),
    "one row a billion times": tensor([1 << 30, 3], [0, 1]),
    "an offset past the end": tensor([2, 3], [3, 1], offset=1),
    "fewer strides than dimensions": tensor([2, 3], [1]),
    "a storage that is not there": tensor([2, 3], [3, 1], key="7"),
    "a storage outside the folder": tensor([2, 3], [3, 1], key="../data.pkl"),
    "a storage that is longer": tensor([2, 3], [3, 1], count=7),
    "a storage that is shorter": tensor([1, 3], [3, 1], count=5),
    "a storage of another type": tensor([2, 3], [3, 1], kind=b"DoubleStorage"),
    "a storage of no known type": tensor([2, 3], [3, 1], kind=b"ComplexFloatStorage"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_a_tensor_that_its_storage_cannot_hold_is_refused_on_opening(tmp_path, what):
    path = archive(tmp_path / "x.pth", index(a=TENSORS[what]), {"0": bytes(24)})
    with pytest.raises(ArtifactError, match=r"x\.pth: ") as raised:
        TorchFile(path)
    assert raised.value.hint and len(str(raised.value)) < 600


def test_many_tensors_on_one_storage_are_refused(tmp_path):
    many = {f"layers.{i}.attention.wq.weight": tensor([2, 3], [3, 1]) for i in range(1000)}
    with pytest.raises(ArtifactError, match="share the numbers of one storage"):
        TorchFile(archive(tmp_path / "x.pth", index(**many), {"0": bytes(24)}))


def test_what_is_no_tensor_by_name_is_refused():
    for data in (b"N.", b"].", index(a=b"N"), index(a=b"}"), b"\x80\x02}K\1Ns.", tensor([6], [1]) + b".", b".", b""):
        with pytest.raises(ArtifactError, match="the pickle"):
            read_tensors(data, FILE)


def test_names_that_leave_the_archive_are_refused(tmp_path):
    for name in ("../evil", "/etc/passwd", "archive/../../evil", "a\\..\\b", "archive/data/.."):
        path = archive(tmp_path / "x.pth", index(a=tensor([2, 3], [3, 1])), {"0": bytes(24)})
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(zipfile.ZipInfo(name), b"x")
        with pytest.raises(ArtifactError, match="leaves the archive"):
            TorchFile(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pth"]


def test_compressed_entries_are_refused_without_unpacking_them(tmp_path):
    bomb = archive(tmp_path / "x.pth", index(), {"0": bytes(50_000_000)}, compression=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 100_000
    with pytest.raises(ArtifactError, match="is compressed"):
        TorchFile(bomb)


def patched(path: Path, find: bytes, at: int, content: bytes, which: int = 0) -> Path:
    """Overwrite bytes relative to occurrence number `which` of `find`."""
    data = bytearray(path.read_bytes())
    place = -1
    for _ in range(which + 1):
        place = data.index(find, place + 1)
    data[place + at : place + at + len(content)] = content
    path.write_bytes(data)
    return path


def test_a_zip_directory_that_lies_is_refused(tmp_path):
    def fresh(**more) -> Path:
        return archive(tmp_path / "x.pth", index(a=tensor([2, 3], [3, 1])), {"0": bytes(24), **more})

    record, end = b"PK\1\2", b"PK\5\6"
    lies = {
        "which do not fit": patched(fresh(), record, 20, struct.pack("<2I", 1 << 31, 1 << 31)).read_bytes(),
        "has a zip directory that does not fit": patched(fresh(), record, 42, struct.pack("<I", 9)).read_bytes(),
        "is encrypted": patched(fresh(), record, 8, b"\1").read_bytes(),
        "claims 65,535 entries|broken": patched(fresh(), end, 8, b"\xff\xff\xff\xff").read_bytes(),
        "claims 3 entries": patched(fresh(), end, 12, struct.pack("<I", 1 << 31)).read_bytes(),
        "checksum": patched(fresh(), record, 16, b"\1\2\3\4").read_bytes(),
        "cut off": fresh().read_bytes() + b"more",
    }
    for message, content in lies.items():
        (tmp_path / "x.pth").write_bytes(content)
        with pytest.raises(ArtifactError, match=message):
            TorchFile(tmp_path / "x.pth")


def test_entries_that_overlap_or_come_twice_are_refused(tmp_path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("archive/data/1", bytes(24))
    hidden = inner.getvalue()[: 30 + len("archive/data/1") + 24]  # a local header with its bytes, inside another entry
    path = archive(tmp_path / "x.pth", index(), {"0": hidden, "1": bytes(24)})
    at = path.read_bytes().index(hidden)
    patched(path, b"PK\1\2", 42, struct.pack("<I", at), which=2)
    with pytest.raises(ArtifactError, match="overlapping"):
        TorchFile(path)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path := tmp_path / "y.pth", "w") as file:
        file.writestr("archive/data.pkl", index())
        file.writestr("archive/data.pkl", index())
    with pytest.raises(ArtifactError, match="twice"):
        TorchFile(path)


def test_files_of_other_kinds_are_named_for_what_they_are(tmp_path):
    path = tmp_path / "consolidated.00.pth"
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ArtifactError, match="old form, without a zip"):
        TorchFile(path)
    for content, message in [
        (b"", "does not begin as a zip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "pointer"),
        (b"\x7fELF" * 100, "does not begin as a zip"),
        (zip_of("model.json"), "not one of torch.save"),
        (zip_of("archive/byteorder", b"big", extra=index()), "little-endian"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=message):
            TorchFile(path)


def zip_of(name: str, content: bytes = b"{}", extra: bytes | None = None) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr(name, content)
        if extra is not None:
            file.writestr("archive/data.pkl", extra)
    return made.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("small")
    write_meta(Llama(SMALL).init_weights(0), None, out)
    return out


def contents(path: Path) -> dict[str, torch.Tensor]:
    with MetaFiles(path) as files:
        return {name: files.read(name) for name in files.names}


def test_a_file_cut_off_anywhere_is_an_error(tmp_path, folder):
    whole = (folder / FILE).read_bytes()
    (tmp_path / "params.json").write_bytes((folder / "params.json").read_bytes())
    rng = random.Random(0)
    for length in [0, 1, 21, 22, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(200))]:
        (tmp_path / FILE).write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match="consolidated"):
            contents(tmp_path)


def test_a_flipped_byte_is_an_error_or_changes_no_weight(tmp_path, folder):
    whole, right = (folder / FILE).read_bytes(), contents(folder)
    (tmp_path / "params.json").write_bytes((folder / "params.json").read_bytes())
    rng = random.Random(1)
    end = whole.index(b"PK\1\2")  # half of the flips in the directory and in the index, which come last and first
    index_ends = whole.index(b"PK\3\4", 4)
    places = [rng.randrange(len(whole)) for _ in range(200)]
    places += [rng.choice((rng.randrange(index_ends), rng.randrange(end, len(whole)))) for _ in range(200)]
    errors = 0
    for place in places:
        data = bytearray(whole)
        data[place] ^= rng.randrange(1, 256)
        (tmp_path / FILE).write_bytes(data)
        try:
            found = contents(tmp_path)
        except ArtifactError:
            errors += 1
        else:
            assert found.keys() == right.keys() and all(torch.equal(found[n], right[n]) for n in right), place
    assert errors > len(places) // 4


def test_a_flipped_byte_in_an_index_without_a_checksum_is_still_no_crash(folder):
    with zipfile.ZipFile(folder / FILE) as file:
        whole = file.read("archive/data.pkl")
    rng = random.Random(2)
    read = refused = 0
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            read_tensors(bytes(data[: rng.choice((len(data), rng.randrange(len(data))))]), FILE)
            read += 1
        except ArtifactError:
            refused += 1
    assert refused > 500 and read + refused == 1000


def test_params_that_were_scribbled_on_are_an_error_or_a_shape(tmp_path, folder):
    (tmp_path / FILE).write_bytes((folder / FILE).read_bytes())
    text = (folder / "params.json").read_bytes()
    rng = random.Random(3)
    errors = 0
    for _ in range(200):
        data = bytearray(text)
        data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "params.json").write_bytes(data)
        try:
            contents(tmp_path)
        except ArtifactError:
            errors += 1
    assert errors > 50


ABSURD = [
    {"dim": 0}, {"dim": -64}, {"dim": 10**30}, {"dim": 4.0}, {"dim": "64"}, {"dim": None}, {"dim": [1]}, {"n_heads": 7},
    {"n_heads": True}, {"n_layers": 10**12}, {"multiple_of": 0}, {"multiple_of": 10**18}, {"ffn_dim_multiplier": -1},
    {"ffn_dim_multiplier": 1e300}, {"ffn_dim_multiplier": float("nan")}, {"ffn_dim_multiplier": float("inf")},
    {"norm_eps": "1e-5"}, {"rope_theta": 0}, {"rope_theta": [5]}, {"use_scaled_rope": "yes"}, {"use_scaled_rope": 1},
    {"n_kv_heads": 3}, {"n_kv_heads": 1.5}, {"vocab_size": {}}, {"puna": 3}, {"puna": {"dim": 3}}, {"puna": {"context": -1}},
    {"puna": {"rope_scaling": {"factor": "x"}}}, {"puna": {"rope_scaling": {"speed": 1}}}, {"puna": {"tied": 1}},
    {"quantization_args": {"scheme": "int8"}}, {"vision_num_layers": 8}, {"moe_args": {}}, {"lora_args": {"rank": 16}},
]  # fmt: skip


@pytest.fixture(scope="module")
def released_folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("released")
    release(out, "llama-3-8b", 1)
    return out


@pytest.mark.parametrize("fields", ABSURD, ids=str)
def test_params_that_no_llama_has_are_refused(released_folder, fields):
    (released_folder / "params.json").write_text(json.dumps(params_of("llama-3-8b") | fields))
    with pytest.raises(ArtifactError, match=r"params\.json"):
        MetaFiles(released_folder)


def test_a_params_file_that_is_no_object_or_absurdly_long_is_refused(tmp_path, folder):
    (tmp_path / FILE).write_bytes((folder / FILE).read_bytes())
    for content in (b"", b"[]", b"{", b'"x"', b"[" * 100_000, b"9" * 5000, b"\xff"):
        (tmp_path / "params.json").write_bytes(content)
        with pytest.raises(ArtifactError, match=r"params\.json"):
            MetaFiles(tmp_path)
    with (tmp_path / "params.json").open("wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(ArtifactError, match=r"17,179,869,184 bytes"):
        MetaFiles(tmp_path)


def test_unknown_keys_and_conclusions_are_told_and_not_fatal(tmp_path):
    release(tmp_path, "llama-3.2-1b", 1)
    (tmp_path / "params.json").write_text(json.dumps(params_of("llama-3.2-1b") | {"speed": 3}))
    with MetaFiles(tmp_path) as files:
        notes = "\n".join(files.notes)
    assert "stretched by 32" in notes and "Meta's own code takes 8" in notes and "ignored: speed" in notes
    assert "131,072 tokens" in notes


def test_a_folder_without_weights_or_params_says_what_is_missing(tmp_path):
    with pytest.raises(ArtifactError, match=r"has no params\.json"):
        load_meta(tmp_path)
    (tmp_path / "params.json").write_text(json.dumps(params_of("llama-3-8b")))
    with pytest.raises(ArtifactError, match=r"no consolidated\.00\.pth"):
        load_meta(tmp_path)
    with pytest.raises(ArtifactError, match="is not a folder"):
        load_meta(tmp_path / "params.json")


def test_checksums_that_the_writer_left_out_are_not_missed(tmp_path):
    model = model_of("llama-3.2-1b")
    torch.serialization.set_crc32_options(False)
    try:
        write_meta(model, None, tmp_path, 2)
    finally:
        torch.serialization.set_crc32_options(True)
    loaded = load_meta(tmp_path)
    assert loaded.config == model.config and torch.equal(loaded.norm.weight, model.norm.weight)
