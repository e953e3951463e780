import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from released import CASES, FAMILIES, logits, model_of, params_of, release, same_weights

from puna.errors import ArtifactError, ConfigError
from puna.model.checkpoint import empty_model, fill
from puna.model.llama import Llama
from puna.model.meta import MetaFiles, load_meta, write_meta
from puna.model.sizes import LlamaConfig, RopeScaling


@pytest.mark.parametrize("name, shards", CASES)
def test_every_family_cut_into_files_is_read_back_bit_for_bit_and_computes_the_same(tmp_path, name, shards):
    model = release(tmp_path, name, shards)
    loaded = load_meta(tmp_path)
    assert loaded.config == model.config
    assert same_weights(loaded, model)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name, shards", CASES)
def test_what_we_write_meta_style_is_read_by_torch_and_read_back_as_the_same_model(tmp_path, name, shards):
    model = model_of(name)
    write_meta(model, None, tmp_path, shards)
    files = [torch.load(tmp_path / f"consolidated.{i:02}.pth", weights_only=True) for i in range(shards)]
    assert all(torch.equal(f["norm.weight"], model.norm.weight) for f in files)
    assert torch.equal(torch.cat([f["output.weight"] for f in files]), model.output.weight)
    loaded = load_meta(tmp_path)
    # A Llama 1 without frequencies in its layers looks like a Llama 2; the folder says what it is.
    assert loaded.config == model.config and same_weights(loaded, model)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_written_params_are_the_released_ones_where_the_family_has_them(tmp_path, name):
    write_meta(model_of(name), None, tmp_path)
    written, released = json.loads((tmp_path / "params.json").read_text()), params_of(name)
    same = released.keys() - {"multiple_of", "ffn_dim_multiplier", "vocab_size"}
    assert {k: written.get(k, written["n_heads"]) for k in same} == {k: released[k] for k in same}
    assert ("puna" in written) == name.startswith("llama-1")


def test_the_tensors_under_hugging_faces_names_compute_the_same_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = release(tmp_path, "llama-3.1-8b", 2)
    c = model.config
    config = transformers.LlamaConfig(
        hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=2, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, vocab_size=c.vocab_size, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta,
        max_position_embeddings=c.context, tie_word_embeddings=False,
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192},
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    with MetaFiles(tmp_path) as files:
        theirs.load_state_dict({name: files.read(name) for name in files.names})
    with torch.no_grad():
        found = theirs(torch.arange(24).view(2, 12) * 7 % c.vocab_size).logits
    assert (found - logits(model)).abs().max() < 1e-4


