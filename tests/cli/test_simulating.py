"""`puna simulate` as a user runs it."""

import json

import pytest

from puna.cli import main

pytest.importorskip("simpy")
SMALL = ["simulate", "--gpus", "1024", "--days", "5"]


def simulated(capsys, *arguments) -> dict:
    assert main([*SMALL, "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def test_one_page_says_how_much_trains_what_it_cost_and_what_to_change(capsys):
    assert main([*SMALL, "--seeds", "3"]) == 0
    page = capsys.readouterr().out
    assert "1,024 GPUs on 128 nodes, 6 spare nodes; 5 days" in page
    assert "effective training time  9" in page
    assert "nine of ten runs" in page
    assert "faulty GPU" in page
    assert "change first" in page
    assert "the answer hangs on" in page
    assert max(len(line) for line in page.splitlines()) <= 160


def test_shares_of_the_time_add_up_and_the_json_is_strict(capsys):
    found = simulated(capsys, "--seeds", 2, "--quick", "--sweep", "checkpoint=50,500")
    assert sum(found["time"].values()) == pytest.approx(1)
    assert sum(row["share"] for row in found["causes"]) + found["time"]["training"] + found["time"]["warm days"] == (
        pytest.approx(1)
    )
    assert [point["value"] for point in found["sweeps"][0]["points"]] == [50, 500]
    assert "NaN" not in json.dumps(found, allow_nan=False)


def test_the_settings_that_are_printed_give_the_same_run_again(capsys, tmp_path):
    assert main([*SMALL, "--print-settings", "--preset", "llama3", "save.every_steps=70"]) == 0
    (tmp_path / "scenario.json").write_text(capsys.readouterr().out)
    first = simulated(capsys, "--seeds", 1, "--quick", "--preset", "llama3", "save.every_steps=70")
    assert main(["simulate", "--config", str(tmp_path / "scenario.json"), "--json", "--seeds", "1", "--quick"]) == 0
    assert json.loads(capsys.readouterr().out) == first


def test_the_page_with_plots_is_one_file_that_loads_nothing(capsys, tmp_path):
    out = tmp_path / "run.html"
    sweeps = ("checkpoint=10,100", "spares=0,6", "detection=10,100", "restart=60,600")
    assert main([*SMALL, "--seeds", "2", "--html", str(out), "--quick", "--sweep", *sweeps]) == 0
    page = out.read_text()
    assert page.count('class="plot"') == len(sweeps) + 2  # and progress, and stops
    assert "http" not in page.replace("http-equiv", "")
    assert "nan" not in page.replace("nance", "")


def test_policies_come_from_a_recipe(capsys, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"steps": 10, "resilience": {"save": {"every_steps": 33}, "check_every_steps": 5}}))
    found = simulated(capsys, "--seeds", 1, "--quick", "--policies", recipe)
    assert found["scenario"]["save"]["every_steps"] == 33


def test_a_table_of_failures_of_ones_own_is_used(capsys, tmp_path):
    table = tmp_path / "failures.json"
    table.write_text(json.dumps({"gpus": 1024, "hours": 24, "causes": [{"name": "flood", "count": 10}]}))
    found = simulated(capsys, "--seeds", 2, "--quick", "--failures", table)
    assert found["unexpected"]["mean"] == pytest.approx(50, abs=25)
    assert {"flood"} < {row["cause"] for row in found["causes"]}


def test_settings_that_do_not_go_together_are_pointed_out(capsys):
    found = simulated(
        capsys, "--seeds", 1, "--quick", "--spares", 3, "times.save_write_s=900", "detect.step_budget_s=2"
    )
    assert len(found["notes"]) == 3


def test_interrupted_it_shows_what_it_has(capsys, monkeypatch):
    from puna.planner import simulator

    simulate, seen = simulator.simulate, []

    def soon(scenario, seed):
        seen.append(seed)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return simulate(scenario, seed)

    monkeypatch.setattr(simulator, "simulate", soon)
    assert main([*SMALL, "--seeds", "9", "--quick"]) == 130
    said = capsys.readouterr()
    assert "2 simulated runs" in said.out
    assert "interrupted" in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "many"], "--gpus 'many' is not a whole number"),
        (["--gpus", "0"], "gpus=0 must be 1 to 1,000,000"),
        (["--days", "nan"], "days=nan must be"),
        (["--step-s", "0"], "step_s=0.0 must be positive"),
        (["--seeds", "0"], "--seeds 0 must be positive"),
        (["--sweep", "colour"], "there is no sweep 'colour'"),
        (["--sweep", "spares=-1"], "is not a number of 0 or more"),
        (["--html", "nowhere/at/all.html"], "there is no folder"),
        (["save.every_step=3"], "did you mean 'every_steps'?"),
        (["restarts_work=0"], "restarts_work=0.0 must be above 0"),
        (["--failures", "missing.json"], "missing.json is not a table of failures"),
        (["--gpus", "1000000", "failure_factor=40"], "something would fail every"),
    ],
)
def test_mistakes_are_answered_with_what_is_accepted(capsys, arguments, message):
    assert main(["simulate", "--quick", *arguments]) in (2, 4)
    said = capsys.readouterr()
    assert message in said.err
    assert "hint:" in said.err or "must" in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--spares", "100000000"], "0 to 1,000,000"),  # took all memory once
        (["--sweep", "spares=0.5"], "not a whole number"),
        (["--sweep", "checkpoint=1.5"], "not a whole number"),
        (["--html", "."], "is a folder"),
        (["--config", "deep.json"], "is not a scenario"),
        (["--failures", "deep.json"], "is not a table of failures"),
    ],
)
def test_odd_wishes_are_refused_with_a_sentence(capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    assert main([*SMALL, "--seeds", "1", "--quick", *arguments]) not in (0, None)
    out, err = capsys.readouterr()
    assert out == "" and said in err and "Traceback" not in err


def test_a_restart_that_never_ends_trains_nothing(capsys):
    """The closed form's exponential overflows there."""
    found = simulated(capsys, "--seeds", 1, "--quick", "times.start_s=1e12")
    assert found["time"]["training"] < 0.5
