"""Learning a vocabulary, and its Hugging Face form."""

import email
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from puna import artifacts
from puna.chat import ToolCall, assistant, system, tool_result, user
from puna.errors import ConfigError, DataError
from puna.tokenizer import Tokenizer
from puna.tokenizer.calls import CODE_INTERPRETER
from puna.tokenizer.dialog import render
from puna.tokenizer.train import TokenizerConfig, train_ranks, train_tokenizer

CONFIG = TokenizerConfig(vocab_size=700, context=512)


def documents_of(out, texts, heldout_every=6):
    @artifacts.stage("documents")
    def given_documents(config, *, out):
        rows = {
            "id": [f"d{i}" for i in range(len(texts))],
            "text": texts,
            "source": [f"source{i % 2}" for i in range(len(texts))],
            "split": ["heldout" if i % heldout_every == 5 else "train" for i in range(len(texts))],
        }
        pq.write_table(pa.table(rows), out / "documents.parquet")

    return given_documents({}, out=out)


@pytest.fixture(scope="module")
def texts(sentences):
    return sentences * 4


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("vocabulary")
    return train_tokenizer(CONFIG, documents_of(out / "documents", texts), out=out / "tokenizer")


@pytest.fixture(scope="module")
def learnt(trained) -> Tokenizer:
    return Tokenizer.load(trained.path)


@pytest.fixture(scope="module")
def peer(trained):
    return AutoTokenizer.from_pretrained(trained.path)


def test_the_vocabulary_has_the_size_asked_for(learnt):
    assert learnt.vocab_size == 700
    assert sorted(learnt.ranks.values()) == list(range(444))
    assert {t for t, r in learnt.ranks.items() if r < 256} == {bytes([b]) for b in range(256)}


def test_every_merge_makes_a_later_token_of_two_earlier_ones(learnt):
    for token, rank in learnt.ranks.items():
        earlier = (
            learnt.ranks.get(token[:i], rank) < rank > learnt.ranks.get(token[i:], rank) for i in range(1, len(token))
        )
        assert len(token) == 1 or any(earlier)


def test_the_same_text_gives_the_same_bytes(trained, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    again = train_tokenizer(CONFIG, documents_of(tmp_path / "documents", texts), out=tmp_path / "tokenizer")
    assert again.manifest["files"] == trained.manifest["files"]
    assert again.metrics == trained.metrics


def test_only_the_training_split_is_learnt(trained, texts, tmp_path):
    changed = [t if i % 6 != 5 else "entirely different words " * 50 for i, t in enumerate(texts)]
    other = train_tokenizer(CONFIG, documents_of(tmp_path / "documents", changed), out=tmp_path / "tokenizer")
    assert Tokenizer.load(other.path).ranks == Tokenizer.load(trained.path).ranks
    assert other.metrics["heldout_tokens"] != trained.metrics["heldout_tokens"]


def test_the_metrics_are_those_of_the_heldout_texts(trained, learnt, texts):
    heldout = [(t, f"source{i % 2}") for i, t in enumerate(texts) if i % 6 == 5]
    tokens = sum(len(learnt.encode(t)) for t, _ in heldout)
    assert trained.metrics["heldout_tokens"] == tokens
    assert trained.metrics["characters_per_token"] == sum(len(t) for t, _ in heldout) / tokens
    assert trained.metrics["bytes_per_token"] == sum(len(t.encode()) for t, _ in heldout) / tokens
    assert trained.metrics["bytes_per_token_by_source"].keys() == {s for _, s in heldout}
    assert 0 < trained.metrics["vocabulary_used"] < 1


def test_a_special_tokens_name_in_the_text_is_not_learnt_as_one(tmp_path):
    ranks = train_ranks(["<|eot_id|> <|eot_id|>"] * 50, 262)
    assert b"<|eot_id|>" not in ranks  # the signs and the letters are different pre-tokens


def test_a_sample_bounds_the_text_that_is_read(monkeypatch, sentences):
    from puna.tokenizer import train

    texts = [train.Text(f"d{i}", sentences[0] * 400, "s") for i in range(200)]
    whole = sum(len(t.text) for t in texts)
    kept = list(train._sample(texts, 0.3, seed=0))
    assert 0.2 * whole < sum(map(len, kept)) < 0.4 * whole
    assert kept == list(train._sample(texts, 0.3, seed=0))
    assert "".join(train._sample(texts, 1.5, seed=0)) == "".join(t.text for t in texts)


@pytest.mark.parametrize("texts", [["one small document"], ["a"], [""]])
def test_too_little_text_says_what_it_fills(texts, tmp_path):
    with pytest.raises(DataError, match=r"too few different words(.|\n)*set vocab_size to at most 5\d\d"):
        train_tokenizer(CONFIG, documents_of(tmp_path / "documents", texts), out=tmp_path / "tokenizer")


def test_a_vocabulary_of_bytes_alone_needs_no_text(tmp_path):
    config = TokenizerConfig(vocab_size=512)
    made = train_tokenizer(config, documents_of(tmp_path / "documents", [""]), out=tmp_path / "tokenizer")
    assert Tokenizer.load(made.path).encode("né") == [
        Tokenizer.load(made.path).ranks[bytes([b])] for b in "né".encode()
    ]


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(ConfigError, match="vocab_size=511"):
        TokenizerConfig(vocab_size=511)


EDGES = "ab Zé漢ж 'sS'llT19²٣Ⅷ!._-。，\"\n\r\t \u00a0\u3000\u2028\u200b\u0301|<>🦙\x85\x1cſ"


@given(st.one_of(st.text(st.sampled_from(EDGES), max_size=60), st.text(st.characters(exclude_categories=["Cs", "Cn"]))))
def test_transformers_gives_the_same_ids(learnt, peer, text):
    ids = learnt.encode(text)
    assert peer(text, add_special_tokens=False).input_ids == ids
    assert peer.decode(ids) == learnt.decode(ids) == text


def test_transformers_gives_the_same_ids_on_prose_and_code(learnt, peer, texts):
    for text in texts:
        assert peer(text).input_ids == [learnt.bos, *learnt.encode(text)]


def test_transformers_gives_the_same_ids_on_the_standard_library(learnt, peer):
    files = sorted(Path(os.__file__).parent.glob("*.py"))[::8] + sorted(Path(email.__file__).parent.glob("*.py"))[:4]
    sources = [path.read_text(encoding="utf-8") for path in files]
    compared = 0
    for source in sources:
        ids = learnt.encode(source)
        assert peer(source, add_special_tokens=False).input_ids == ids
        compared += len(ids)
    assert compared > 100_000


def test_transformers_knows_the_special_tokens(learnt, peer):
    assert len(peer) == learnt.vocab_size
    assert peer.convert_tokens_to_ids(list(learnt.special_names)) == [learnt.special(n) for n in learnt.special_names]
    assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id) == (learnt.bos, learnt.eot, learnt.pad)
    assert peer.model_max_length == 512
    assert peer("<|eot_id|>", add_special_tokens=False).input_ids == [learnt.eot]
    assert peer("<|eot_id|>", add_special_tokens=False, split_special_tokens=True).input_ids == learnt.encode(
        "<|eot_id|>"
    )


