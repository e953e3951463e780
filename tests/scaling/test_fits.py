"""Every fit finds the optimum of a surface whose truth is known, or says why it does not."""

import numpy as np
import pytest
from scaling_surfaces import BUDGETS, CHINCHILLA, LOPSIDED
from scipy.optimize import minimize

from puna.errors import DataError
from puna.scaling import envelope, extrapolation, isoflop, parametric
from puna.scaling.points import Points, count_warnings

FAR = 1e23


@pytest.mark.parametrize("truth", [CHINCHILLA, LOPSIDED], ids=["chinchilla", "lopsided"])
@pytest.mark.parametrize("width", [2, 8, 30])
@pytest.mark.parametrize("offset", [0.25, 1, 4])
def test_the_parametric_fit_finds_the_law_on_any_grid(truth, width, offset):
    law = parametric.fit(truth.points(width=width, offset=offset), draws=0)
    assert law.optimum(FAR).parameters.value == pytest.approx(truth.best(FAR), rel=0.02)
    assert law.loss(1e10, 1e12).value == pytest.approx(truth.loss(1e10, 1e12), rel=1e-3)


@pytest.mark.parametrize("truth", [CHINCHILLA, LOPSIDED], ids=["chinchilla", "lopsided"])
@pytest.mark.parametrize("width", [2, 4, 8, 30, 100])
@pytest.mark.parametrize("offset", [0.1, 0.33, 1, 3, 10])
def test_parabolas_find_the_optimum_or_say_why_not(truth, width, offset):
    try:
        found = isoflop.fit(truth.points(width=width, offset=offset), draws=20)
    except DataError as error:
        assert "outside the grid" in error.message or "no minimum" in error.message
        assert "both sides" in error.hint
        return
    wrong = abs(found.frontier.optimum(FAR).parameters.value / truth.best(FAR) - 1)
    assert wrong < 0.02 or found.warnings, f"{wrong:.1%} wrong and nothing said"


def test_a_good_grid_is_not_warned_of():
    found = isoflop.fit(CHINCHILLA.points(width=4, noise=0.002), draws=50)
    assert not found.warnings
    assert not count_warnings(CHINCHILLA.points())


def test_an_off_centre_grid_is_named():
    found = isoflop.fit(CHINCHILLA.points(width=8, offset=5), draws=20)
    assert any("off-centre" in w for w in found.warnings)


@pytest.mark.parametrize("truth", [CHINCHILLA, LOPSIDED], ids=["chinchilla", "lopsided"])
@pytest.mark.parametrize("sizes", [14, 28])
def test_the_envelope_finds_the_optimum_or_says_why_not(truth, sizes):
    found = envelope.fit(truth.curves(sizes=sizes), draws=20)
    wrong = abs(found.frontier.optimum(FAR).parameters.value / truth.best(FAR) - 1)
    assert wrong < 0.02 or found.warnings
    assert wrong < 0.04
    if sizes == 28:
        assert not found.warnings


def test_an_envelope_of_runs_with_a_schedule_is_warned_of():
    plain = CHINCHILLA.curves(sizes=28, noise=0.001)
    assert not envelope.fit(plain, draws=10).warnings
    annealed = []
    for curve in plain:
        late = np.clip((1 - curve.tokens / curve.tokens[-1]) / 0.2, 0, 1)  # the last fifth brings the loss down
        annealed.append(
            envelope.TrainingCurve(
                parameters=curve.parameters, tokens=curve.tokens, loss=curve.loss * (1 + 0.05 * late)
            )
        )
    assert any("learning rate" in w for w in envelope.fit(annealed, draws=10).warnings)


def _published_way(points, reduce, delta=1e-3):
    """Hoffmann's approach 3 as it was described: five constants at once, L-BFGS, from several starts, default tolerances."""
    n, d, y = np.log(points.parameters), np.log(points.tokens), np.log(points.loss)

    def objective(p):
        terms = np.stack([p[0] - p[3] * n, p[1] - p[4] * d, np.full(len(n), p[2])])
        r = np.logaddexp.reduce(terms, axis=0) - y
        size = np.abs(r)
        return reduce(np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta)))

    starts = [
        (a, b, e, x, z) for a in (5, 10) for b in (5, 10) for e in (0, 0.5) for x in (0.3, 0.6) for z in (0.3, 0.6)
    ]
    found = [minimize(objective, s, method="L-BFGS-B") for s in starts]
    best = min(found, key=lambda f: f.fun).x
    exponent = best[4] / (best[3] + best[4])
    factor = (best[3] * np.exp(best[0]) / (best[4] * np.exp(best[1]))) ** (1 / (best[3] + best[4]))
    return factor * (FAR / 6) ** exponent


def test_the_mean_of_huber_terms_stops_early_where_the_sum_and_variable_projection_do_not():
    points = CHINCHILLA.points(noise=0.002, seed=3, sizes=20, width=10)
    ours = parametric.fit(points, draws=0).optimum(FAR).parameters.value
    summed, averaged = _published_way(points, np.sum), _published_way(points, np.mean)
    truth = CHINCHILLA.best(FAR)
    assert ours == pytest.approx(truth, rel=0.05)
    assert abs(averaged / truth - 1) > 3 * abs(ours / truth - 1)
    assert abs(averaged / truth - 1) > 0.1, "the mean found the optimum: nothing is shown"
    assert abs(np.log(summed / ours)) < abs(np.log(averaged / ours))


