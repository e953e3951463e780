"""Calibration: rounding that knows its inputs loses less, on text it has not seen; and goes on after a kill."""

import pytest
import torch
from structured import SHAPE

import puna.quant.calibrate
from puna.errors import DataError
from puna.model.checkpoint import save_model
from puna.model.llama import Llama, attend_with
from puna.quant import QuantConfig, load_quantised, quantise
from puna.quant.forms import Form
from puna.quant.gptq import calibrated, gptq, output_error
from puna.quant.groups import dequantise_matrix, quantise_matrix

FORMS = [Form(4, 32), Form(4, 64, True), Form(4, 24), Form(8, 64)]


def made(folder, out, **settings):
    config = QuantConfig(calibration_tokens=4096, quality_tokens=2048, sensitivity_tokens=1024, **settings)
    return quantise(config, folder / "model", folder / "calibration.txt", folder / "heldout.txt", out=out)


def correlated(rows: int = 24, columns: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and the second moments of inputs that are correlated and of unequal size."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    inputs = torch.randn(2000, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    inputs[:, ::12] *= 8
    return weight, inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_error_feedback_halves_the_error_of_the_product(form):
    weight, moments = correlated()
    nearest = quantise_matrix(weight, form.bits, form.group_size, offset=form.offset)
    before, after = (
        output_error(weight, dequantise_matrix(p), moments) for p in (nearest, gptq(weight, form, moments))
    )
    assert after < 0.5 * before
    packed, way = calibrated(weight, form, moments)
    assert output_error(weight, dequantise_matrix(packed), moments) <= after and way in ("gptq", "weighted", "nearest")


def test_error_feedback_leaves_what_a_row_puts_out_as_large_as_it_was():
    weight, hessian = correlated()
    again = dequantise_matrix(gptq(weight, Form(4, 32), hessian))
    products = weight @ hessian
    share = (products * again).sum(1) / (products * weight).sum(1)
    assert (share - 1).abs().max() < 5e-4


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_inputs_without_correlation_leave_nothing_to_correct(form):
    weight, _ = correlated()
    alike = torch.ones(weight.shape[1])  # every input's error counts the same, as under the identity
    nearest = quantise_matrix(weight, form.bits, form.group_size, offset=form.offset, importance=alike)
    fed_back = gptq(weight, form, torch.eye(weight.shape[1]))
    assert torch.equal(fed_back.codes, nearest.codes) and torch.equal(fed_back.scales, nearest.scales)


def test_rows_do_not_see_each_other(monkeypatch):
    weight, moments = correlated()
    whole = gptq(weight, Form(4, 32), moments)
    monkeypatch.setattr("puna.quant.gptq._WEIGHTS_AT_ONCE", 5 * weight.shape[1])
    assert torch.allclose(dequantise_matrix(gptq(weight, Form(4, 32), moments)), dequantise_matrix(whole), atol=1e-6)


def test_inputs_that_never_come_or_come_together_are_no_obstacle():
    weight, moments = correlated()
    moments[7], moments[:, 7] = 0, 0
    few = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1))
    for hessian in (moments, few.T @ few, torch.zeros_like(moments)):
        packed, _ = calibrated(weight, Form(4, 32), hessian)
        again = dequantise_matrix(packed)
        assert again.isfinite().all() and (again - weight).norm() < 0.5 * weight.norm()
    with pytest.raises(DataError, match="not finite"):
        calibrated(weight, Form(4, 32), moments * torch.inf)


@pytest.mark.parametrize("symmetric", [True, False], ids=["scales", "offsets"])
def test_calibrated_beats_nearest_on_text_that_it_has_not_seen(structured, tmp_path, symmetric):
    settings = {"group_size": 64, "symmetric": symmetric}
    nearest = made(structured, tmp_path / "nearest", **settings)
    better = made(structured, tmp_path / "better", calibrate=True, **settings)
    assert better.metrics["quality"]["kl"]["high"] < nearest.metrics["quality"]["kl"]["low"]
    assert better.metrics["bytes"] == nearest.metrics["bytes"]
    assert better.metrics["rounded"]["gptq"] >= 12 and nearest.metrics["rounded"].keys() == {"nearest"}


def test_a_killed_calibration_goes_on_where_it_was_and_ends_in_the_same_bytes(either, tmp_path, monkeypatch):
    whole = made(either, tmp_path / "whole", calibrate=True)
    write, done = puna.quant.calibrate.write_packed, []

    def killed(weight, packed, name, *rest):
        if len(done) == 9:  # in the middle of the second layer
            raise KeyboardInterrupt
        write(weight, packed, name, *rest)
        done.append(name)

    monkeypatch.setattr(puna.quant.calibrate, "write_packed", killed)
    with pytest.raises(KeyboardInterrupt):
        made(either, tmp_path / "part", calibrate=True)
    again = []
    monkeypatch.setattr(puna.quant.calibrate, "write_packed", lambda *a: (again.append(a[2]), write(*a)))
    resumed = made(either, tmp_path / "part", calibrate=True)
    assert again and not set(again) & set(done)
    for name in ("model.safetensors", "config.json"):
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert resumed.metrics == whole.metrics


@torch.no_grad()
def test_packed_and_expanded_agree_with_offsets_and_mixed_forms(structured, tmp_path):
    small = made(structured, tmp_path / "q", calibrate=True, budget="5.5bpw")
    tokens = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(40).expand(2, 40)
    packed, expanded = (
        load_quantised(small.path, expand=e)(tokens, positions, attend_with(None)) for e in (False, True)
    )
    assert torch.equal(packed, expanded)
    assert len({row["form"] for row in small.metrics["forms"].values()}) > 1


def test_calibration_without_a_tokenizer_says_what_is_missing(tmp_path):
    save_model(Llama(SHAPE).init_weights(0), None, tmp_path / "bare")
    for settings in ({"calibrate": True}, {"budget": "5bpw"}):
        with pytest.raises(DataError, match="no tokenizer"):
            quantise(QuantConfig(**settings), tmp_path / "bare", out=tmp_path / str(*settings))
    assert quantise(QuantConfig(), tmp_path / "bare", out=tmp_path / "plain").metrics["quality"] is None