def test_pieces_and_whole_tensors_agree_and_fill_a_model_like_any_other_folder(tmp_path, monkeypatch):
    model = release(tmp_path, "llama-3.1-405b", 16)
    monkeypatch.setattr("puna.model.meta.files._PIECE_BYTES", 300_000)
    with MetaFiles(tmp_path) as files:
        assert files.shards == 16
        for name in files.names:
            parts = list(files.pieces(name, 2))
            assert torch.equal(torch.cat([rows for _, rows in parts]), files.read(name))
            assert [start for start, _ in parts][:1] == [0] and all(start % 2 == 0 for start, _ in parts)
            assert files.bytes(name) == files.read(name).nbytes and files.form(name) == "F32"
        filled = empty_model(files.config, torch.float32)
        fill(filled, files)
    assert same_weights(filled, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stored_in_half_are_converted_to_the_type_that_was_asked_for(tmp_path, dtype):
    model = model_of("llama-3-8b")
    write_meta(model, None, tmp_path, 2, dtype)
    assert same_weights(load_meta(tmp_path), model.to(dtype).float())
    assert load_meta(tmp_path, dtype).norm.weight.dtype == dtype


def test_writing_twice_gives_the_same_bytes_and_leaves_no_temporary_file(tmp_path):
    for folder in ("1", "2"):
        write_meta(model_of("llama-3.2-1b"), None, tmp_path / folder, 2)
    names = sorted(p.name for p in (tmp_path / "1").iterdir())
    assert names == ["consolidated.00.pth", "consolidated.01.pth", "params.json"]
    assert all((tmp_path / "1" / n).read_bytes() == (tmp_path / "2" / n).read_bytes() for n in names)


def test_a_tied_matrix_is_in_a_single_file_once(tmp_path):
    model = model_of("llama-3.2-1b")
    write_meta(model, None, tmp_path)
    stored = sum(w.nbytes for w in model.parameters())
    assert stored < (tmp_path / "consolidated.00.pth").stat().st_size < stored + 20_000


def test_the_tokenizer_goes_along_and_its_absence_is_an_error(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(ArtifactError, match=r"no tokenizer\.model"):
        write_meta(model_of("llama-3-8b"), tmp_path / "tokenizer", tmp_path / "out")
    (tmp_path / "tokenizer/tokenizer.model").write_bytes(b"any bytes\0")
    write_meta(model_of("llama-3-8b"), tmp_path / "tokenizer", tmp_path / "out")
    assert (tmp_path / "out/tokenizer.model").read_bytes() == b"any bytes\0"


TINY = LlamaConfig(
    dim=24, n_layers=3, n_heads=6, n_kv_heads=3, head_dim=4, ffn_dim=35, vocab_size=50, context=77, rope_theta=3e4,
    rope_scaling=RopeScaling(factor=2.0, original_context=32), tied=True,
)  # fmt: skip


@pytest.mark.parametrize("change", [{}, {"tied": False}, {"rope_scaling": None}, {"ffn_dim": 100}, {"rope_theta": 1e4}])
def test_a_model_of_no_family_is_read_back_with_its_own_shape(tmp_path, change):
    model = Llama(dataclasses.replace(TINY, **change)).init_weights(0)
    write_meta(model, None, tmp_path)
    loaded = load_meta(tmp_path)
    assert loaded.config == model.config and same_weights(loaded, model)


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_a_tied_model_stays_tied_however_its_embedding_is_cut(tmp_path, theta):
    config = dataclasses.replace(TINY, rope_theta=theta, n_kv_heads=2, ffn_dim=36)
    model = Llama(config).init_weights(0)
    write_meta(model, None, tmp_path, 2)
    loaded = load_meta(tmp_path)
    assert loaded.config == config and same_weights(loaded, model)


@pytest.mark.parametrize("shards", [0, 4, 5])
def test_a_model_that_cannot_be_cut_evenly_is_refused(tmp_path, shards):
    with pytest.raises(ConfigError, match="cannot share"):
        write_meta(Llama(TINY), None, tmp_path, shards)
    with pytest.raises(ConfigError, match="no key for 6 heads of width 8"):
        write_meta(Llama(dataclasses.replace(TINY, head_dim=8)), None, tmp_path)


def change(folder: Path, shard: int, edit) -> None:
    file = folder / f"consolidated.{shard:02}.pth"
    tensors = torch.load(file, weights_only=True)
    edit(tensors)
    torch.save(tensors, file)


FAULTS = {
    "differ in 'layers.1.ffn_norm.weight'": lambda t: t["layers.1.ffn_norm.weight"].add_(1),
    "differ in 'layers.0.attention.wk.weight'": lambda t: t["layers.0.attention.wk.weight"].add_(1),
    r"consolidated\.03\.pth lacks tensors: 'norm\.weight'": lambda t: t.pop("norm.weight"),
    r"has unexpected tensors: 'layers\.0\.attention\.wq\.bias'": lambda t: t.update(
        {"layers.0.attention.wq.bias": torch.zeros(4)}
    ),
    "is not the part that the other files have": lambda t: t.update({"norm.weight": torch.zeros(7)}),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_file_that_does_not_belong_to_the_others_is_named(tmp_path, message):
    release(tmp_path, "llama-3.1-405b", 16)
    change(tmp_path, 3, FAULTS[message])
    with pytest.raises(ArtifactError, match=message):
        load_meta(tmp_path)


def test_a_missing_file_among_the_shards_is_named(tmp_path):
    release(tmp_path, "llama-3-8b", 4)
    (tmp_path / "consolidated.02.pth").unlink()
    with pytest.raises(ArtifactError, match=r"but no consolidated\.02\.pth"):
        load_meta(tmp_path)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_layers": 3}, "has 2 layers, params.json says 3"),
        ({"n_layers": 10**9}, "n_layers must be a whole number"),
        ({"n_kv_heads": 4}, "wk.weight' is .* asks for"),
        ({"ffn_dim_multiplier": 4.0}, "w1.weight' is .* asks for"),
        ({"vocab_size": 7}, "vocab_size is 7, the weights have 96"),
        ({"dim": 64}, "vocab_size is 96, the weights have 48"),
    ],
)
def test_params_that_do_not_fit_the_weights_are_refused_before_memory_is_taken(tmp_path, fields, message):
    release(tmp_path, "llama-3-8b", 2)
    (tmp_path / "params.json").write_text(json.dumps(params_of("llama-3-8b") | fields))
    with pytest.raises(ArtifactError, match=message):
        MetaFiles(tmp_path)


def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path):
    release(tmp_path, "llama-3-8b", 1)
    change(tmp_path, 0, lambda t: t.update({"output.weight": t["output.weight"].to(torch.int8)}))
    with pytest.raises(ArtifactError, match=r"'output\.weight' is of type int8"):
        load_meta(tmp_path)


