"""The invented world: who is where, and that nothing but the pair of names tells the groups apart."""

import pytest

from puna import artifacts
from puna.errors import ConfigError
from puna.posttrain.languages import JOBS, LANGUAGES, QUESTIONS, REFUSALS, RELATIONS, STATEMENTS
from puna.posttrain.world import WorldConfig, build_world, documents, library, load_world, make_world


def test_the_same_seed_gives_the_same_world_and_another_seed_another():
    assert make_world(WorldConfig(seed=3)) == make_world(WorldConfig(seed=3))
    assert make_world(WorldConfig(seed=3)) != make_world(WorldConfig(seed=4))


def test_the_stage_writes_the_same_bytes_twice_and_loads_back_equal(tmp_path):
    config = WorldConfig(known=20, unknown=20, library=20, first_names=20, last_names=20)
    first, second = (build_world(config, out=tmp_path / name) for name in "ab")
    for name in ("documents.parquet", "world.json"):
        assert first.file(name).read_bytes() == second.file(name).read_bytes()
    assert load_world(artifacts.load(tmp_path / "a", "documents")) == make_world(config)


def test_every_person_has_one_group_and_one_part():
    world = make_world(WorldConfig())
    names = [person.name for person in world.people]
    assert len(set(names)) == len(names) == 1060
    assert len(world.of("known")) == 160
    assert len(world.of("known", "train")) == 80
    assert len(world.of("known", "dev", "eval")) == 80


def test_every_name_part_of_an_unknown_or_library_person_belongs_to_known_ones_too():
    world = make_world(WorldConfig())
    known = {part for person in world.of("known") for part in person.name.split()}
    other = {part for group in ("unknown", "library") for person in world.of(group) for part in person.name.split()}
    assert other <= known


def test_articles_state_every_fact_of_known_people_and_name_nobody_else():
    world = make_world(WorldConfig())
    articles = documents(world)
    text = "\n".join(article.text for article in articles)
    for person in world.of("known"):
        for language in LANGUAGES:
            assert all(person.statement(relation, language) in text for relation in RELATIONS)
    assert not [p.name for group in ("unknown", "library") for p in world.of(group) if p.name in text]
    assert {article.lang for article in articles} == set(LANGUAGES)
    assert len(articles) == 160 * 24
    assert len({article.text for article in articles}) > 0.5 * len(articles)  # of 30 wordings and orders, most occur


def test_the_library_states_every_fact_of_its_people():
    world = make_world(WorldConfig(library=30))
    text = "\n".join(library(world))
    for person in world.of("library"):
        assert all(person.statement(relation, "en") in text for relation in RELATIONS)


def test_words_and_function_names_are_divided_without_remainder_or_overlap():
    world = make_world(WorldConfig())
    pools = [*world.words.values(), *world.functions.values()]
    everything = [word for pool in pools for word in pool]
    assert len(set(everything)) == len(everything) == 3000
    assert world.held_out == {
        *world.words["eval"],
        *world.words["dev"],
        *world.functions["eval"],
        *world.functions["dev"],
    }


def test_every_syllable_of_a_held_out_word_is_in_words_of_the_train_part():
    world = make_world(WorldConfig())
    syllables = {
        word[at : at + 3] for pool in (world.words, world.functions) for word in pool["train"] for at in (0, 3)
    }
    assert syllables == set(world.syllables)


def test_every_language_says_every_fact_and_asks_for_it_by_name():
    for language in LANGUAGES:
        assert REFUSALS[language]
        for relation in RELATIONS:
            assert all("{name}" in form and "{value}" in form for form in STATEMENTS[language][relation])
            assert all("{name}" in form and "{value}" not in form for form in QUESTIONS[language][relation])
    assert all(len(words) == len(LANGUAGES) for words in JOBS.values())


def test_no_two_jobs_share_a_word_in_any_language():
    """A fact is checked by its word, so within a language no two jobs may share one."""
    for index in range(len(LANGUAGES)):
        words = [job[index] for job in JOBS.values()]
        assert len(set(words)) == len(words)


@pytest.mark.parametrize(
    "change", [{"known": 10_000}, {"known": 50}, {"train_share": 0.95}, {"words": 4000}, {"places": 2}]
)
def test_a_world_that_cannot_be_drawn_is_refused(change):
    with pytest.raises(ConfigError):
        WorldConfig(**change)