def test_the_json_is_readable_without_transformers(trained, learnt):
    from tokenizers import Tokenizer as Peer

    peer = Peer.from_file(str(trained.file("tokenizer.json")))
    assert peer.encode("The herd isn't far.", add_special_tokens=False).ids == learnt.encode("The herd isn't far.")
    assert json.loads(trained.file("tokenizer.json").read_text())["model"]["ignore_merges"] is True


def as_openai(message):
    """A message as the template takes it."""
    made = {"role": message.role, "content": message.content}
    if message.tool_calls:
        calls = [{"name": c.name, "arguments": c.arguments} for c in message.tool_calls]
        made["tool_calls"] = [{"type": "function", "function": c} for c in calls]
    return made


LOOK_UP = ToolCall(name="look_up", arguments={"q": "Größe \"x\" <b> & 'c'", "n": [1, 2.5, None, True]})
SEARCH = ToolCall(name="brave_search", arguments={"query": 'who said "hello"', "n": 3}, dialect="builtin")
BARE = ToolCall(name="wolfram_alpha", arguments={}, dialect="builtin")
CODE = ToolCall(name=CODE_INTERPRETER, arguments={"code": "if x:\n    print(1 < 2)\n"}, dialect="python")


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize(
    "dialog",
    [
        (user("Hi"),),
        (system("Be kind."), user(" Hi \n"), assistant("Hello. "), user("")),
        (user("q"), assistant("", LOOK_UP), tool_result('{"found": ["é"]}'), assistant("Done.")),
        (user("q"), assistant("", SEARCH), tool_result("r"), assistant("", CODE), tool_result("1")),
        (user("q"), assistant("I look.", LOOK_UP), assistant("I look.", SEARCH), assistant("I run.", CODE)),
        (user("q"), assistant("", LOOK_UP, LOOK_UP, SEARCH, LOOK_UP, BARE, CODE, LOOK_UP, LOOK_UP)),
    ],
    ids=["question", "turns", "json", "builtin and python", "text before", "many"],
)
def test_the_chat_template_gives_what_render_gives(learnt, peer, dialog, answer):
    ours = render(learnt, dialog, answer=answer).ids
    messages = [as_openai(m) for m in dialog]
    theirs = peer.apply_chat_template(messages, add_generation_prompt=answer, tokenize=True, return_dict=False)
    assert theirs == ours


def test_the_template_takes_the_role_tool_for_ipython(peer):
    def text(role):
        return peer.apply_chat_template([{"role": role, "content": "42"}], tokenize=False)

    assert text("tool") == text("ipython")
