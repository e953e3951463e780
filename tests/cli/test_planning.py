"""`puna plan` as a person meets it."""

import json

import pytest

from puna.cli import main


def run(capsys, *arguments):
    code = main(["plan", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_page_of_the_documentation(capsys, tmp_path):
    html, run_ = tmp_path / "plan.html", tmp_path / "run.json"
    code, out, err = run(
        capsys, "--gpus", "64xH100", "--days", "14", "--serve-tokens", "2e12", "--fits", "24GB", "--price", "2.5",
        "--html", str(html), "--recipe", str(run_),
    )  # fmt: skip
    assert code == 0
    for word in ("parameters", "MMLU accuracy", "runner-up", "device-hours", "interruptions", "half the time"):
        assert word in out
    assert html.read_text().startswith("<!doctype html>")
    assert json.loads(run_.read_text())["lm"]["rows"] > 0
    assert "puna pretrain" in err


def test_json_alone_goes_to_stdout(capsys):
    code, out, _ = run(capsys, "8b", "--tokens", "15e12", "--gpus", "2048xH100", "--json")
    data = json.loads(out)
    assert code == 0
    assert data["tokens"] == 15e12
    beyond = data["sections"]["Tokens beyond the optimum"]
    assert 130e9 < beyond["compute-optimal"]["value"] < 220e9


@pytest.mark.parametrize("unit", ["1.5e12", "1500B", "1.5T", "1,500,000,000,000"])
def test_numbers_as_people_write_them(capsys, unit):
    _, out, _ = run(capsys, "8b", "--tokens", unit, "--gpus", "1024xH100", "--json")
    assert json.loads(out)["tokens"] == 1.5e12


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "64xH100"], "--days"),
        (["--gpus", "64xH10", "--days", "3"], "did you mean H100"),
        (["--gpus", "many", "--days", "3"], "COUNTxNAME"),
        (["--days", "soon"], "is not a number"),
        (["--days", "3", "--fits", "small"], "24GB"),
        (["9q", "--days", "3"], "llama-3.1-8b"),
        (["--days", "3", "--law", "nosuch"], "puna scale"),
        (["--days", "3", "--law", "llama-3"], "no losses"),
        (["--days", "3", "--hardware", "/nowhere.toml"], "TOML"),
        (["--days", "3", "--vocabulary", "3"], "256"),
        (["--days", "3", "--price", "0"], "above 0"),
        (["--days", "3", "--price", "2,50"], "2.5"),  # read as 250 once
        (["--days", "3", "--law", "chinchila"], "chinchilla"),
        (["--days", "3", "--sequence-length", "1.5"], "whole number"),
        (["--days", "3", "--context", "0.5"], "whole number"),
        (["1e9", "--days", "3", "--sequence-length", "0"], "above 0"),
        (["--days", "3", "--html", "/nowhere/plan.html"], "no folder /nowhere"),
        (["--days", "3", "--html", "."], "is a folder"),
        (["--days", "3", "--recipe", "/nowhere/run.json"], "no folder /nowhere"),
        (["--calibrate", "/nowhere/here.toml"], "no folder /nowhere"),
    ],
)
def test_what_is_wrong_is_said_with_a_hint(capsys, arguments, said):
    code, out, err = run(capsys, *arguments)
    assert code == 2 or (code == 3 and "law" in err)
    assert out == ""
    assert "hint:" in err or said == "above 0"
    assert said in err and "Traceback" not in err


def test_an_impossible_wish_is_answered(capsys):
    code, out, _ = run(capsys, "405b", "--gpus", "8xH100", "--tokens", "1e9")
    assert code == 0
    assert out.startswith("NOT POSSIBLE AS ASKED")
    assert "406B parameters" in out


def test_a_law_of_ones_own(capsys, tmp_path):
    from puna.scaling import public

    path = tmp_path / "law.json"
    path.write_text(json.dumps(public.chinchilla(10).to_json() | {"name": "mine"}))
    _, out, _ = run(capsys, "--gpus", "8xH100", "--days", "3", "--law", str(path), "--json")
    expected = json.loads(out)["sections"]["Expected"]
    assert "accuracy" not in " ".join(expected)  # a benchmark was measured against another law's losses
    assert len(expected["loss"]["value"]) == 3