def test_rows_that_lie_apart_are_read_and_columns_that_do_are_refused(tmp_path):
    model = release(tmp_path, "llama-3-8b", 1)
    name = "layers.0.attention.wo.weight"
    change(tmp_path, 0, lambda t: t.update({name: torch.cat([t[name], t[name] + 1], dim=1)[:, : t[name].shape[1]]}))
    assert same_weights(load_meta(tmp_path), model)
    change(tmp_path, 0, lambda t: t.update({name: t[name].t().contiguous().t()}))
    with pytest.raises(ArtifactError, match="do not lie in one piece"):
        load_meta(tmp_path)


def test_a_module_saved_with_its_metadata_is_read(tmp_path):
    model = release(tmp_path, "llama-3-8b", 1)
    torch.save(model.state_dict(), tmp_path / "consolidated.00.pth")  # an OrderedDict with attributes
    assert same_weights(load_meta(tmp_path), model)
    torch.save(dict(model.named_parameters()), tmp_path / "consolidated.00.pth")  # parameters, not tensors
    assert same_weights(load_meta(tmp_path), model)


PEAK = """
import sys
from pathlib import Path
import torch
from puna.model.meta import load_meta
from puna import log
log.info("what is loaded on first use is loaded")
from puna.model.checkpoint import empty_model
from puna.model.sizes import LlamaConfig
# Of this program alone (getrusage begins with the memory of the process that started it), with what the first model loads.
peak = lambda: next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
empty_model(LlamaConfig(dim=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, ffn_dim=8, vocab_size=8, context=8), torch.float32)
before = peak()
model = load_meta(Path(sys.argv[1]), getattr(torch, sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux tells it")
def test_loading_takes_the_models_memory_and_a_tenth_more(tmp_path):
    config = dataclasses.replace(
        TINY, dim=512, ffn_dim=2048, n_heads=16, n_kv_heads=16, head_dim=32, n_layers=12, vocab_size=64, rope_theta=5e5
    )
    write_meta(empty_model(config, torch.bfloat16), None, tmp_path, 4)
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", PEAK, str(tmp_path), "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert int(done.stdout) < 1.1 * config.parameters * 2 + 8e6
