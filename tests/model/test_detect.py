import json
import re

import pytest

from puna.artifacts import stage
from puna.errors import ArtifactError
from puna.model.checkpoint import save_model
from puna.model.detect import kind_of
from puna.model.folder import QUANTISED
from puna.model.llama import Llama
from puna.model.meta import write_meta
from puna.model.sizes import LlamaConfig

CONFIG = LlamaConfig(
    dim=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, ffn_dim=16, vocab_size=16, context=64, rope_theta=5e5
)


@pytest.fixture
def model() -> Llama:
    return Llama(CONFIG).init_weights(0)


def made(kind, model, out):
    @stage(kind)
    def make(config, *, out):
        save_model(model, None, out)

    return make({}, out=out).path


def test_each_kind_is_recognised_by_path_and_by_string(tmp_path, model):
    save_model(model, None, tmp_path / "hf")
    write_meta(model, None, tmp_path / "meta")
    (tmp_path / "x.bin").write_bytes(b"GGUF\3\0\0\0")
    assert kind_of(tmp_path / "hf") == kind_of(str(tmp_path / "hf")) == "huggingface"
    assert kind_of(tmp_path / "meta") == "meta"
    assert kind_of(tmp_path / "x.bin") == "gguf"
    assert kind_of(made("checkpoint", model, tmp_path / "ours")) == "puna"
    assert kind_of(made("quantised", model, tmp_path / "small")) == "quantised"


def test_a_quantised_folder_without_a_manifest_is_quantised(tmp_path, model):
    save_model(model, None, tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | {QUANTISED: {}}))
    assert kind_of(tmp_path) == "quantised"


def test_a_sharded_folder_is_known_by_its_index(tmp_path, model):
    save_model(model, None, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(ArtifactError, match="the weights are missing"):
        kind_of(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert kind_of(tmp_path) == "huggingface"


def test_an_artifact_of_another_kind_or_one_that_was_interrupted_is_said_to_be_so(tmp_path, model):
    with pytest.raises(ArtifactError, match="of kind 'report'"):
        kind_of(made("report", model, tmp_path / "report"))
    (tmp_path / ".begun.json").write_text("{}")
    with pytest.raises(ArtifactError, match="interrupted"):
        kind_of(tmp_path)


@pytest.mark.parametrize(
    "files, message, hint",
    [
        ([], "holds nothing", "give a folder with config.json"),
        (["b.txt", "a.txt", "d/"], 'holds "a.txt", "b.txt", "d/"', "or a .gguf file"),
        ([f"{i}" for i in range(20)], "and 12 more", "params.json"),
        (["q4.gguf", "README.md"], "q4.gguf", "give the file itself: .*q4.gguf"),
        (["config.json"], "config.json", "the weights are missing"),
        (["params.json"], "params.json", "the weights are missing"),
        (["config.json", "pytorch_model.bin"], "pytorch_model", "fetch the model's model.safetensors"),
        (["original/params.json"], "original/", "give the folder .*original"),
    ],
)
def test_a_folder_that_is_no_model_is_described_with_what_to_give(tmp_path, files, message, hint):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("{}")
    with pytest.raises(ArtifactError, match=message) as raised:
        kind_of(tmp_path)
    assert re.search(hint, raised.value.hint)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("notes.txt", b"hello", "begins with the bytes 68 65 6c 6c"),
        ("notes.txt", b"", "is empty"),
        ("model.gguf", b"version https://git-lfs.github.com/spec/v1\n", "a pointer"),
        ("model.safetensors", b"\0" * 64, "a part of a model"),
        ("consolidated.00.pth", b"PK\3\4", "a part of a model"),
    ],
)
def test_a_file_that_is_no_model_is_described(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        kind_of(tmp_path / name)


def test_a_path_where_nothing_is_and_a_config_of_absurd_size_are_refused(tmp_path, model):
    with pytest.raises(ArtifactError, match="does not exist"):
        kind_of(tmp_path / "none")
    save_model(model, None, tmp_path)
    with (tmp_path / "config.json").open("ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(ArtifactError, match=r"1,073,741,824 bytes"):
        kind_of(tmp_path)
