import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from puna.artifacts import stage
from puna.errors import ArtifactError, ConfigError
from puna.model.checkpoint import empty_model, load_model, save_model, write_folder
from puna.model.convert import hf_name, is_rotary, meta_name, to_hf, to_hf_rows, to_meta, to_meta_rows
from puna.model.folder import load_config
from puna.model.llama import Llama
from puna.model.sizes import SIZES, LlamaConfig, RopeScaling
from puna.tokenizer import Tokenizer
from puna.tokenizer.bpe import write_ranks

CONFIG = LlamaConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=600, context=64, rope_theta=5e5,
    rope_scaling=RopeScaling(original_context=32),
)  # fmt: skip


def same_weights(a: Llama, b: Llama) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(w, theirs[n]) for n, w in a.state_dict().items())


@pytest.fixture
def tokenizer_dir(tmp_path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    words = [b"the", b" the", b"sea", "é".encode()]
    write_ranks(folder / "tokenizer.model", {w: i for i, w in enumerate([*(bytes([b]) for b in range(256)), *words])})
    return folder


@pytest.fixture
def saved(tmp_path) -> Path:
    save_model(Llama(CONFIG).init_weights(0), None, tmp_path / "model")
    return tmp_path / "model"


def test_every_tensor_name_goes_there_and_back():
    with torch.device("meta"):
        names = [n for n, _ in Llama(CONFIG).named_parameters()]
    assert len({hf_name(n) for n in names}) == len(names)
    assert [meta_name(hf_name(n)) for n in names] == names
    assert meta_name("model.layers.0.self_attn.q_proj.bias") is None
    assert meta_name("model.layers.0.mlp.experts.0.weight") is None


def test_the_rotary_order_of_rows_is_the_documented_one_and_its_own_inverse():
    rows = torch.arange(16)[:, None]  # two heads of 8
    assert to_hf_rows(rows, 8)[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert torch.equal(to_meta_rows(to_hf_rows(rows, 8), 8), rows)
    state = Llama(CONFIG).init_weights(0).state_dict()
    back = to_meta(to_hf(state, 8), 8)
    assert all(torch.equal(back[n], w) for n, w in state.items())
    assert [n for n in state if is_rotary(n)] == [
        f"layers.{i}.attention.{m}.weight" for i in (0, 1) for m in ("wq", "wk")
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_loads_to_the_same_weights(tmp_path, dtype, tied):
    config = dataclasses.replace(CONFIG, tied=tied)
    model = Llama(config).init_weights(0)
    save_model(model, None, tmp_path, dtype)
    loaded = load_model(tmp_path)
    assert loaded.config == config
    assert same_weights(loaded, model.to(dtype).float())
    assert (loaded.output.weight is loaded.tok_embeddings.weight) == tied
    assert load_model(tmp_path, torch.bfloat16).norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", SIZES)
def test_the_config_of_every_size_is_read_back_as_written(name, tmp_path):
    write_folder(SIZES[name], None, tmp_path, torch.bfloat16)
    assert load_config(tmp_path) == SIZES[name]


def test_the_same_weights_give_the_same_bytes_in_another_process(tmp_path, tokenizer_dir):
    save_model(Llama(CONFIG).init_weights(0), tokenizer_dir, tmp_path / "1")
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3])\n"
        "from test_checkpoint import CONFIG, Llama, save_model\n"
        "save_model(Llama(CONFIG).init_weights(0), Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    paths = [str(tokenizer_dir), str(tmp_path / "2"), str(Path(__file__).parent)]
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, *paths], check=True, env=env, cwd=Path(__file__).parents[2])
    names = sorted(p.name for p in (tmp_path / "1").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "2").iterdir())
    assert all((tmp_path / "1" / n).read_bytes() == (tmp_path / "2" / n).read_bytes() for n in names)


def test_the_weights_are_a_file_that_the_formats_own_library_reads(saved):
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    state = to_meta(load_file(saved / "model.safetensors"), CONFIG.head_dim)
    assert all(torch.equal(state[n], w) for n, w in Llama(CONFIG).init_weights(0).state_dict().items())


def test_the_tokenizer_of_the_folder_gives_the_same_ids_here_and_in_transformers(tmp_path, tokenizer_dir):
    transformers = pytest.importorskip("transformers")
    save_model(Llama(CONFIG).init_weights(0), tokenizer_dir, tmp_path / "model")
    ours, theirs = Tokenizer.load(tmp_path / "model"), transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "the sea, the é\n\n  123"
    assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "model")
    assert set(generation.eos_token_id) == ours.stop_ids and generation.bos_token_id == ours.bos
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert config.rope_parameters["rope_theta"] == 5e5 and config.rope_parameters["rope_type"] == "llama3"


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, tokenizer_dir):
    small = dataclasses.replace(CONFIG, vocab_size=300)
    with pytest.raises(ConfigError, match=r"516 tokens, the model has 300"):
        save_model(Llama(small), tokenizer_dir, tmp_path / "model")


