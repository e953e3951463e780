"""The runner over the C++ kernels beside the reference runner: from memory, and from a checkpoint of every format."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_llama import random_model
from worlds import WIDE

from puna.errors import ConfigError
from puna.inference.adapters import Adapter
from puna.inference.native import NativeRunner, unfit
from puna.inference.runner import make_runner, open_runner
from puna.inference.scoring import windows
from puna.inference.spans import Span
from puna.inference.torch_runner import TorchRunner
from puna.kernels import native
from puna.model.checkpoint import save_model
from puna.model.conversion import convert
from puna.model.llama import Llama
from puna.quant import QuantConfig, load_quantised, quantise

pytestmark = pytest.mark.skipif(unfit(WIDE) is not None, reason=str(unfit(WIDE)))


def spans(wanted: int = 4) -> list[Span]:
    """Two prompts and, of a third sequence, one more token."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, WIDE.vocab_size, (70,), generator=g).tolist()
    return [Span(ids[:41], 0, [3, 1, 4], wanted), Span(ids[41:60], 0, [9, 2], wanted), Span([ids[61]], 0, [5], 1)]


def reference(model: Llama, asked: list[Span]) -> np.ndarray:
    return TorchRunner(model, blocks=12).forward(asked)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_the_references(tied):
    model = random_model(replace(WIDE, tied=tied))
    runner = NativeRunner.of(model, threads=2, blocks=12)
    assert difference(runner.forward(spans()), reference(model, spans())) < 1e-5
    more = [Span([7, 8], 41, [3, 1, 4], 2), Span([9], 1, [5], 1)]  # the cache goes on
    again = TorchRunner(model, blocks=12)
    again.forward(spans())
    assert difference(runner.forward(more), again.forward(more)) < 1e-5


@pytest.mark.parametrize("numbers", ["float32", "bfloat16", "int4"])
def test_logits_have_the_same_bits_however_many_are_wanted(checkpoint, tmp_path, numbers):
    if numbers == "int4":
        path = quantise(QuantConfig(bits=4, group_size=32), checkpoint[0], out=tmp_path / "small").path
        runner = open_runner(path, choice="native", cache_bytes=1 << 22)
    else:
        runner = NativeRunner.of(deepcopy(checkpoint[1]).to(getattr(torch, numbers)), threads=2, blocks=12)
    asked, following = spans(), [Span([3], 41, [3, 1, 4], 1), Span([4], 19, [9, 2], 1)]
    counts = [len(span.tokens) for span in asked]

    def read(wanted: list[int]) -> tuple[list[np.ndarray], np.ndarray]:
        runner.forget()
        rows = runner.forward([replace(span, wanted=n) for span, n in zip(asked, wanted, strict=True)])
        return np.split(rows, np.cumsum(wanted)[:-1]), runner.forward(following)

    whole, next_logits = read(counts)
    for wanted in ([1, 1, 1], [0, 1, 0], [0, 0, 0], [7, 0, 1], [41, 2, 0]):
        some, same = read(wanted)
        assert np.array_equal(same, next_logits)
        for rows, all_rows in zip(some, whole, strict=True):
            assert np.array_equal(rows, all_rows[len(all_rows) - len(rows) :])


def test_a_copied_block_reads_as_its_source():
    model = random_model(WIDE)
    runner = NativeRunner.of(model, threads=1, blocks=12)
    [long, *_] = spans()
    runner.forward([long])
    expected = runner.forward([Span([5], 41, [3, 1, 4], 1)])
    runner.copy_block(4, 7)
    assert np.array_equal(runner.forward([Span([5], 41, [3, 1, 7], 1)]), expected)
    runner.forget()
    assert not np.array_equal(runner.forward([Span([5], 41, [3, 1, 7], 1)]), expected)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model's folder, in float32, and the model."""
    wide = replace(WIDE, dim=256, head_dim=32, n_heads=8, n_kv_heads=2, ffn_dim=512)
    model, path = Llama(wide).init_weights(3).eval(), tmp_path_factory.mktemp("native") / "model"
    save_model(model, None, path)
    return path, model


@pytest.mark.parametrize(
    "to, form, tolerance",
    [
        ("huggingface", "F32", 1e-5),
        ("huggingface", "BF16", 1e-2),
        ("huggingface", "F16", 2e-3),
        ("meta", "F32", 1e-5),
        ("gguf", "F32", 1e-5),
        ("gguf", "BF16", 1e-2),
    ],
)
def test_a_checkpoint_of_any_format_goes_straight_into_the_kernels(checkpoint, tmp_path, to, form, tolerance):
    path, model = checkpoint
    out = tmp_path / ("model.gguf" if to == "gguf" else "model")
    convert(path, out, to, form)
    runner = open_runner(out, choice="native", cache_bytes=1 << 22)
    assert isinstance(runner, NativeRunner)
    assert difference(runner.forward(spans()), reference(model, spans())) < tolerance


@pytest.mark.parametrize("to", ["huggingface", "meta", "gguf"])
def test_packed_bfloat16_gives_the_same_logits_from_three_quarters_of_the_memory(checkpoint, tmp_path, to):
    out = tmp_path / ("model.gguf" if to == "gguf" else "model")
    convert(checkpoint[0], out, to, "BF16")
    settings = {"dtype": torch.bfloat16, "choice": "native", "cache_bytes": 1 << 22}
    packed, plain = open_runner(out, **settings), open_runner(out, packed=False, **settings)
    assert packed.network.bytes < 0.77 * plain.network.bytes
    for asked in (spans(), [Span([7], 41, [3, 1, 4], 1)]):
        assert np.array_equal(packed.forward(asked), plain.forward(asked))


