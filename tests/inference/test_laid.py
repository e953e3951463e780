"""A quantised folder whose matrices lie as the kernels read them: mapped, and the same answers to the bit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import random_model
from worlds import WIDE

from puna.errors import ArtifactError
from puna.inference.native import NativeRunner, unfit
from puna.inference.spans import Span
from puna.kernels import native
from puna.model.checkpoint import save_model
from puna.model.convert import hf_name, is_rotary, to_hf_rows
from puna.model.tensorfile import TensorFile
from puna.quant import QuantConfig, load_quantised, quantise
from puna.quant.forms import part_names
from puna.quant.groups import Packed
from puna.quant.stored import QuantisedFile

kernels = pytest.mark.skipif(unfit(WIDE) is not None, reason=str(unfit(WIDE)))
SHAPE = replace(WIDE, dim=128, head_dim=32, n_heads=4, n_kv_heads=2, ffn_dim=256, vocab_size=192)
FORMS = {
    "4/32": QuantConfig(group_size=32),
    "4/64": QuantConfig(group_size=64, embedding_bits=6),
    "4/128 offset": QuantConfig(group_size=128, symmetric=False),
    "6/32": QuantConfig(bits=6, embedding_bits=16),
    "8/32": QuantConfig(bits=8),
    "8/64 offset": QuantConfig(bits=8, group_size=64, symmetric=False),
    "mixed": QuantConfig(matrices={"layers.0.attention.wq.weight": "16", "layers.1.feed_forward.w1.weight": "8/24"}),
}
SPANS = [Span(list(range(5, 40)), 0, [0, 1, 2], 3, screened=True), Span(list(range(90, 101)), 0, [3], 11)]


TIED = ("4/64", "8/32", "6/32")  # in these the embedding makes the logits, too


def portable(laid: Path, out: Path) -> None:
    """The same model as codes and scales, as folders were before matrices were laid out."""
    out.mkdir()
    shutil.copy(laid / "config.json", out)
    tensors = {}
    with QuantisedFile(laid) as file:
        for name in file.config.shapes():
            weight, form = file.weight(name), file.quant.form_of(name)
            if isinstance(weight, Packed):
                if is_rotary(name):
                    weight = weight.with_rows(lambda rows: to_hf_rows(rows, file.config.head_dim))
                tensors |= zip(part_names(hf_name(name), form), weight.tensors)
            else:
                tensors[hf_name(name)] = to_hf_rows(weight, file.config.head_dim) if is_rotary(name) else weight
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A form's name -> the folder as it is written now, and as it was before."""
    made = {}

    def make(form: str) -> tuple[Path, Path]:
        if form not in made:
            root = tmp_path_factory.mktemp("made")
            save_model(random_model(replace(SHAPE, tied=form in TIED)), None, root / "model", torch.bfloat16)
            quantise(FORMS[form], root / "model", out=root / "laid")
            portable(root / "laid", root / "codes")
            made[form] = root / "laid", root / "codes"
        return made[form]

    return make


def names(folder) -> set[str]:
    with TensorFile(folder / "model.safetensors") as file:
        return set(file.entries)


def logits(folder, **settings) -> list[np.ndarray]:
    """After prompts, and after a token more; answers that are screened among them."""
    runner = NativeRunner.load(folder, threads=1, blocks=8, **settings)
    more = [Span([7], 35, [0, 1, 2], 1, screened=True), Span([9], 11, [3], 1)]
    return [runner.forward(SPANS), runner.forward(more)]


@kernels
@pytest.mark.parametrize("form", FORMS)
def test_logits_have_the_bits_of_codes_that_were_taken_in(folders, form):
    laid, codes = folders(form)
    assert any(name.endswith(".laid") for name in names(laid)) and not any(n.endswith(".laid") for n in names(codes))
    before = native.chosen()
    try:
        for instructions in native.instructions():
            native.choose(instructions)
            for one, other in zip(logits(laid, dtype="bfloat16"), logits(codes, dtype="bfloat16")):
                assert one.tobytes() == other.tobytes(), instructions
    finally:
        native.choose(before)


