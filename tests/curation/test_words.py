import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.curation.repetition import duplicate_coverage, duplicate_shares, excess, top_ngram_bytes
from puna.curation.words import hash_words, ngrams, shingles, words_of

from .conftest import prose

ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=200)


def spelled(text):
    words = words_of(text)
    return [bytes(words.data[s:e]).decode() for s, e in zip(words.starts, words.ends)]


@given(ASCII)
def test_ascii_words_are_runs_of_letters_and_digits(text):
    assert spelled(text) == re.findall(r"\w+", text)


@given(st.text(max_size=120))
def test_any_text_is_cut_at_whole_characters_and_hashed(text):
    text = text.encode(errors="replace").decode()
    words = words_of(text)
    assert len("".join(spelled(text))) <= len(text)
    assert len(words.hashes) == len(words.starts) == len(words.ends)


@given(ASCII)
def test_equal_words_have_equal_hashes_and_different_ones_different(text):
    by_word = {}
    for word, value in zip(spelled(text), words_of(text).hashes.tolist()):
        assert by_word.setdefault(word.lower(), value) == value
    assert len(set(by_word.values())) == len(by_word)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("日本語テスト。はい", ["日", "本", "語", "テ", "ス", "ト", "は", "い"]),
        ("你好，世界", ["你", "好", "世", "界"]),
        ("ไทย", ["ไ", "ท", "ย"]),
        ("naïve — “quoted” слово", ["naïve", "quoted", "слово"]),
        ("한국어 문장", ["한국어", "문장"]),
    ],
)
def test_scripts_without_spaces_count_characters_as_words(text, expected):
    assert spelled(text) == expected


@given(st.lists(st.sampled_from("abcde"), max_size=30), st.integers(1, 6))
def test_ngram_hashes_are_equal_exactly_where_the_words_are(words, n):
    grams = ngrams(words_of(" ".join(words)).hashes, n).tolist()
    spelled_out = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    assert len(grams) == len(spelled_out)
    assert len(set(grams)) == len(set(spelled_out))
    assert len(set(zip(grams, spelled_out))) == len(set(grams))


def test_a_text_longer_than_the_table_of_powers_hashes_alike():
    long = "filler " * 30_000 + "the same words again"
    assert words_of(long).hashes[-4:].tolist() == words_of("the same words again").hashes.tolist()


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=40), st.integers(2, 5))
def test_duplicate_coverage_counts_what_a_plain_loop_counts(words, n):
    seen, covered = set(), set()
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        if gram in seen:
            covered.update(range(i, i + n))
        seen.add(gram)
    assert duplicate_coverage(words_of(" ".join(words)), n) == len(covered)


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=40), st.integers(1, 4))
def test_the_top_ngram_is_the_most_frequent(words, n):
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    most = max(map(grams.count, grams), default=0)
    assert top_ngram_bytes(words_of(" ".join(words)), n) == (most * n if most > 1 else 0)


def test_duplicate_shares_count_lines_and_their_characters():
    assert duplicate_shares(["aa", "b", "aa", "aa"]) == (0.5, 4 / 7)
    assert duplicate_shares([]) == (0.0, 0.0)


def test_repeating_text_breaks_a_limit_and_prose_does_not():
    assert excess(prose(1), words_of(prose(1))) == ""
    repeated = prose(1, 3) * 6
    assert excess(repeated, words_of(repeated))


def test_shingles_are_a_sorted_set_and_short_texts_have_one():
    grams = shingles(words_of("a b c a b c a b c").hashes, 3)
    assert len(grams) == 3 and np.all(grams[1:] > grams[:-1])
    assert len(shingles(words_of("one two").hashes, 5)) == 1
    assert len(shingles(words_of("").hashes, 5)) == 0


def test_words_are_counted_by_vocabulary_whatever_their_case():
    assert words_of("The cat and THE hat").count(hash_words(["the", "and", "dog"])).tolist() == [2, 1, 0]


def test_tokens_are_what_white_space_separates():
    assert words_of("It cost 48/2 = €24,\nright?").tokens() == (6, 4, 21)
