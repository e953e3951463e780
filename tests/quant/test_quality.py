"""The measured loss: what it is against plain PyTorch, and that it rises as bits fall."""

import pytest
import torch
import torch.nn.functional as F
from structured import SHAPE

from puna.errors import DataError
from puna.model.checkpoint import load_model
from puna.model.llama import attend_with
from puna.quant import QuantConfig, load_quantised, quantise
from puna.quant.sample import rows_of, texts_of
from puna.tokenizer.load import load_tokenizer


def quality_of(folder, out, **settings):
    made = quantise(
        QuantConfig(quality_tokens=2048, **settings), folder / "model", None, folder / "heldout.txt", out=out
    )
    return made, made.metrics["quality"]


@torch.no_grad()
def test_the_measures_are_those_of_the_two_models_logits(structured, tmp_path):
    made, found = quality_of(structured, tmp_path / "q", group_size=64)
    tokenizer = load_tokenizer(structured / "model")
    tokens = rows_of(texts_of(structured / "heldout.txt", "heldout"), tokenizer, 2048, SHAPE.context)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    p, q = (
        F.log_softmax(model(tokens, positions, attend_with(None))[:, :-1, : tokenizer.vocab_size], -1)
        for model in (load_model(structured / "model"), load_quantised(made.path))
    )
    target = tokens[:, 1:, None]
    assert found["kl"]["value"] == pytest.approx(
        float(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()), rel=1e-3
    )
    assert found["top1"]["value"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()), rel=1e-5)
    ratio = float((p.gather(2, target).mean() - q.gather(2, target).mean()).exp())
    assert found["perplexity_ratio"]["value"] == pytest.approx(ratio, rel=1e-4)
    assert found["tokens"] == tokens.numel() and found["kl"]["low"] <= found["kl"]["value"] <= found["kl"]["high"]


def test_fewer_bits_and_larger_groups_lose_more(structured, tmp_path):
    forms = {
        "8/32": {"bits": 8}, "8/128": {"bits": 8, "group_size": 128}, "4/32": {"embedding_bits": 4},
        "4/128": {"group_size": 128, "embedding_bits": 4},
    }  # fmt: skip
    kl = {
        name: quality_of(structured, tmp_path / name.replace("/", "-"), **s)[1]["kl"]["value"]
        for name, s in forms.items()
    }
    assert 0 < kl["8/32"] < kl["8/128"] < kl["4/32"] < kl["4/128"]
    assert 20 * kl["8/32"] < kl["4/32"]


def test_text_that_is_too_short_is_an_error_and_a_short_one_makes_a_short_row(structured, tmp_path):
    tokenizer = load_tokenizer(structured / "model")
    assert rows_of(["abcd"], tokenizer, 4096, 64).shape == (1, 5)
    with pytest.raises(DataError, match="too short"):
        rows_of(["a"], tokenizer, 4096, 64)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="no text"):
        list(texts_of(tmp_path / "empty.txt", "heldout"))


def test_calibration_and_held_out_samples_share_no_text():
    first, second = (set(texts_of(None, part)) for part in ("calibration", "heldout"))
    assert first and second and not first & second