@pytest.mark.parametrize("form", FORMS)
def test_everything_else_reads_the_same_weights(folders, form):
    laid, codes = (load_quantised(folder, expand=True).state_dict() for folder in folders(form))
    assert laid.keys() == codes.keys() and all(torch.equal(laid[name], codes[name]) for name in laid)
    packed = [load_quantised(folder, expand=False).state_dict() for folder in folders(form)]
    assert all(torch.equal(packed[0][name], packed[1][name]) for name in packed[1])


def test_a_laid_folder_takes_the_room_of_codes(folders):
    laid, codes = ((folder / "model.safetensors").stat().st_size for folder in folders("4/32"))
    assert laid < codes + 1000


@kernels
def test_matrices_are_pages_of_the_file(folders):
    laid, codes = folders("8/32")
    mapped = NativeRunner.load(laid, threads=1, blocks=1)
    taken = NativeRunner.load(codes, threads=1, blocks=1)
    assert mapped.network.bytes < taken.network.bytes  # which has a line's room beside each
    inode = str((laid / "model.safetensors").stat().st_ino)
    with open("/proc/self/maps") as maps:
        assert sum(line.split()[4] == inode for line in maps) >= 14
    del mapped
    with open("/proc/self/maps") as maps:
        assert not any(line.split()[4] == inode for line in maps)


@kernels
def test_a_file_whose_tensors_lie_askew_is_read_instead(folders, tmp_path):
    """Another program has written the same tensors."""
    laid, _ = folders("4/32")
    tensors = load_file(laid / "model.safetensors")
    (tmp_path / "config.json").write_bytes((laid / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip() + b" " * 5
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with TensorFile(tmp_path / "model.safetensors") as file:
        assert any(entry.begin % 64 for name, entry in file.entries.items() if name.endswith(".laid"))
    assert [a.tobytes() for a in logits(tmp_path)] == [a.tobytes() for a in logits(laid)]


@kernels
def test_kernels_of_another_layout_take_the_weights_in_anew(folders, monkeypatch):
    laid, _ = folders("8/32")
    expected = logits(laid)
    monkeypatch.setattr(native, "layout", lambda: 2)
    assert [a.tobytes() for a in logits(laid)] == [a.tobytes() for a in expected]


@kernels
def test_a_damaged_folder_is_an_error_and_never_an_answer(folders, tmp_path):
    laid, _ = folders("4/32")
    data, config = ((laid / name).read_bytes() for name in ("model.safetensors", "config.json"))
    (tmp_path / "config.json").write_bytes(config)

    def refused(content: bytes, message: str, settings: bytes = config) -> None:
        (tmp_path / "model.safetensors").write_bytes(content)
        (tmp_path / "config.json").write_bytes(settings)
        for read in (lambda: logits(tmp_path), lambda: load_quantised(tmp_path)):
            with pytest.raises(ArtifactError, match=message):
                read()

    refused(data[:-70], "cut off")
    refused(data + b"0", "after its last tensor")
    refused(data.replace(b".laid", b".lied"), "lacks|unexpected")
    length = int.from_bytes(data[:8], "little")
    refused(data[:8] + data[8 : 8 + length].replace(b'"U8"', b'"I8"') + data[8 + length :], "I8")
    for wrong in ({"bits": 8}, {"group_size": 48}, {"group_size": 24}, {"symmetric": False}):
        block = json.loads(config)
        block["puna_quantisation"] |= wrong
        refused(data, "shape|lacks", json.dumps(block).encode())


@kernels
def test_one_flipped_bit_is_found_before_the_first_answer(folders, tmp_path):
    made = tmp_path / "made"
    shutil.copytree(folders("4/32")[0], made)
    data = bytearray((made / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (made / "model.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged"):
        logits(made)
