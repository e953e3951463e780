"""What the documents point at exists: files, links between pages, pictures, commands and settings."""

import json
import re
from pathlib import Path

import pytest

from puna import cli, config
from puna.recipes.tiny import recipe

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/checkpoints.md",
        "docs/scaling.md",
        "docs/tour.md",
        "docs/training.md",
        "docs/engine.md",
        "docs/faults.md",
        "docs/parallel.md",
        "docs/reliability-simulation.md",
        "docs/planning.md",
        "docs/architecture.md",
    )
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page):
    text = page.read_text()
    found = re.findall(r"\]\(([^)#\s]+)\)|src=\"([^\"]+)\"", text)
    for target in {a or b for a, b in found}:
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES[:5], ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    for name in set(re.findall(r"`((?:puna|tests|docs|benchmarks)/[\w/.-]+)`", page.read_text())):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_shown_exist(page):
    verbs = {a for action in cli.parser()._actions if getattr(action, "choices", None) for a in action.choices}
    for verb in set(re.findall(r"(?:^ {4}|`)puna ([a-z]+)", page.read_text(), re.MULTILINE)):
        assert verb in verbs or page.name == "architecture.md", verb


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_are_shown_are_accepted(page):
    for name, value in re.findall(r"puna run tiny[^\n`]*? (\w+(?:\.\w+)+)=([\w.-]+)", page.read_text()):
        config.override(recipe(), [f"{name}={value}"])


def test_the_recipe_that_is_shown_is_one():
    from puna.train.settings import TrainConfig

    [shown] = re.findall(r"```json\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.DOTALL)
    run = config.from_json(TrainConfig, json.loads(shown))
    assert run.phases[-1].anneal and run.course.anneal == run.course.total - run.phases[-1].planned
