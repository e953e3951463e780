"""The index against a plain reading of BM25's formula, and on questions whose answers are known."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.errors import ConfigError
from puna.tools.search import SearchConfig, SearchIndex, cut, search_tool, trim, words_of

ANIMALS = [
    ("Llama", "The llama is a domesticated animal of the Andes. It carries loads. Its wool is soft."),
    ("Vicuña", "The vicuña lives wild in the high grassland. Its wool is the finest of all."),
    ("Quinoa", "Quinoa is a grain. It grows in poor soil."),
    ("Puna", "The puna is a high grassland. Herds of llamas graze there."),
]


def test_the_passage_that_answers_comes_first():
    index = SearchIndex(ANIMALS)
    assert index.search("finest wool")[0].title == "Vicuña"
    assert index.search("which grain grows in poor soil?")[0].title == "Quinoa"
    assert [hit.title for hit in index.search("high grassland", 3)] == ["Puna", "Vicuña"]


def test_a_title_counts_for_each_of_its_passages():
    text = "She was born in Lima. " + "Many years went by. " * 30 + "She died in Cusco."
    index = SearchIndex([("Ana Quispe", text), ("Rosa Mamani", text)], SearchConfig(passage_chars=60))
    assert index.search("Where did Ana Quispe die? She died in")[0].text.endswith("She died in Cusco.")
    assert {hit.title for hit in index.search("Ana", 100)} == {"Ana Quispe"}


def test_nothing_is_found_where_no_word_is_shared():
    assert SearchIndex(ANIMALS).search("submarine", 5) == []
    assert SearchIndex(ANIMALS).search("", 5) == []
    assert SearchIndex([]).search("llama", 5) == []
    assert SearchIndex([("", ""), ("", "  \n ")]).search("llama", 5) == []


WORDS = st.lists(st.sampled_from(["puna", "llama", "wool", "lima", "cusco", "grain"]), max_size=9).map(" ".join)


@given(st.lists(WORDS, max_size=8), WORDS)
def test_scores_are_those_of_the_formula(texts, query):
    index = SearchIndex([("", text) for text in texts])
    passages = [text.split() for text in texts if text]
    k1, b = 1.2, 0.75

    def score(passage):
        total = 0.0
        for word in sorted(set(query.split())):
            n, f = sum(word in p for p in passages), passage.count(word)
            idf = math.log(1 + (len(passages) - n + 0.5) / (n + 0.5))
            mean = sum(map(len, passages)) / len(passages)
            total += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * len(passage) / mean))
        return total

    expected = sorted((s for s in map(score, passages) if s > 0), reverse=True)
    found = [hit.score for hit in index.search(query, 100)]
    assert found == pytest.approx(expected, rel=1e-4)


def test_equal_scores_are_ordered_by_position_and_an_index_repeats():
    documents = [(f"d{i}", "llama wool") for i in range(50)]
    first, second = SearchIndex(documents), SearchIndex(documents)
    assert [hit.title for hit in first.search("wool", 5)] == ["d0", "d1", "d2", "d3", "d4"]
    assert np.array_equal(first.weights, second.weights)


@given(st.text(alphabet="ab .!?\nñ草", max_size=300), st.integers(min_value=20, max_value=60))
def test_passages_are_short_enough_and_hold_all_words(text, chars):
    passages = cut(text, chars)
    assert all(0 < len(passage) <= chars for passage in passages)
    assert "".join("".join(passages).split()) == "".join(text.split())


@given(st.text(max_size=100), st.integers(min_value=1, max_value=50))
def test_trimming_keeps_a_beginning(text, chars):
    piece = trim(text, chars)
    assert len(piece) <= chars and text.startswith(piece)


def test_trimming_ends_with_a_whole_word():
    assert trim("the high grassland", 10) == "the high"
    assert trim("the high grassland", 8) == "the high"
    assert trim("grassland", 5) == "grass"


def test_words_of_languages_without_spaces_are_signs():
    assert words_of("Größe STRASSE straße") == ["grösse", "strasse", "strasse"]
    assert words_of("草原 de la puna、高い") == ["草", "原", "de", "la", "puna", "高", "い"]
    assert SearchIndex([("", "羊驼住在高原"), ("", "藜麦是谷物")]).search("什么谷物？")[0].text == "藜麦是谷物"


def test_the_tool_gives_text_of_limited_length():
    tool = search_tool(SearchIndex(ANIMALS), passages=2, chars=60)
    text = tool.call({"query": "wool"})
    assert re.fullmatch(r"(Llama|Vicuña): .{20,}", text, re.DOTALL) and len(text) <= 60
    assert tool.call({"query": "submarine"}) == "error: nothing was found"
    assert tool.call({"q": "wool"}) == "error: argument 'query' is missing"


def test_a_passage_without_a_title_stands_alone():
    assert search_tool(SearchIndex([("", "Ana lives in Lima.")])).call({"query": "ana"}) == "Ana lives in Lima."


def test_settings_are_checked():
    for wrong in ({"passage_chars": 5}, {"k1": -1.0}, {"b": 1.5}):
        with pytest.raises(ConfigError):
            SearchConfig(**wrong)