def test_with_a_start_the_end_is_a_date(capsys):
    _, out, _ = run(capsys, "8b", "--gpus", "64xH100", "--tokens", "1e9", "--start", "2027-01-31")
    assert "from 2027-01-31 to 2027-01-31" in out or "from 2027-01-31 to 2027-02" in out
    code, _, err = run(capsys, "--days", "3", "--start", "soon")
    assert code == 2 and "2027-01-31" in err


def test_what_depends_on_speed_has_an_interval(capsys):
    _, out, _ = run(capsys, "--gpus", "64xH100", "--days", "14", "--json")
    by_days = json.loads(out)
    assert by_days["intervals"]["tokens"][0] < by_days["tokens"] < by_days["intervals"]["tokens"][1]
    _, out, _ = run(capsys, "8b", "--gpus", "64xH100", "--tokens", "1e12", "--json")
    by_tokens = json.loads(out)
    assert by_tokens["intervals"]["days"][0] < by_tokens["days"] < by_tokens["intervals"]["days"][1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "15e12", "--days", "10", "--gpus", "8xH100"], "15T tokens take"),
        (["--days", "1e39", "--gpus", "64xH100"], "planned with a century"),
        (["1e14", "--days", "30", "--gpus", "64xH100"], "no Llama of 100T parameters"),
        (["1e5", "--days", "1", "--gpus", "1xH100"], "no Llama of 100,000 parameters"),
        (["--days", "3", "--gpus", "64xH100", "--sequence-length", "1e9"], "rows of 1,000,000,000 tokens are too long"),
    ],
)
def test_what_is_out_of_reach_is_said_before_the_nearest_plan(capsys, arguments, said):
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and out.startswith("NOT POSSIBLE AS ASKED")
    assert said in " ".join(out.split())
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0 and json.loads(out, parse_constant=pytest.fail)


def test_a_size_is_asked_for_by_all_its_weights(capsys):
    """1.3B once gave 1.56B: sizes are made by the weights in their matrices, without the input embedding."""
    _, out, _ = run(capsys, "1.3B", "--gpus", "8xH100", "--tokens", "1e9")
    assert out.strip().startswith("ANSWER") and "1.3B parameters" in out


def test_a_run_that_ends_after_the_calendar_is_planned(capsys):
    code, out, _ = run(capsys, "--gpus", "64xH100", "--days", "3", "--start", "9999-12-31")
    assert code == 0 and "after the year 9999" in out


def test_a_plan_that_cannot_be_written_leaves_nothing(tmp_path, capsys, monkeypatch):
    from pathlib import Path

    (tmp_path / "plan.html").write_text("before")

    def full(path, content):
        Path.open(path, "wb").write(content[:10])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    code, _, err = run(capsys, "--days", "1", "--html", str(tmp_path / "plan.html"))
    assert code != 0 and "No space left" in err and "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["plan.html"]
    assert (tmp_path / "plan.html").read_text() == "before"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--gpus", "64xH100", "--days", "14", "--serve-tokens", "2e12", "--fits", "24GB"],
        ["1.3B", "--gpus", "8xH200", "--tokens", "1T", "--precision", "fp8"],
        ["--days", "1e-9", "--vocabulary", "512", "--sequence-length", "128"],
    ],
    ids=["many", "fp8", "tiny"],
)
def test_the_trainer_takes_the_recipe_that_is_written_and_the_page_stands_alone(capsys, tmp_path, arguments):
    recipe, page = tmp_path / "run.json", tmp_path / "plan.html"
    assert run(capsys, *arguments, "--recipe", str(recipe), "--html", str(page))[0] == 0
    assert main(["pretrain", str(recipe), "--dry-run"]) == 0
    assert "parameters over" in capsys.readouterr().out
    text = page.read_text()
    assert not [mark for mark in ("<link", "<script src", "<img src", "@import", "url(http") if mark in text]
