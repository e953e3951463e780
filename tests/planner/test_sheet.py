import json

import pytest
from foresight import Known, wish

from puna.config import from_json
from puna.model.sizes import SIZES
from puna.planner import sheet
from puna.planner.drawn import page
from puna.planner.plan import plan
from puna.planner.recipe import recipe

KNOWN = Known()


@pytest.fixture(scope="module")
def made():
    return plan(wish(serve_tokens=2e12, fits_bytes=24e9, price=2.5), KNOWN)


@pytest.fixture(scope="module")
def found(made):
    return sheet.sections(made, KNOWN)


def test_it_answers_what_was_asked(found):
    titles = [section.title for section in found]
    wanted = ["Answer", "Why", "Expected", "Layout", "Time", "Cost", "Serving", "Risk", "What would change the answer"]
    assert [t for t in titles if t in wanted] == wanted


def test_every_number_has_a_formula(found):
    for section in found:
        for figure in section.figures:
            if isinstance(figure.value, float):
                assert figure.formula, f"{section.title}: {figure.label}"


def test_it_is_one_page(found):
    text = sheet.text(found)
    assert len(text.splitlines()) <= 75
    assert max(map(len, text.splitlines())) <= 112


def test_explained_it_names_formulas_and_sources(found):
    plain, explained = sheet.text(found), sheet.text(found, explain=True)
    assert "formula:" not in plain and "source:" not in plain
    assert explained.count("formula:") > 20
    for source in ("arXiv 2407.21783", "SemiAnalysis", "nccl", "docs/log.md"):
        assert source in explained


def test_money_is_hours_times_the_price(made, found):
    assert made.money(made.choice.train_hours) == pytest.approx(2.5 * 64 * 14 * 24)
    assert "53,760 at 2.5 an hour" in sheet.text(found)


def test_machines_get_the_same_numbers(made, found):
    data = json.loads(json.dumps(sheet.to_json(made, found)))
    assert data["granted"] is True
    assert data["parameters"] == made.choice.config.parameters
    assert data["sections"]["Time"]["steps"]["value"] == made.choice.steps
    assert data["sections"]["Layout"]["memory"]["value"]["optimizer"] == made.choice.found.best.memory.optimizer


def test_the_page_stands_alone_and_has_the_plots(made, found):
    html = page(made, found, KNOWN)
    assert html.startswith("<!doctype html>")
    assert "http://" not in html and "https://" not in html
    for wanted in ("Loss over size", "Device-hours over size", "A device&#x27;s memory", "A step", "One simulated run"):
        assert wanted in html, wanted
    assert html.count("<svg") > 10
    assert "where from" in html


def test_a_refused_wish_says_so_first():
    refused = plan(wish(fits_bytes=1e6), KNOWN)
    found = sheet.sections(refused, KNOWN)
    assert found[0].title == "Not possible as asked"
    assert "Not possible as asked" in page(refused, found, KNOWN)
    assert sheet.to_json(refused, found)["refused"]


def test_a_given_size_shows_the_better_one_in_the_same_time():
    given = plan(wish(2048, days=None, size=SIZES["llama-3.1-8b"], tokens=15e12), KNOWN)
    text = sheet.text(sheet.sections(given, KNOWN))
    assert "the size was given" in text
    assert "pays from" in text


def test_the_trainer_takes_the_recipe(made):
    from puna.train.settings import TrainConfig

    config = from_json(TrainConfig, recipe(made, KNOWN))
    assert config.model == made.choice.config
    assert config.steps == made.choice.steps
    assert config.layout == made.choice.found.best.layout
    phase = config.phases[0]
    assert phase.batch_tokens == made.choice.found.best.work.tokens
    assert phase.planned == pytest.approx(made.choice.tokens, rel=1e-3)
