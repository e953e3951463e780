"""Llamas there and back: shape, row order, scaling, and the memory that loading takes."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from puna.errors import ArtifactError, ConfigError, DataError
from puna.model.checkpoint import empty_model, hf_config
from puna.model.convert import to_meta
from puna.model.gguf import KINDS, GgufFile, blocks, load_gguf, write_gguf
from puna.model.gguf.format import Container, Pending, write_container
from puna.model.gguf.llama import ROPE_FREQS, SCALING, frequency_divisors, gguf_name
from puna.model.gguf.quantise import encode
from puna.model.llama import Llama, attend_with
from puna.model.sizes import SIZES, LlamaConfig, RopeScaling

BASE = LlamaConfig(
    dim=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=530, context=256, rope_theta=5e5,
)  # fmt: skip
SHAPES = {
    "grouped queries": BASE,
    "as many keys as queries": dataclasses.replace(BASE, n_kv_heads=4, rope_theta=1e4, norm_eps=1e-6),
    "one key for all queries": dataclasses.replace(BASE, n_kv_heads=1),
    "tied": dataclasses.replace(BASE, tied=True),
    "wide heads": dataclasses.replace(BASE, head_dim=64),
    "narrow heads": dataclasses.replace(BASE, head_dim=8),
    "3.1 scaling": dataclasses.replace(BASE, head_dim=128, context=131_072, rope_scaling=RopeScaling()),
    "3.2 scaling": dataclasses.replace(BASE, head_dim=64, tied=True, rope_scaling=RopeScaling(factor=32.0)),
    "small scaling": dataclasses.replace(BASE, rope_scaling=RopeScaling(factor=3.3, original_context=48)),
    "other factors": dataclasses.replace(
        BASE, rope_scaling=RopeScaling(factor=4.0, low_freq_factor=1.5, high_freq_factor=2.5, original_context=64)
    ),
}


def made(config: LlamaConfig) -> Llama:
    """A model all of whose weights are random, norms too."""
    model = Llama(config).init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.normal_(1.0, 0.2, generator=generator)
    return model


@torch.no_grad()
def logits(model: Llama) -> torch.Tensor:
    tokens = torch.randint(0, model.config.vocab_size, (2, 70), generator=torch.Generator().manual_seed(2))
    return model(tokens, torch.arange(70).expand(2, -1), attend_with(None))


def writable(path: Path) -> tuple[dict, dict[str, Pending]]:
    """A file's settings and tensors, to be changed and written again."""
    with Container(path) as file:
        settings = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in file.metadata.items()}
        settings = {k: v if isinstance(v, (int, float, str, list)) else list(v) for k, v in settings.items()}
        tensors = {
            name: Pending(info.kind, info.shape, [encode(file.read(name).float(), info.kind)])
            for name, info in file.tensors.items()
        }
    return settings, tensors


@pytest.mark.parametrize("shape", SHAPES)
def test_a_float32_file_gives_the_same_model(tmp_path, shape):
    model = made(SHAPES[shape])
    write_gguf(model, None, tmp_path / "m.gguf", "F32")
    loaded = load_gguf(tmp_path / "m.gguf")
    assert loaded.config == model.config
    assert torch.equal(logits(loaded), logits(model))
    assert (loaded.output.weight is loaded.tok_embeddings.weight) == model.config.tied


# Of the logits' deviation, measured 0.0010, 0.0085, 0.027, 0.41, 0.30: eight layers of noise forgive nothing.
@pytest.mark.parametrize("kind, most", [("F16", 2e-3), ("BF16", 0.02), ("Q8_0", 0.04), ("Q4_0", 0.5), ("Q4_K_M", 0.38)])
def test_smaller_kinds_are_near(tmp_path, kind, most):
    model = made(dataclasses.replace(BASE, dim=256, ffn_dim=512, n_layers=8))
    write_gguf(model, None, tmp_path / "m.gguf", kind)
    wanted = logits(model)
    assert (logits(load_gguf(tmp_path / "m.gguf")) - wanted).square().mean().sqrt() < most * wanted.std()


