"""Mixed precision: the budget holds to the byte, and bytes go where measured damage falls the most."""

import itertools
import math
import random
import re

import pytest
import torch

from puna.errors import ConfigError
from puna.model.folder import WEIGHTS
from puna.model.opening import open_checkpoint
from puna.quant import QuantConfig, load_quantised, quantise
from puna.quant.budget import CHOICES, Option, choose, lower_edge
from puna.quant.forms import Form, parse_budget
from puna.quant.layers import Stored
from puna.quant.quality import measure
from puna.quant.sample import rows_of, texts_of
from puna.quant.sensitivity import measure_damages
from puna.tokenizer.load import load_tokenizer


def made(folder, out, budget, **settings):
    config = QuantConfig(budget=budget, sensitivity_tokens=1024, quality_tokens=1024, **settings)
    return quantise(config, folder / "model", folder / "calibration.txt", folder / "heldout.txt", out=out)


def folder_bytes(path) -> int:
    return sum(p.stat().st_size for p in path.iterdir() if p.name != "manifest.json")


def random_options(rng: random.Random) -> dict[str, list[Option]]:
    return {
        f"m{i}": [Option(Form(4, j + 1), rng.randint(1, 60), rng.random()) for j in range(4)] for i in range(5)
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(30))
def test_the_choice_fits_and_is_within_one_step_of_the_best(seed):
    rng = random.Random(seed)
    options = random_options(rng)
    least = sum(min(o.bytes for o in found) for found in options.values())
    budget = least + rng.randint(0, 150)
    chosen = choose(options, budget)
    assert sum(c.option.bytes for c in chosen.values()) <= budget
    best = min(
        sum(o.damage for o in combination)
        for combination in itertools.product(*options.values())
        if sum(o.bytes for o in combination) <= budget
    )
    edges = [lower_edge(found) for found in options.values()]
    step = max((a.damage - b.damage for edge in edges for a, b in itertools.pairwise(edge)), default=0.0)
    assert best - 1e-12 <= sum(c.option.damage for c in chosen.values()) <= best + step
    if budget >= sum(edge[-1].bytes for edge in edges):
        assert sum(c.option.damage for c in chosen.values()) == pytest.approx(best)


def test_a_large_step_is_not_crowded_out_by_small_ones():
    options = {
        "embedding": [Option(Form(4, 128), 100, 1.0), Option(Form(8, 128), 200, 0.0)],  # 0.01 for each byte
        "small": [Option(Form(4, 128), 10, 0.2), Option(Form(8, 128), 20, 0.0)],  # 0.02
    }
    chosen = choose(options, 210)
    assert (chosen["embedding"].option.bytes, chosen["small"].option.bytes) == (200, 10)


def test_a_budget_that_is_too_small_says_the_smallest():
    options = random_options(random.Random(0))
    least = sum(min(o.bytes for o in found) for found in options.values())
    assert sum(c.option.bytes for c in choose(options, least).values()) == least
    with pytest.raises(ConfigError) as error:
        choose(options, least - 1)
    assert f"{least:,}" in error.value.hint


@pytest.mark.parametrize(
    ("text", "value"), [("4.8GB", (4.8e9, "bytes")), ("90 kb", (9e4, "bytes")), ("4.5bpw", (4.5, "bpw"))]
)
def test_budgets_are_read_as_written(text, value):
    assert parse_budget(text) == value
    for wrong in ("", "4", "GB", "-1GB", "4 bits", "nanGB", "0bpw"):
        if wrong:
            with pytest.raises(ConfigError):
                QuantConfig(budget=wrong)


def test_an_impossible_budget_is_refused_before_anything_is_measured(structured, tmp_path, monkeypatch):
    monkeypatch.setattr("puna.quant.sensitivity.measure_damages", None)
    for budget in ("1kB", "1bpw"):
        with pytest.raises(ConfigError, match="too small"):
            made(structured, tmp_path / budget, budget)
    assert not list(tmp_path.iterdir())


def test_the_folder_fits_its_budget_to_the_byte_and_more_room_loses_less(structured, tmp_path):
    with pytest.raises(ConfigError) as error:
        made(structured, tmp_path / "none", "000001.000kB")
    assert not (tmp_path / "none" / WEIGHTS).exists()
    least = int(re.search(r"smallest that this can be is ([\d,]+) bytes", error.value.hint)[1].replace(",", ""))
    found = []
    for budget in (least, least + 12_345):
        small = made(structured, tmp_path / str(budget), f"{budget / 1000:010.3f}kB")  # as long as the first
        assert budget - 5000 < folder_bytes(small.path) <= budget
        assert load_quantised(small.path).config.parameters == small.metrics["parameters"]
        found.append((small.metrics["predicted_kl"], small.metrics["quality"]["kl"]["value"]))
    assert found[0][0] > found[1][0] and found[0][1] > found[1][1]


def test_bits_per_weight_are_kept_and_the_mix_beats_a_uniform_form_of_the_same_size(structured, tmp_path):
    settings = {"quality_tokens": 2048, "group_size": 32, "embedding_bits": 8}
    texts = (structured / "calibration.txt", structured / "heldout.txt")
    uniform = quantise(QuantConfig(**settings), structured / "model", *texts, out=tmp_path / "uniform")
    mixed = made(structured, tmp_path / "mixed", f"{uniform.metrics['bits_per_weight']}bpw")
    assert mixed.metrics["bits_per_weight"] <= uniform.metrics["bits_per_weight"]
    assert mixed.metrics["quality"]["kl"]["value"] < 0.5 * uniform.metrics["quality"]["kl"]["value"]


class OneChanged:
    """A reader with one matrix in another form."""

    def __init__(self, reader, name: str, form: Form):
        self.reader, self.name, self.form = reader, name, form

    def __call__(self, name: str) -> torch.Tensor:
        from puna.quant.sensitivity import _change

        weight = self.reader(name)
        return weight + _change(weight, self.form) if name == self.name else weight


def test_the_predicted_damage_of_a_matrix_is_what_quantising_it_alone_does(either):
    form = Form(4, 64)
    tokenizer = load_tokenizer(either / "model")
    tokens = rows_of(texts_of(either / "calibration.txt", "calibration"), tokenizer, 4096, 64)
    with open_checkpoint(either / "model") as opened:
        reader = Stored(opened.weights, opened.config)
        predicted = measure_damages(opened.config, reader, tokens, [form])
        names = [n for n, shape in opened.config.shapes().items() if len(shape) == 2]
        measured = {
            n: measure(opened.config, reader, OneChanged(reader, n, form), tokens[:32], 512)["kl"]["value"]
            for n in names
        }
    assert predicted.keys() == set(names)
    logs = torch.tensor([[math.log(predicted[n][form]), math.log(measured[n])] for n in names]).T
    assert torch.corrcoef(logs)[0, 1] > 0.9
    assert 0.6 < float((logs[0] - logs[1]).exp().median()) < 1.7


def test_every_choice_has_a_form_that_can_be_read_back():
    assert all(Form.parse(str(form)) == form for form in CHOICES)
    for wrong in ("", "4", "5/32", "4/0", "4/32/scale", "16/32", "8/x"):
        with pytest.raises(ConfigError):
            Form.parse(wrong)
