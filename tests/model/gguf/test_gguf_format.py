"""The container: parity with the `gguf` package both ways, and hostile files."""

import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.errors import ArtifactError
from puna.model.gguf import blocks, write_gguf
from puna.model.gguf.format import Container, Pending, write_container
from puna.model.gguf.llama import GgufFile, gguf_name, load_gguf
from puna.model.gguf.quantise import encode
from puna.model.gguf.vocabulary import NORMAL, to_tokenizer
from puna.model.llama import Llama
from puna.model.sizes import SIZES


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def setting(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str, sizes: list[int], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def made(path: Path, settings: list[bytes] = (), tensors: list[bytes] = (), data: int = 0, version: int = 3) -> Path:
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(settings)) + b"".join([*settings, *tensors])
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(data))
    return path


def refused(path: Path, match: str) -> None:
    with pytest.raises(ArtifactError, match=match) as caught:
        Container(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_what_the_peer_writes_is_read(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.count", 7)
    writer.add_int8("a.small", -3)
    writer.add_uint64("a.large", 2**63)
    writer.add_float64("a.real", 0.1)
    writer.add_bool("a.true", True)
    writer.add_string("a.text", "山 é")
    writer.add_array("a.words", ["", "one", "二"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_array("a.truths", [True, False])
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(3, 5)).astype(np.float32)
    packed = gguf.quants.quantize(rng.normal(size=(4, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q5_1)
    writer.add_tensor("plain", plain)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q5_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with Container(path) as file:
        values = {key: value for key, value in file.metadata.items() if key.startswith("a.")}
        assert list(values.pop("a.words")) == ["", "one", "二"]
        assert values.pop("a.numbers").tolist() == [1, -2, 3]
        assert values.pop("a.truths").tolist() == [True, False]
        assert values == {
            "a.count": 7, "a.small": -3, "a.large": 2**63, "a.real": 0.1, "a.true": True, "a.text": "山 é",
        }  # fmt: skip
        assert file.tensors["packed"].shape == (4, 64)
        assert torch.equal(file.read("plain"), torch.from_numpy(plain))
        assert torch.equal(file.read("plain", 1, 2), torch.from_numpy(plain[1:2]))
        theirs = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q5_1)
        assert torch.equal(file.read("packed"), torch.from_numpy(theirs))


def test_what_is_written_the_peer_reads(tmp_path):
    gguf = pytest.importorskip("gguf")
    weights = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    kinds = [blocks.F32, blocks.F16, blocks.BF16, blocks.Q8_0, blocks.Q4_0, blocks.Q4_K, blocks.Q6_K]
    tensors = {k.name: Pending(k, (6, 256), [encode(p, k) for p in weights.split(4)]) for k in kinds}
    values = {"general.architecture": "llama", "a": 7, "b": 0.5, "c": False, "d": ["x", ""], "e": [1, 2], "f": [0.5]}
    write_container(tmp_path / "ours.gguf", values, tensors)
    reader = gguf.GGUFReader(tmp_path / "ours.gguf")
    assert {key: reader.fields[key].contents() for key in values} == values
    with Container(tmp_path / "ours.gguf") as file:
        for theirs in reader.tensors:
            assert theirs.shape.tolist() == [256, 6]
            told = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
            assert np.array_equal(told.reshape(6, 256), file.read(theirs.name).float().numpy()), theirs.name


def test_version_2_is_read_and_others_are_named(tmp_path):
    assert Container(made(tmp_path / "two", version=2)).version == 2
    refused(made(tmp_path / "one", version=1), "version 1")
    refused(made(tmp_path / "big", version=3 << 24), "big-endian")


def test_other_files_are_named(tmp_path):
    refused(tmp_path / "absent", "does not exist")
    refused(tmp_path, "not a file")
    (tmp_path / "text").write_bytes(b"hello, world")
    refused(tmp_path / "text", "not a GGUF file")
    (tmp_path / "empty").write_bytes(b"")
    refused(tmp_path / "empty", "not a GGUF file")


HUGE = 2**64 - 1
CLAIMS = {
    "a string of 10 GB": setting("k", 8, struct.pack("<Q", 10 << 30)),
    "a string whose end overflows": setting("k", 8, struct.pack("<Q", HUGE)),
    "a list of 10 G numbers": setting("k", 9, struct.pack("<IQ", 4, 10 << 30)),
    "a list of 10 G strings": setting("k", 9, struct.pack("<IQ", 8, 10 << 30)),
    "a list whose size overflows": setting("k", 9, struct.pack("<IQ", 10, HUGE // 8 + 2)),
    "a string in a list": setting("k", 9, struct.pack("<IQQ", 8, 1, HUGE - 7)),
    "a key of 10 GB": struct.pack("<Q", 10 << 30),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_beyond_the_file_is_refused_without_memory(tmp_path, claim):
    path = made(tmp_path / "small.gguf", [CLAIMS[claim]], data=1000)
    tracemalloc.start()
    try:
        refused(path, "cut off|claims|at most")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [10**9, HUGE])
def test_absurd_counts_are_refused_at_once(tmp_path, count):
    for n, counts in enumerate(((count, 0), (0, count))):
        (tmp_path / f"{n}").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(1000))
        refused(tmp_path / f"{n}", "claims")


def test_damaged_settings_are_named(tmp_path):
    u32 = struct.pack("<I", 1)
    nested = b"".join(struct.pack("<IQ", 9, 1) for _ in range(1000))
    refused(made(tmp_path / "nested", [setting("deep", 9, nested)]), "'deep' is a list of lists")
    refused(made(tmp_path / "twice", [setting("k", 4, u32)] * 2), "'k' is given twice")
    refused(made(tmp_path / "type", [setting("k", 13, u32)]), "'k' has the unknown type 13")
    refused(made(tmp_path / "key", [struct.pack("<Q", 2) + b"\xff\xfe" + u32 * 2]), "not UTF-8")
    refused(made(tmp_path / "truth", [setting("k", 9, struct.pack("<IQ", 7, 1) + b"\x02")]), "truth")
    for n, alignment in enumerate((0, 3, 2**31)):
        value = setting("general.alignment", 4, struct.pack("<I", alignment))
        refused(made(tmp_path / f"align{n}", [value]), "alignment")


def test_damaged_tensors_are_named(tmp_path):
    ok = tensor("a", [8], 0, 0)
    refused(made(tmp_path / "twice", tensors=[ok, ok], data=64), "'a' is given twice")
    refused(made(tmp_path / "over", tensors=[ok, tensor("b", [8], 0, 0)], data=64), "overlap")
    refused(made(tmp_path / "part", tensors=[tensor("a", [16], 0, 0), tensor("b", [8], 0, 32)], data=96), "overlap")
    refused(made(tmp_path / "short", tensors=[tensor("a", [9], 0, 0)], data=32), "cut off")
    refused(made(tmp_path / "far", tensors=[tensor("a", [8], 0, 1 << 60)], data=32), "cut off")
    refused(made(tmp_path / "odd", tensors=[tensor("a", [1], 0, 4)], data=32), "aligned")
    refused(made(tmp_path / "wide", tensors=[tensor("a", [2**63, 2**63], 0, 0)], data=32), "cut off")
    refused(made(tmp_path / "none", tensors=[tensor("a", [0], 0, 0)], data=32), "shape")
    refused(made(tmp_path / "rows", tensors=[tensor("a", [33], 8, 0)], data=64), "multiples of 32")
    refused(made(tmp_path / "flat", tensors=[tensor("a", [], 0, 0)], data=64), "0 dimensions")
    refused(made(tmp_path / "deep", tensors=[tensor("a", [1] * 5, 0, 0)], data=64), "5 dimensions")
    refused(made(tmp_path / "iq", tensors=[tensor("a", [256], 23, 0)], data=640), "of the type IQ4_XS")
    refused(made(tmp_path / "type", tensors=[tensor("a", [256], 99, 0)], data=640), "of the type number 99")


def test_a_file_that_shrinks_after_it_was_opened_is_a_message(tmp_path):
    path = made(tmp_path / "a", tensors=[tensor("a", [8], 0, 0)], data=32)
    with Container(path) as file:
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(ArtifactError, match="ended while"):
            file.read("a")


def test_a_failed_write_leaves_nothing(tmp_path):
    def broken():
        yield torch.zeros(1, 4, dtype=torch.uint8)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_container(tmp_path / "a", {}, {"a": Pending(blocks.F32, (2,), broken())})
    with pytest.raises(ValueError, match="announced"):
        write_container(tmp_path / "a", {}, {"a": Pending(blocks.F32, (2,), [torch.zeros(1, 4, dtype=torch.uint8)])})
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def good(tmp_path_factory, config, tokenizer) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "good.gguf"
    write_gguf(Llama(config).init_weights(0), tokenizer, path, "Q4_0")
    return path.read_bytes()


def use(path: Path) -> None:
    """Everything that reads a file: shape, vocabulary, weights."""
    with GgufFile(path) as file:
        to_tokenizer(file.vocabulary(), path)
    load_gguf(path)


def test_a_file_cut_anywhere_is_refused(good, tmp_path):
    path = tmp_path / "cut.gguf"
    for size in [*range(0, 2000, 37), *range(2000, len(good), 1009), len(good) - 1]:
        path.write_bytes(good[:size])
        with pytest.raises(ArtifactError) as caught:
            use(path)
        assert str(path) in str(caught.value)


def test_a_special_token_that_is_there_twice_is_a_message_that_names_the_file(good, tmp_path):
    twice = good.replace(b"<|reserved_special_token_245|>", b"<|reserved_special_token_244|>", 1)
    assert twice != good
    assert not attempt(tmp_path / "twice.gguf", twice)


NUMBERS = [0, 1, 2, 3, 9, 31, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
FLIPS = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=3)
WORDS = st.lists(st.tuples(st.integers(0, 2**20), st.sampled_from(NUMBERS), st.sampled_from("QIf")), max_size=2)


def mutated(good: bytes, flips, words) -> bytes:
    """Bytes of the header replaced, and whole numbers in it overwritten by extreme ones."""
    data, header = bytearray(good), good.index(b"output_norm.weight") + 60
    for at, byte in flips:
        data[at % header] = byte
    for at, number, format in words:
        word = struct.pack("<" + format, number % 2**32 if format == "I" else number)
        data[at % header : at % header + len(word)] = word
    return bytes(data)


def attempt(path: Path, data: bytes) -> bool:
    """Whether the file was accepted; any error but ours fails the test."""
    path.write_bytes(data)
    try:
        use(path)
    except ArtifactError as error:
        assert str(path) in str(error)
        return False
    return True


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(FLIPS, WORDS)
def test_a_scribbled_header_is_a_message_or_another_file(good, tmp_path_factory, flips, words):
    attempt(tmp_path_factory.getbasetemp() / "scribbled.gguf", mutated(good, flips, words))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=300))
def test_noise_after_the_magic_is_a_message(tmp_path_factory, noise):
    path = tmp_path_factory.getbasetemp() / "noise.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + noise)
    with pytest.raises(ArtifactError):
        use(path)


def test_an_8b_opens_lazily_in_well_under_a_second(tmp_path):
    config = SIZES["llama-3.1-8b"]
    words = [f"w{n}" for n in range(config.vocab_size)]
    values = {
        "general.architecture": "llama", "llama.embedding_length": config.dim, "llama.block_count": config.n_layers,
        "llama.context_length": config.context, "llama.feed_forward_length": config.ffn_dim,
        "llama.attention.head_count": config.n_heads, "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps, "llama.rope.freq_base": config.rope_theta,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [NORMAL] * len(words), "tokenizer.ggml.merges": ["aaa bbb"] * 280_147,
    }  # fmt: skip
    header = tmp_path / "header.gguf"
    write_container(header, values, {})
    infos, offset = [], 0
    for name, shape in config.shapes().items():
        infos.append(tensor(gguf_name(name), list(shape[::-1]), 30 if len(shape) > 1 else 0, offset))
        offset += int(np.prod(shape)) * (2 if len(shape) > 1 else 4)
    start = bytearray(header.read_bytes())
    start[8:16] = struct.pack("<Q", len(infos))
    with (tmp_path / "8b.gguf").open("wb") as file:
        file.write(bytes(start).rstrip(b"\0") + b"".join(infos))
        file.truncate(-(-file.tell() // 32) * 32 + offset)  # sparse: 16 GB that take no room
    began = time.process_time()
    with GgufFile(tmp_path / "8b.gguf") as file:
        assert file.config.dim == config.dim
        first = next(file.pieces("lm_head.weight"))
    taken = time.process_time() - began
    assert taken < 1.0
    assert first[0] == 0 and first[1].shape[1] == config.dim