def test_every_kind_packs_its_tensors_as_documented(tmp_path):
    model = made(dataclasses.replace(BASE, dim=256, ffn_dim=512, n_layers=8))
    found = {}
    for kind in KINDS:
        write_gguf(model, None, tmp_path / "m.gguf", kind)
        with GgufFile(tmp_path / "m.gguf") as file:
            assert file.form("model.norm.weight") == "F32"
            found[kind] = {name: file.form(name) for name in file.names}
    assert {kind: types["lm_head.weight"] for kind, types in found.items()} == {
        "F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0", "Q4_0": "Q6_K", "Q4_K_M": "Q6_K",
    }  # fmt: skip
    mixed = [found["Q4_K_M"][f"model.layers.{i}.mlp.down_proj.weight"] for i in range(8)]
    assert mixed == ["Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K"]
    assert found["Q4_K_M"]["model.layers.0.self_attn.o_proj.weight"] == "Q4_0"  # 64 columns
    assert found["Q4_K_M"]["model.layers.0.self_attn.q_proj.weight"] == "Q4_K"


@pytest.mark.parametrize("shape", ["grouped queries", "as many keys as queries", "tied", "wide heads", "3.1 scaling"])
def test_transformers_reads_our_file_to_the_same_logits(tmp_path, shape):
    """An independent reader: it puts the rows of q and k back into its own order."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = SHAPES[shape]
    model = made(config)
    write_gguf(model, None, tmp_path / "m.gguf", "F32")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf_config(config, torch.float32))).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.fill_(torch.nan)  # so that what is not read shows
    read = load_gguf_checkpoint(str(tmp_path / "m.gguf"), return_tensors=True, model_to_load=theirs)
    theirs.load_state_dict(read["tensors"], strict=False)
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "rms_norm_eps"):
        assert read["config"][key] == pytest.approx(hf_config(config, torch.float32)[key], rel=1e-6), key
    tokens = torch.randint(0, 530, (2, 70), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert (theirs(tokens).logits - logits(model)).abs().max() < 1e-4


def converted(theirs, config: LlamaConfig, path: Path) -> None:
    """A transformers Llama as llama.cpp's converter writes it, with the `gguf` package.

    Its rows of q and k: of each head, the first half and the second half alternate.
    """
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.n_layers)
    for name, weight in theirs.state_dict().items():
        if config.tied and name == "lm_head.weight":
            continue
        rows = weight.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = rows.reshape(-1, 2, config.head_dim // 2, rows.shape[1])
            rows = np.stack([heads[:, 0], heads[:, 1]], axis=2).reshape(rows.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), rows)
    if config.rope_scaling is not None:
        scaled = theirs.model.rotary_emb.inv_freq
        plain = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    "shape", ["grouped queries", "as many keys as queries", "tied", "wide heads", "3.1 scaling", "3.2 scaling"]
)
def test_a_converted_transformers_model_gives_its_logits(tmp_path, shape):
    """Written by the peer's writer from the peer's model, in which 3.1's scaling is known by its divisors only."""
    transformers = pytest.importorskip("transformers")
    config = SHAPES[shape]
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(**hf_config(config, torch.float32))
    theirs = transformers.LlamaForCausalLM(settings).eval().float()
    converted(theirs, config, tmp_path / "m.gguf")
    ours = load_gguf(tmp_path / "m.gguf")
    assert ours.config == config
    tokens = torch.randint(0, 530, (2, 70), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert (theirs(tokens).logits - logits(ours)).abs().max() < 1e-4


@pytest.mark.parametrize("size", [s for s in SIZES if SIZES[s].rope_scaling])
def test_published_scaling_is_found_from_its_divisors(tmp_path, size):
    config = dataclasses.replace(BASE, head_dim=SIZES[size].head_dim, rope_scaling=SIZES[size].rope_scaling)
    write_gguf(made(config), None, tmp_path / "named.gguf", "F32")
    settings, tensors = writable(tmp_path / "named.gguf")
    settings = {key: value for key, value in settings.items() if not key.startswith(SCALING)}
    write_container(tmp_path / "m.gguf", settings, tensors)
    assert load_gguf(tmp_path / "m.gguf").config == config


@pytest.mark.parametrize("context, factor", [(32, 8.0), (48, 3.3), (1000, 4.0), (4096, 16.0), (8192, 5.0)])
def test_other_scaling_is_found_from_its_divisors(tmp_path, context, factor):
    config = dataclasses.replace(BASE, head_dim=64, rope_scaling=RopeScaling(factor=factor, original_context=context))
    model = made(config)
    write_gguf(model, None, tmp_path / "named.gguf", "F32")
    settings, tensors = writable(tmp_path / "named.gguf")
    settings = {key: value for key, value in settings.items() if not key.startswith(SCALING)}
    write_container(tmp_path / "m.gguf", settings, tensors)
    loaded = load_gguf(tmp_path / "m.gguf")
    assert torch.allclose(frequency_divisors(loaded.config), frequency_divisors(config), rtol=1e-5)
    assert (logits(loaded) - logits(model)).abs().max() < 1e-4


def changed(tmp_path: Path, settings: dict | None = None, tensors: dict | None = None, drop: str = "") -> Path:
    """A good file with some settings and tensors replaced or dropped."""
    write_gguf(made(SHAPES["3.1 scaling"]), None, tmp_path / "good.gguf", "F32")
    old_settings, old_tensors = writable(tmp_path / "good.gguf")
    settings, tensors = old_settings | (settings or {}), old_tensors | (tensors or {})
    write_container(
        tmp_path / "changed.gguf",
        {key: value for key, value in settings.items() if key != drop},
        {name: value for name, value in tensors.items() if name != drop},
    )
    return tmp_path / "changed.gguf"


def zeros(*shape: int) -> Pending:
    return Pending(blocks.F32, shape, [encode(torch.zeros(shape), blocks.F32)])


def test_other_divisors_are_refused(tmp_path):
    for values in (torch.linspace(1, 9, 64), torch.full((64,), torch.nan), torch.zeros(64)):
        divisors = Pending(blocks.F32, (64,), [encode(values, blocks.F32)])
        with pytest.raises(ArtifactError, match=r"not Llama 3.1's scaling"):
            GgufFile(changed(tmp_path, tensors={ROPE_FREQS: divisors}))


@pytest.mark.parametrize(
    "settings, fault",
    [
        ({"general.architecture": "qwen2"}, "the architecture is 'qwen2'"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ({"llama.block_count": 4}, "lacks tensors: .blk.3.attn_k.weight"),
        ({"llama.block_count": 2}, "unexpected tensors: .blk.2"),
        ({"llama.block_count": 2**31}, "claims 2,147,483,648 layers"),
        ({"llama.embedding_length": 2**31}, "has shape"),
        ({"llama.feed_forward_length": 2**31}, "has shape"),
        ({"llama.feed_forward_length": [96, 96, 96, 48]}, "for all layers"),
        ({"llama.attention.head_count": 0}, "not a positive whole number"),
        ({"llama.attention.head_count": 3}, "n_kv_heads=2 must divide"),
        ({"llama.attention.key_length": 64}, "a head is 64 wide"),
        ({"llama.attention.layer_norm_rms_epsilon": "small"}, "not a positive number"),
        ({"llama.rope.freq_base": float("nan")}, "not a positive number"),
    ],
)
def test_what_is_no_dense_llama_is_refused_by_name(tmp_path, settings, fault):
    with pytest.raises(ArtifactError, match=fault) as caught:
        load_gguf(changed(tmp_path, settings))
    assert "changed.gguf" in str(caught.value) and caught.value.hint


def test_tensors_that_do_not_belong_are_refused_by_name(tmp_path):
    with pytest.raises(ArtifactError, match=r"unexpected tensors: .blk.0.attn_q.bias"):
        GgufFile(changed(tmp_path, tensors={"blk.0.attn_q.bias": zeros(512)}))
    with pytest.raises(ArtifactError, match=r"lacks tensors: .blk.1.ffn_up.weight"):
        GgufFile(changed(tmp_path, drop="blk.1.ffn_up.weight"))
    with pytest.raises(ArtifactError, match=r"no setting llama.context_length"):
        GgufFile(changed(tmp_path, drop="llama.context_length"))
    with pytest.raises(ArtifactError, match="has shape"):
        GgufFile(changed(tmp_path, tensors={"output_norm.weight": zeros(32)}))


def test_lists_that_say_one_number_for_all_layers_are_read(tmp_path):
    path = changed(tmp_path, {"llama.feed_forward_length": [96, 96, 96], "llama.attention.head_count_kv": [2, 2, 2]})
    assert load_gguf(path).config == SHAPES["3.1 scaling"]


def test_whole_tensors_and_pieces_are_a_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("puna.model.gguf.llama._PIECE_WEIGHTS", 64 * 20)  # 20 rows: heads of 16 come one at a time
    model = made(BASE)
    write_gguf(model, None, tmp_path / "m.gguf", "F32")
    with GgufFile(tmp_path / "m.gguf") as file:
        state = {name: file.read(name) for name in file.names}
        for name, whole in state.items():
            pieces = list(file.pieces(name))
            assert [start for start, _ in pieces][:1] == [0]
            assert torch.equal(torch.cat([rows for _, rows in pieces]), whole)
        assert [len(rows) for _, rows in file.pieces("model.layers.0.self_attn.q_proj.weight")] == [16] * 4
        assert file.bytes("model.norm.weight") == 64 * 4
    back = to_meta(state, BASE.head_dim)
    assert all(torch.equal(back[name], weight) for name, weight in model.state_dict().items())


def test_the_same_model_gives_the_same_bytes(tmp_path, config, tokenizer):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_gguf(made(config), tokenizer, tmp_path / name / "m.gguf", "Q4_K_M")
    assert (tmp_path / "a/m.gguf").read_bytes() == (tmp_path / "b/m.gguf").read_bytes()


def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path, tokenizer):
    model = made(BASE)
    with pytest.raises(ConfigError, match="'Q3' is not a kind"):
        write_gguf(model, None, tmp_path / "m.gguf", "Q3")
    with pytest.raises(ConfigError, match="the tokenizer has 521 tokens, the model has 300"):
        write_gguf(made(dataclasses.replace(BASE, vocab_size=300)), tokenizer, tmp_path / "m.gguf", "F32")
    for value, kind in ((1e5, "F16"), (torch.nan, "F32"), (torch.inf, "BF16"), (torch.nan, "Q4_0")):
        with torch.no_grad():
            model.layers[1].attention.wo.weight[3, 4] = value
        with pytest.raises(DataError, match=r"layers.1.attention.wo.weight has a weight"):
            write_gguf(model, None, tmp_path / "m.gguf", kind)
    assert not list(tmp_path.iterdir())


def test_names_are_the_peers():
    gguf = pytest.importorskip("gguf")
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    with torch.device("meta"):
        names = [name for name, _ in Llama(dataclasses.replace(BASE, n_layers=2)).named_parameters()]
    assert [gguf_name(name) for name in names] == [theirs.get_name(n, try_suffixes=(".weight",)) for n in names]


PEAK = """
import sys
from pathlib import Path
import torch
from puna.model.gguf import load_gguf
from puna.model.checkpoint import empty_model
from puna.model.sizes import LlamaConfig
# Of this program alone (getrusage begins with the memory of the process that started it), with what the first model loads.
peak = lambda: next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
empty_model(LlamaConfig(dim=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, ffn_dim=8, vocab_size=8, context=8), torch.float32)
before = peak()
model = load_gguf(Path(sys.argv[1]), getattr(torch, sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux tells it")
@pytest.mark.parametrize("kind, dtype", [("BF16", "bfloat16"), ("Q8_0", "float32")])
def test_loading_takes_the_models_memory_and_little_more(tmp_path, kind, dtype):
    config = dataclasses.replace(BASE, dim=512, ffn_dim=2048, n_heads=16, n_kv_heads=16, head_dim=32, n_layers=8)
    model = empty_model(config, torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    write_gguf(model, None, tmp_path / "m.gguf", kind)
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "m.gguf"), dtype],
        capture_output=True, text=True, check=True, cwd=root,
    )  # fmt: skip
    assert int(done.stdout) < 1.1 * config.parameters * getattr(torch, dtype).itemsize + 24e6
