"""`benchmarks/parity.py` on every family, narrow: every format gives the model that was stored, and greedy tokens agree."""

import pytest

pytest.importorskip("transformers")

from families import RELEASED, Cut, settings
from parity import LIMIT, compared

from puna.model.sizes import SIZES


@pytest.mark.parametrize("name", RELEASED)
def test_every_format_gives_the_logits_and_greedy_tokens_of_transformers(name, tmp_path):
    found = compared(name, Cut(width=512, ffn=128), 32, tmp_path)
    assert len(found["largest logit difference"]) == 9
    assert max(found["largest logit difference"].values()) < LIMIT
    assert found["greedy"]["same"] == found["greedy"]["tokens"] == 32
    assert found["greedy"]["different tokens among them"] > 8  # no small circle, where anything would agree


@pytest.mark.parametrize("name", RELEASED)
def test_the_table_of_sizes_says_what_the_releases_say(name):
    family, ours = RELEASED[name], SIZES[name]
    theirs = settings(family, Cut(layers=family.layers, ffn=family.ffn))
    assert (ours.dim, ours.n_layers, ours.ffn_dim) == (theirs["hidden_size"], family.layers, family.ffn)
    assert (ours.n_heads, ours.n_kv_heads, ours.head_dim) == (family.heads, family.kv_heads, family.head_dim)
    assert (ours.vocab_size, ours.context, ours.tied) == (family.vocabulary, family.context, family.tied)
    assert (ours.rope_theta, ours.norm_eps) == (family.theta, family.eps)
    assert (ours.rope_scaling.factor if ours.rope_scaling else None) == family.stretch