def test_plain_cpp_gets_bfloat16_as_it_is(checkpoint):
    before, model = native.chosen(), Llama(checkpoint[1].config).to(torch.bfloat16)
    try:
        native.choose(native.PLAIN)
        sizes = [NativeRunner.of(model, threads=1, blocks=12, packed=packed).network.bytes for packed in (True, False)]
        assert sizes[0] == sizes[1]
    finally:
        native.choose(before)


@pytest.mark.parametrize("form", ["Q8_0", "Q4_0", "Q4_K_M"])
def test_quantised_gguf_computes_with_the_files_own_weights(checkpoint, tmp_path, form):
    convert(checkpoint[0], tmp_path / "model.gguf", "gguf", form)
    expected = reference(make_reference(tmp_path / "model.gguf"), spans())
    runner = open_runner(tmp_path / "model.gguf", choice="native", cache_bytes=1 << 22)
    # Activations are rounded to 8 bits, keys and values to bfloat16; the weights are those of the file.
    assert difference(runner.forward(spans()), expected) < 3e-2


def make_reference(path) -> Llama:
    from puna.model.opening import load_checkpoint

    return load_checkpoint(path)


@pytest.mark.parametrize("bits, group", [(8, 32), (4, 32), (4, 128), (4, 24)])
def test_a_folder_that_we_quantised(checkpoint, tmp_path, bits, group):
    made = quantise(QuantConfig(bits=bits, group_size=group), checkpoint[0], out=tmp_path / "small")
    expected = reference(load_quantised(made.path), spans())
    for runner in (
        open_runner(made.path, choice="native", cache_bytes=1 << 22),
        make_runner(load_quantised(made.path, expand=False), choice="native", blocks=12),
    ):
        assert difference(runner.forward(spans()), expected) < 3e-2


@pytest.mark.parametrize("module", ["attention.wq", "feed_forward.w1", "feed_forward.w3"])
def test_matrices_of_a_layer_may_be_of_different_kinds(checkpoint, tmp_path, module):
    """As a budget chooses them; numbers and codes are multiplied by different numbers of tokens at a time."""
    config = QuantConfig(bits=8, matrices={f"layers.0.{module}.weight": "16"})
    made = quantise(config, checkpoint[0], out=tmp_path / "mixed")
    expected = reference(load_quantised(made.path), spans())
    before = native.chosen()
    try:
        for instructions in native.instructions():
            native.choose(instructions)
            found = NativeRunner.load(made.path, threads=2, blocks=12).forward(spans())
            assert difference(found, expected) < 3e-2, instructions
    finally:
        native.choose(before)


def test_keys_and_values_in_8_bits(checkpoint):
    _, model = checkpoint
    small = NativeRunner.of(model, threads=2, blocks=12, kv="int8")
    assert difference(small.forward(spans()), reference(model, spans())) < 2e-2
    assert small.cache.block_bytes < NativeRunner.of(model, threads=2, blocks=12).cache.block_bytes / 3


def test_an_adapter_changes_the_spans_that_ask_for_it(checkpoint):
    _, model = checkpoint
    g = torch.Generator().manual_seed(5)
    factors = {}
    for name, weight in model.named_parameters():
        if name.startswith("layers.") and weight.ndim == 2:
            down, up = (
                torch.randn(s, generator=g).numpy() * 0.05 for s in ((3, weight.shape[1]), (weight.shape[0], 3))
            )
            factors[name.removesuffix(".weight")] = (down, up)
    adapter, plain = Adapter(factors), TorchRunner(model, blocks=12)
    runner = NativeRunner.of(model, threads=2, blocks=12)
    asked = [replace(span, adapter=which) for span, which in zip(spans(), (0, None, 0))]
    assert plain.add_adapter(adapter) == runner.add_adapter(adapter) == 0
    assert difference(runner.forward(asked), plain.forward(asked)) < 1e-4
    assert difference(runner.forward(spans()), plain.forward(asked)) > 1e-2  # and it does change something


def test_texts_are_scored_as_the_reference_scores_them():
    model = random_model(WIDE)
    ids = torch.randint(0, WIDE.vocab_size, (300,)).tolist()
    todo = [
        w for i, (n, given) in enumerate([(2, 1), (40, 1), (60, 30), (300, 1)]) for w in windows(i, ids[:n], given, 64)
    ]
    todo.sort(key=lambda w: len(w.tokens))
    runner = NativeRunner.of(model, threads=2, blocks=12)
    expected = TorchRunner(model, blocks=12).log_likelihoods(todo, WIDE.vocab_size)
    assert runner.log_likelihoods(todo, WIDE.vocab_size) == pytest.approx(expected, rel=1e-5)


def test_a_shape_that_the_kernels_lack_is_computed_by_pytorch_and_refused_by_name(caplog):
    model = random_model(replace(WIDE, head_dim=8))
    assert isinstance(make_runner(model, blocks=2), TorchRunner)
    with pytest.raises(ConfigError, match="multiple of 16"):
        make_runner(model, blocks=2, choice="native")


def test_without_the_library_pytorch_computes_and_one_line_says_so(monkeypatch):
    from puna.inference import runner
    from puna.kernels import native

    lines = []
    monkeypatch.setattr(native, "why_not", lambda: "they were not built")
    monkeypatch.setattr(runner.log, "info", lines.append)
    monkeypatch.setattr(runner, "_said", set())
    for _ in range(2):
        assert isinstance(make_runner(random_model(WIDE), blocks=2), TorchRunner)
    assert len(lines) == 1 and "not built" in lines[0]
