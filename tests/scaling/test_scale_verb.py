"""`puna scale` as a person types it."""

import json

import numpy as np
import pytest
from scaling_surfaces import CHINCHILLA

from puna.artifacts import load
from puna.cli import main
from puna.cli.scaling import amount_of
from puna.errors import ConfigError
from puna.scaling.law import Law
from puna.scaling.stage import as_csv


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    points = CHINCHILLA.points(noise=0.001, budgets=np.array([1e19, 4e19, 1.6e20, 6.4e20, 4e21]), sizes=5, width=6)
    (folder / "runs.csv").write_text(as_csv(points))
    command = ["scale", "fit", str(folder / "runs.csv"), str(folder / "fit"), "--predict-above", "2e21"]
    assert main([*command, "--target", "3.8e25", "--draws", "60"]) == 0
    return folder / "fit"


def test_a_fit_is_an_artifact_that_predicts_what_it_has_not_seen(fitted):
    found = json.loads(load(fitted, "fit").file("fit.json").read_text())
    assert found["runs"] == {"fitted": 20, "predicted": 5}
    assert all(abs(e["error"]) < 0.01 for e in found["errors"]["predicted"])
    assert found["exponents"]["parametric"]["value"] == pytest.approx(CHINCHILLA.exponent, abs=0.02)
    best = found["optima"]["3.8e+25"]["parametric"]["parameters"]
    assert best["low"] < CHINCHILLA.best(3.8e25) < best["high"]
    assert any("orders of magnitude" in w for w in found["warnings"])
    assert Law.load(fitted).counts == "all"


def test_the_page_stands_alone_and_shows_every_section(fitted):
    page = (fitted / "report.html").read_text()
    for id in ("curves", "best", "predicted", "ratios", "warnings", "runs"):
        assert f'<section id="{id}"' in page
    assert "<svg" in page and "http" not in page.replace("http-equiv", "")
    assert page.count("<polyline") >= 6


def test_a_law_of_one_s_own_is_asked(fitted, capsys):
    assert main(["scale", "ask", "--law", str(fitted), "--flops", "1e22", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"]["value"] == pytest.approx(CHINCHILLA.best(1e22), rel=0.1)


def test_over_training_is_told_on_one_page(tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["scale", "ask", "--parameters", "8.03B", "--tokens", "15T", "--html", str(page)]) == 0
    said = capsys.readouterr().out
    for part in ("91 times", "5.5 times as much", "cheaper"):
        assert part in said and part in page.read_text()


def test_the_family_is_planned_under_a_cap(capsys):
    assert main(["scale", "plan", "--flops", "3e14", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert sum(r["flops"] for r in rows) == pytest.approx(3e14, rel=0.3)
    assert sum(r["predicted"] for r in rows) == 1
    assert all(r["parameters"]["matrices"] < r["parameters"]["all"] for r in rows)


def test_serving_is_told_and_the_impossible_answered(capsys):
    assert main(["scale", "serve", "--like", "8B,15T", "--read", "1T", "--write", "1T", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["best"]["parameters"] > 1e9 and len(told["by_precision"]) == 3
    assert main(["scale", "serve", "--loss", "1.95", "--fits", "8GB", "--batch", "1"]) == 2
    assert "losses from" in capsys.readouterr().err


def test_downstream_and_mixtures_are_read_from_files(tmp_path, capsys):
    flops = np.geomspace(1e19, 1e23, 9)
    nll = 1.9 - 0.25 * np.log10(flops / 1e18)
    lines = [f"{c},{n},{0.25 + 0.7 / (1 + np.exp(6 * (n - 1.1)))}" for c, n in zip(flops, nll)]
    (tmp_path / "arc.csv").write_text("flops,nll,accuracy\n" + "\n".join(lines) + "\n")
    assert main(["scale", "downstream", str(tmp_path / "arc.csv"), "--flops", "3.8e25", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["accuracy"]["3.8e+25"]["value"] == pytest.approx(0.95, abs=0.02)

    rows = [{"weights": {"a": w, "b": 1 - w}, "loss": 2 + (w - 0.3) ** 2} for w in np.linspace(0, 1, 9)]
    (tmp_path / "mix.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    assert main(["scale", "mix", str(tmp_path / "mix.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"]["a"] == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("ask --flops 1e24 --law nothing", "chinchilla, llama-3"),
        ("ask", "give --flops"),
        ("ask --flops huge", "write 3.8e25"),
        ("ask --parameters 8B --tokens 1T --law llama-3", "knows no losses"),
        ("fit none.csv out", "does not exist"),
        ("downstream none.csv --flops 1e24", "cannot be read"),
        ("mix none.jsonl", "cannot be read"),
        ("serve --like 8B", "write --like 8B,15T"),
        ("ask --flops 1e24 --parameters 8B", "one of them at a time"),
        ("ask --parameters 8B --tokens 1T --html .", "is a folder"),
        ("plan --flops 3e14 --budgets 1000", "20 are enough"),
        ("plan --flops 3e14 --factor 1e300", "at most 1,000"),
        ("run out --flops 1e9 --threads -1", "must not be negative"),
        ("run out --flops 1e9 --vocab 3", "vocab_size=3"),
    ],
)
def test_a_mistake_is_answered_with_the_next_step(command, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["scale", *command.split()]) not in (0, None)
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


@pytest.mark.parametrize(("text", "value"), [("8B", 8e9), ("15t", 15e12), ("3.8e25", 3.8e25), ("24GB", 24e9), ("7", 7)])
def test_amounts_are_read_as_people_write_them(text, value):
    assert amount_of(text) == value


@pytest.mark.parametrize("text", ["", "-1", "nan", "inf", "8Q", "1e999", "0"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(ConfigError):
        amount_of(text)


def test_a_fit_that_should_predict_everything_says_that_nothing_is_left(tmp_path, capsys):
    (tmp_path / "runs.csv").write_text(as_csv(CHINCHILLA.points()))
    assert main(["scale", "fit", str(tmp_path / "runs.csv"), str(tmp_path / "fit"), "--predict-above", "1e9"]) == 4
    assert "no runs are left to be fitted" in capsys.readouterr().err
