"""Checkpoints that were damaged, or made to do harm: each ends in one clear error, soon and in little memory.

`broken.py` lists the ways. Meta's and GGUF's files have tests of their own beside their readers. Here run 107 broken
checkpoints, 200 cut files, 1,400 files with a flipped byte, and 150 inputs for each target of `benchmarks/fuzz.py`.
"""

import dataclasses
import importlib
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import broken
import pytest
import torch
from broken import BROKEN, SHARDS, read, sound

from puna.errors import ArtifactError
from puna.model.gguf import write_gguf
from puna.model.gguf.format import Container
from puna.model.opening import checkpoint_tokenizer, load_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return sound(tmp_path_factory.mktemp("whole") / "checkpoint")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict:
    """What became of each case, in a process that has little memory to spare."""
    folder = tmp_path_factory.mktemp("broken")
    command = [sys.executable, broken.__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"folder": str(folder)}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_an_error_that_names_the_file_and_the_fault(outcomes, name):
    error, seconds = outcomes[name]
    assert re.search(BROKEN[name].says, error), error
    assert outcomes["folder"] in error and "\nhint: " in error
    assert len(error) < 700 and error.count("\n") == 1 and "\x1b" not in error
    assert seconds < 20


def test_no_broken_checkpoint_takes_much_memory(outcomes):
    assert 100 < outcomes["peak"] < 1500  # megabytes, PyTorch's own among them; the claims go up to ten thousand


def test_the_unbroken_checkpoint_is_read(whole):
    assert len(read(whole)) == 21


def test_a_file_cut_off_anywhere_is_an_error(tmp_path, whole):
    folder = Path(shutil.copytree(whole, tmp_path / "cut"))
    content = (whole / SHARDS[0]).read_bytes()
    rng = random.Random(0)
    for size in [0, 7, 8, 9, len(content) - 1, *(rng.randrange(len(content)) for _ in range(195))]:
        (folder / SHARDS[0]).write_bytes(content[:size])
        with pytest.raises(ArtifactError, match=SHARDS[0]):
            read(folder)


def test_a_flipped_byte_in_a_header_is_an_error_or_changes_no_weight(tmp_path, whole):
    folder, right = Path(shutil.copytree(whole, tmp_path / "flipped")), read(whole)
    content = (whole / SHARDS[0]).read_bytes()
    rng = random.Random(1)
    errors = 0
    for _ in range(200):
        data = bytearray(content)
        data[rng.randrange(8 + int.from_bytes(content[:8], "little"))] ^= rng.randrange(1, 256)
        (folder / SHARDS[0]).write_bytes(data)
        try:
            found = read(folder)
        except ArtifactError as error:
            assert str(folder) in error.message
            errors += 1
        else:
            assert found.keys() == right.keys() and all(torch.equal(found[n], right[n]) for n in right)
    assert errors > 150


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path, whole):
    folder = Path(shutil.copytree(whole, tmp_path / "closed"))
    (folder / SHARDS[0]).chmod(0)
    with pytest.raises(ArtifactError, match=f"{SHARDS[0]} cannot be read: Permission denied"):
        read(folder)


def test_links_are_followed_as_the_hubs_cache_needs(tmp_path, whole):
    folder, blobs = Path(shutil.copytree(whole, tmp_path / "linked")), tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("../blobs") / str(number))
    assert read(folder).keys() == read(whole).keys()


@pytest.fixture(scope="module")
def fuzz():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("fuzz")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def fuzz_targets(fuzz):
    return importlib.import_module("fuzz_targets")


FILES = [
    ("config", "config.json"),
    ("safetensors", "model.safetensors.index.json"),
    ("tokenizer", "ranks/tokenizer.model"),
    ("tokenizer", "llama3/tokenizer.json"),
    ("tokenizer", "llama2/tokenizer.json"),
    ("tokenizer", "pieces/tokenizer.model"),
    ("tokenizer", "pieces/tokenizer_config.json"),
]


@pytest.mark.parametrize(("target", "file"), FILES)
def test_a_flipped_byte_beside_the_weights_is_an_error_or_a_checkpoint_that_works(tmp_path, fuzz, target, file):
    trial = fuzz.Trial(target, tmp_path)
    content, rng = trial.target.files[file], random.Random(file)
    for _ in range(200):
        data = bytearray(content)
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        assert not trial.attempt(file, bytes(data))
    assert trial.refused > 100


@pytest.mark.parametrize("target", ["safetensors", "config", "tokenizer", "gguf", "meta"])
def test_generated_damage_is_an_error_or_a_checkpoint_that_works(tmp_path, fuzz, target):
    trial = fuzz.Trial(target, tmp_path)
    rng = random.Random(target)
    for _ in range(150):
        assert not trial.seeded(rng)
    assert trial.refused > 75


def test_the_fuzzer_notices_a_crash_and_a_silent_reader(tmp_path, fuzz):
    trial = fuzz.Trial("config", tmp_path)

    def fails(_: Path) -> None:
        raise KeyError("a reader's own")

    object.__setattr__(trial.target, "use", fails)
    assert "KeyError" in trial.attempt("config.json", b"{}") and trial.crashed == 1


VOCABULARIES = {
    "a type that no piece has": {"types": [77] * 544},
    "types that are no whole numbers": {"types": [1.5] * 544},
    "a score that is no number": {"scores": [float("nan")] * 544},
    "no scores": {"scores": []},
    "no types": {"types": []},
}


@pytest.mark.parametrize("what", VOCABULARIES)
def test_pieces_in_a_gguf_file_that_contradict_themselves_are_refused(tmp_path, fuzz_targets, what):
    vocabulary = dataclasses.replace(fuzz_targets.llama2_vocabulary(), **VOCABULARIES[what])
    write_gguf(fuzz_targets.small_model(), vocabulary, tmp_path / "a.gguf", "F32")
    with pytest.raises(ArtifactError, match=r"a\.gguf: .*(holds what is none|no scores, or no types)"):
        checkpoint_tokenizer(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    "divisors", [[0.5, 1, 1, 1], [1e30] * 4, [1, 1, 1, 1e-30], [3.4e38, 1, 1, 2], [1e-38] * 4, [1.5, 2, 1, 8]]
)
def test_frequency_divisors_that_no_scaling_gives_are_refused(tmp_path, fuzz_targets, divisors):
    path = tmp_path / "a.gguf"
    write_gguf(fuzz_targets.small_model(), fuzz_targets.byte_level(), path, "F32")
    with Container(path) as file:
        begin = file.tensors["rope_freqs.weight"].begin
    data = bytearray(path.read_bytes())
    data[begin : begin + 16] = struct.pack("<4f", *divisors)
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"rope_freqs\.weight is not Llama 3\.1's scaling"):
        load_checkpoint(path)
