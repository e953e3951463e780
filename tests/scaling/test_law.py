import json
import subprocess
import sys

import numpy as np
import pytest

from puna.errors import ArtifactError, ConfigError
from puna.scaling import public
from puna.scaling.law import Law
from puna.scaling.overtraining import along_ratios, cheapest, compared


@pytest.fixture(scope="module")
def law():
    return public.chinchilla()


def test_the_optimum_is_the_lowest_loss_of_its_compute(law):
    best = law.optimum(1e23)
    sizes = best.parameters.value * np.geomspace(0.5, 2, 201)
    losses = [law.loss(n, 1e23 / 6 / n).value for n in sizes]
    assert sizes[int(np.argmin(losses))] == pytest.approx(best.parameters.value, rel=0.01)
    assert best.loss.value == pytest.approx(min(losses), rel=1e-6)


def test_optimal_tokens_of_the_optimal_size_are_the_optimal_tokens(law):
    for kind in (law, public.llama3()):
        best = kind.optimum(1e22)
        assert kind.optimal_tokens(best.parameters.value).value == pytest.approx(best.tokens.value, rel=1e-6)


def test_tokens_for_a_loss_give_that_loss(law):
    tokens = law.tokens_for(8e9, 2.1)
    assert law.loss(8e9, tokens.value).value == pytest.approx(2.1)
    assert tokens.low < tokens.value < tokens.high
    assert law.tokens_for(8e9, 1.9).value == np.inf


def test_the_published_refit_gives_its_published_exponent_with_its_published_error(law):
    exponent = law.exponent()
    assert exponent.value == pytest.approx(0.513, abs=0.001)
    half = (exponent.high - exponent.low) / 2 / 1.645
    assert half == pytest.approx(0.020, abs=0.003)


def test_an_interval_widens_with_the_distance_from_the_runs(law):
    def width(n, d):
        e = law.loss(n, d)
        return np.log(e.high / e.low)

    inside, longer, far = width(1e9, 5e10), width(1e9, 5e12), width(1e9, 5e14)
    assert inside < longer < far
    told = along_ratios(law, 1e22, [20, 2000, 100_000])
    assert told[0][1].value < told[1][1].value < told[2][1].value


def test_a_law_survives_its_file_and_a_foreign_file_is_refused(law, tmp_path):
    (tmp_path / "law.json").write_text(json.dumps(law.to_json()))
    again = Law.load(tmp_path)
    assert again.loss(3e9, 1e12) == law.loss(3e9, 1e12)
    assert again.optimum(1e24) == law.optimum(1e24)
    for content in ("{}", "[1]", "no", json.dumps({**law.to_json(), "draws": [[1, 2]]})):
        (tmp_path / "law.json").write_text(content)
        with pytest.raises((ArtifactError, ConfigError)):
            Law.load(tmp_path)
    with pytest.raises(ArtifactError, match="cannot be read"):
        Law.load(tmp_path / "none")


def test_beyond_four_orders_of_magnitude_it_warns(law):
    assert not law.optimum(law.seen.flops * 9_000).warnings
    assert "orders of magnitude" in law.optimum(law.seen.flops * 20_000).warnings[0]


@pytest.mark.parametrize(("n", "d"), [(0, 1e9), (1e9, -1), (float("nan"), 1e9), (1e9, float("inf"))])
def test_what_is_no_size_is_refused(law, n, d):
    with pytest.raises(ConfigError):
        law.loss(n, d)


def test_asking_a_law_imports_neither_torch_nor_scipy():
    script = (
        "import sys; from puna.scaling import public, serving; law = public.chinchilla(); law.optimum(1e24)\n"
        "public.mmlu().at(law.loss(8e9, 15e12)); serving.cheapest(law, serving.Wish(loss=2.1, written_tokens=1e12))\n"
        "print([m for m in ('torch', 'scipy', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_rounded_constants_of_the_llama_3_text_give_605_billion():
    tokens = 0.29 * 3.8e25**0.53
    assert tokens == pytest.approx(10.46e12, rel=0.005)
    assert 3.8e25 / 6 / tokens == pytest.approx(605e9, rel=0.005)
    figure = public.llama3().optimum(3.8e25).parameters.value
    assert 380e9 < figure < 405e9


def test_the_public_accuracy_curve_is_near_the_models_it_was_fitted_to(law):
    for model in public.MODELS:
        told = public.mmlu(model.generation).at(law.loss(model.parameters, model.tokens))
        assert told.low < model.mmlu < told.high, model.name
        assert told.value == pytest.approx(model.mmlu, abs=0.06), model.name
    with pytest.raises(ConfigError, match="generation"):
        public.mmlu("4")


def test_over_training_eight_billion_parameters_costs_compute_and_buys_serving(law):
    """Meta's numbers: 8B is compute-optimal at about 200B tokens and was trained on 15T."""
    assert 130e9 < law.optimal_tokens(8.03e9).value < 260e9
    assert 130e9 < public.llama3().optimal_tokens(8.03e9).value < 260e9
    told = compared(law, 8.03e9, 15e12)
    assert told.ratio == pytest.approx(1868, abs=1)
    assert 60 < told.times_optimal < 120
    assert told.loss.value < told.loss_there.value  # bought
    assert told.same_flops.loss.value < told.loss.value  # cost
    assert told.extra_flops > 1
    assert told.served_cheaper > 2
    cheaper = cheapest(law, told.loss.value)
    assert cheaper.loss.value == pytest.approx(told.loss.value, rel=1e-6)
    # At the break-even both have cost the same.
    ours = told.flops + 2 * told.parameters * told.break_even_tokens
    theirs = cheaper.flops + 2 * cheaper.parameters.value * told.break_even_tokens
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert cheapest(law, 1.8) is None
