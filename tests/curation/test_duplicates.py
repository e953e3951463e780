import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.curation.duplicates import DuplicateConfig, ShingleStore, jaccard, near_duplicates, signatures, text_hash
from puna.curation.words import words_of

from .conftest import prose


def stored(path, texts, config=None):
    store = ShingleStore(path / "shingles.bin", config or DuplicateConfig())
    for text in texts:
        store.append(words_of(text))
    return store


def edited(text, words, seed):
    """`text` with some words replaced."""
    rng, parts = random.Random(seed), text.split(" ")
    for place in rng.sample(range(len(parts)), words):
        parts[place] = f"changed{seed}x{place}"
    return " ".join(parts)


@given(st.sets(st.integers(0, 40)), st.sets(st.integers(0, 40)))
def test_jaccard_is_the_share_of_common_elements(a, b):
    arrays = [np.array(sorted(s), dtype=np.uint64) for s in (a, b)]
    assert jaccard(*arrays) == (len(a & b) / len(a | b) if a | b else 1.0)


def test_near_copies_are_found_and_different_documents_stay(tmp_path):
    texts = [prose(seed, 60) for seed in range(50)]
    texts += [edited(texts[seed], 4, seed) for seed in range(20)]
    store = stored(tmp_path, texts)
    found, _ = near_duplicates(store, range(len(texts)))
    assert {d.index: d.kept for d in found} == {50 + seed: seed for seed in range(20)}
    assert all(d.jaccard == round(jaccard(store[d.index], store[d.kept]), 4) >= 0.8 for d in found)


def test_a_chain_does_not_remove_what_is_unlike_everything_that_stays(tmp_path):
    a = prose(1, 60)
    b = edited(a, 10, 1)
    c = edited(b, 10, 2)
    store = stored(tmp_path, [a, b, c], DuplicateConfig(min_jaccard=0.75))
    assert jaccard(store[0], store[1]) >= 0.75 and jaccard(store[1], store[2]) >= 0.75
    assert jaccard(store[0], store[2]) < 0.75
    found, _ = near_duplicates(store, range(3))
    assert [(d.index, d.kept) for d in found] == [(1, 0)]


def test_documents_of_one_template_are_candidates_and_stay(tmp_path):
    frame = prose(7, 45)
    texts = [f"{frame}\n{prose(seed, 30)}" for seed in range(100, 140)]
    found, counts = near_duplicates(stored(tmp_path, texts, DuplicateConfig(bands=60, rows=2)), range(len(texts)))
    assert counts["rejected_pairs"] > 0 and not found


def test_the_ranking_decides_who_stays(tmp_path):
    texts = [prose(1, 60), edited(prose(1, 60), 4, 1)]
    for ranking, (gone, stays) in (([0, 1], (1, 0)), ([1, 0], (0, 1))):
        found, _ = near_duplicates(stored(tmp_path, texts), ranking)
        assert [(d.index, d.kept) for d in found] == [(gone, stays)]


def test_groups_are_deduplicated_each_by_itself(tmp_path):
    texts = [prose(1, 60), edited(prose(1, 60), 4, 1)]
    assert not near_duplicates(stored(tmp_path, texts), [0, 1], groups=["en", "de"])[0]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60))
def test_agreement_of_signatures_estimates_jaccard(tmp_path_factory, seed, changes):
    text = prose(seed, 90)
    store = stored(tmp_path_factory.mktemp("s"), [text, edited(text, changes, seed)])
    rows = signatures(store)
    assert abs((rows[0] == rows[1]).mean() - jaccard(store[0], store[1])) < 0.2


def test_signatures_do_not_depend_on_the_batch(tmp_path):
    store = stored(tmp_path, [prose(seed) for seed in range(10)])
    assert np.array_equal(signatures(store), signatures(store, batch=3))


def test_white_space_at_the_ends_does_not_make_a_text_another():
    assert text_hash(" same text\n") == text_hash("same text") != text_hash("other text")