def test_no_other_start_finds_a_lower_sum_than_variable_projection():
    points = CHINCHILLA.points(noise=0.004, seed=5)
    axes, target = parametric._Axes(points), np.log(points.loss)
    ours = parametric._polish(axes, parametric._start(axes, target)[None], target[None])
    cost = parametric._huber(axes.log_loss(ours) - target).sum()
    random = np.random.default_rng(0)
    starts = np.column_stack(
        [np.log(random.uniform(1, 2.5, 40)), random.normal(-1, 1, 40), random.uniform(0.1, 1, 40),
         random.normal(-1, 1, 40), random.uniform(0.1, 1, 40)]
    )  # fmt: skip
    others = parametric._polish(axes, starts, np.repeat(target[None], 40, axis=0), rounds=300)
    assert cost <= parametric._huber(axes.log_loss(others) - target).sum(axis=1).min() * (1 + 1e-6)


def test_runs_that_do_not_differ_give_no_law():
    points = CHINCHILLA.points(budgets=np.array([1e20]), sizes=12, width=1.05)
    with pytest.raises(DataError, match="hardly differ"):
        parametric.fit(points)
    with pytest.raises(DataError, match="at least 8 runs"):
        parametric.fit(points.where(np.arange(5)))


def test_parameters_counted_otherwise_than_flops_are_noticed():
    """Without embeddings in N, the FLOPs per parameter fall with size."""
    n = np.geomspace(1e6, 1e9, 8)
    body = n - 512 * (n / 12) ** 0.4
    points = Points.of(body, 20 * n, CHINCHILLA.loss(n, 20 * n), flops=6 * n * 20 * n, counts="body")
    assert not count_warnings(Points.of(n, 20 * n, CHINCHILLA.loss(n, 20 * n), flops=6 * n * 20 * n))
    small = Points.of(0.5 * n[:4], 20 * n[:4], points.loss[:4], flops=6 * n[:4] * 20 * n[:4])
    assert not count_warnings(small)  # a constant factor is a convention
    mixed = Points.of(np.concatenate([0.5 * n[:4], n[4:]]), 20 * n, points.loss, flops=6 * n * 20 * n)
    assert "do not count the same weights" in count_warnings(mixed)[0]


def test_drift_is_measured_where_the_formula_is_wrong_and_is_little_where_it_is_right():
    right = CHINCHILLA.points(noise=0.001, width=16)
    tokens_per_parameter = right.tokens / right.parameters
    bent = right.with_loss(right.loss * np.exp(0.02 * np.log10(tokens_per_parameter / 20) ** 2))
    assert extrapolation.measured_drift(bent) > 3 * extrapolation.measured_drift(right)
    law = extrapolation.fit(right.where(tokens_per_parameter < 300), draws=50)
    told = law.loss(1e8, 1e12)
    assert told.low < CHINCHILLA.loss(1e8, 1e12) < told.high


def test_hidden_sizes_are_predicted():
    errors = [h.error for h in extrapolation.by_size(CHINCHILLA.points(noise=0.001), 0.0)]
    assert len(errors) == len(CHINCHILLA.points())
    assert max(map(abs, errors)) < 0.01


def test_budgets_are_found_where_they_are_not_given():
    given = CHINCHILLA.points()
    found = Points.of(
        given.parameters,
        given.tokens,
        given.loss,
        flops=given.flops * np.random.default_rng(0).uniform(0.98, 1.02, len(given)),
    )
    assert len(np.unique(found.budgets)) == len(BUDGETS)


@pytest.mark.parametrize(
    ("text", "said"),
    [("a,b\n1,2\n", "no column 'parameters'"), ("parameters,tokens,loss\n1e6,1e8,x\n", "line 2"),
     ("parameters,tokens,loss\n1e6,1e8,nan\n", "loss of run 1"), ("", "no column"), ("parameters,tokens,loss\n", "no runs"), ("1e6,1e8,2\n", "no column"),
     ("parameters,tokens,loss,budget\n1e6,1e8,2,6e14\n", "a column 'budget'"),
     ("parameters,tokens,loss,loss\n1e6,1e8,2,3\n", "two columns 'loss'"),
     ("parameters,tokens,loss,flops\n1e6,1e8,2,\n2e6,1e8,2,1e15\n", "line 2: flops=''"),
     ("parameters,tokens,loss\n1e6,1e8,2\n1e6,1e8,2,1e15\n", "line 3: 4 values for 3 columns"),
     ("parameters,tokens,loss\n1e6,1e8\n", "line 2: 2 values for 3 columns"),
     ("parameters;tokens;loss\n1e6;1e8;2,5\n", "loss='2,5' is not a number"),
     ("parameters,tokens,loss\n8B,1e8,2\n", "parameters='8B'")],
)  # fmt: skip
def test_a_table_that_is_wrong_is_told_where(tmp_path, text, said):
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(DataError, match=said):
        Points.read(tmp_path / "runs.csv")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_is_read_as_spreadsheets_write_it(tmp_path, separator):
    """With a mark before the heading, another separator, capitals, spaces, empty lines, and columns of one's own."""
    rows = [
        ["Parameters", " Tokens", "LOSS", "flops", "note"],
        ["1e6", "1e8", "2.5", "", "first"],
        [],
        ["2e6", " 2e8", "2.25", "", ""],
    ]
    (tmp_path / "runs.csv").write_text("\ufeff" + "\n".join(separator.join(row) for row in rows), encoding="utf-8")
    points = Points.read(tmp_path / "runs.csv")
    assert points.parameters.tolist() == [1e6, 2e6] and points.loss.tolist() == [2.5, 2.25]
    assert points.flops.tolist() == [6e14, 24e14]