def rewrite(path: Path, change) -> None:
    """Save the weights again after `change` was made to them."""
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors")


def edit_config(path: Path, **fields) -> None:
    data = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(data | fields))


def test_a_missing_tensor_is_named(saved):
    rewrite(saved, lambda s: s.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ArtifactError, match=r"lacks tensors: 'model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(saved)


def test_an_unexpected_tensor_is_named(saved):
    rewrite(saved, lambda s: s.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(4)}))
    with pytest.raises(ArtifactError, match=r"unexpected tensors: .*q_proj\.bias"):
        load_model(saved)


def test_a_misshapen_tensor_is_named_with_both_shapes(saved):
    edit_config(saved, intermediate_size=40)
    with pytest.raises(ArtifactError, match=r"gate_proj.*\[48, 32\].*\[40, 32\]"):
        load_model(saved)


def test_stored_rotary_tables_and_a_tied_models_second_copy_are_no_fault(tmp_path):
    model = Llama(dataclasses.replace(CONFIG, tied=True)).init_weights(0)
    save_model(model, None, tmp_path)

    def change(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    rewrite(tmp_path, change)
    assert same_weights(load_model(tmp_path), model)


@pytest.mark.parametrize("keep", [0, 5, 20, 700, 5000, -1])
def test_a_truncated_file_is_an_error_at_any_length(saved, keep):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"cut off|cannot be read"):
        load_model(saved)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x40" + bytes(7) + b"{" * 64, b"\x02" + bytes(7) + b"[]"])
def test_a_file_that_is_something_else_is_an_error(saved, content):
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        load_model(saved)


def test_a_folder_that_is_no_model_is_an_error_that_says_what_to_give(tmp_path, saved):
    with pytest.raises(ArtifactError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"has no config\.json") as error:
        load_model(tmp_path)
    assert "model.safetensors" in error.value.hint
    (saved / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"has no model\.safetensors"):
        load_model(saved)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mistral"}, "mistral"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"num_attention_heads": 3}, "n_kv_heads"),
        ({"hidden_size": "wide"}, "config.json"),
    ],
)
def test_a_config_of_another_kind_of_model_is_refused(saved, fields, message):
    edit_config(saved, **fields)
    with pytest.raises(ArtifactError, match=message):
        load_model(saved)


def test_a_config_without_a_field_or_that_is_no_json_is_refused(saved):
    data = json.loads((saved / "config.json").read_text())
    del data["hidden_size"]
    (saved / "config.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="hidden_size"):
        load_config(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="not JSON"):
        load_config(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_flipped_bit_in_an_artifact_is_found(tmp_path, name):
    @stage("checkpoint")
    def make(config, *, out):
        save_model(Llama(CONFIG).init_weights(0), None, out)

    made = make({}, out=tmp_path / "made")
    assert same_weights(load_model(made.path), Llama(CONFIG).init_weights(0))
    data = bytearray((made.path / name).read_bytes())
    data[-100] ^= 1
    (made.path / name).write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged"):
        load_model(made.path)


def test_a_checkpoint_that_was_interrupted_is_refused(tmp_path):
    @stage("checkpoint")
    def make(config, *, out):
        save_model(Llama(CONFIG).init_weights(0), None, out)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make({}, out=tmp_path / "made")
    with pytest.raises(ArtifactError, match="interrupted"):
        load_model(tmp_path / "made")


PEAK = """
import sys
from pathlib import Path
import torch
from puna.model.checkpoint import load_model
from puna.model.checkpoint import empty_model
from puna.model.sizes import LlamaConfig
# Of this program alone (getrusage begins with the memory of the process that started it), with what the first model loads.
peak = lambda: next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
empty_model(LlamaConfig(dim=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, ffn_dim=8, vocab_size=8, context=8), torch.float32)
before = peak()
model = load_model(Path(sys.argv[1]), getattr(torch, sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux tells it")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_the_models_memory_and_little_more(tmp_path, dtype):
    config = dataclasses.replace(CONFIG, dim=512, ffn_dim=2048, n_heads=16, n_kv_heads=16, head_dim=32, n_layers=8)
    save_model(empty_model(config, torch.bfloat16), None, tmp_path)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), dtype], capture_output=True, text=True, check=True, cwd=root
    )
    assert int(done.stdout) < 1.1 * config.parameters * getattr(torch, dtype).itemsize + 8e6
