"""`load_tokenizer` takes what it is given for what it is."""

import json
import shutil

import pytest

from puna.errors import ArtifactError
from puna.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from puna.tokenizer.bpe import write_ranks
from puna.tokenizer.export import write_hugging_face


@pytest.fixture
def ranks(tokenizer, tmp_path):
    write_ranks(tmp_path / "tokenizer.model", tokenizer.ranks)
    return tmp_path


@pytest.fixture
def pieces(llama_model, tmp_path):
    shutil.copy(llama_model, tmp_path / "tokenizer.model")
    return tmp_path


def test_a_folder_with_ranks(ranks, tokenizer):
    loaded = load_tokenizer(ranks)
    assert isinstance(loaded, Tokenizer)
    assert loaded.ranks == tokenizer.ranks
    assert load_tokenizer(str(ranks / "tokenizer.model")).ranks == tokenizer.ranks


def test_a_folder_with_a_sentencepiece_model(pieces):
    assert isinstance(load_tokenizer(pieces), SentencePieceTokenizer)
    (pieces / "tokenizer.model").rename(pieces / "any name")
    assert load_tokenizer(pieces / "any name").vocab_size == 700


def test_a_folder_with_nothing_but_the_json(tokenizer, tmp_path):
    write_hugging_face(tmp_path, tokenizer, context=512)
    assert load_tokenizer(tmp_path).ranks == tokenizer.ranks
    assert load_tokenizer(tmp_path / "tokenizer.json").ranks == tokenizer.ranks


def test_the_model_goes_before_the_json(ranks, tokenizer):
    (ranks / "tokenizer.json").write_text("this is not read")
    assert load_tokenizer(ranks).ranks == tokenizer.ranks


def test_a_folder_without_a_tokenizer_says_what_was_looked_for(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(
        ArtifactError, match=r"tokenizer\.model \(SentencePiece or ranks\), then tokenizer\.json; it has vocab\.json"
    ):
        load_tokenizer(tmp_path)
    with pytest.raises(ArtifactError, match=r"does not exist: looked for tokenizer\.model"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "placeholder of Git LFS(.|\n)*git lfs pull"),
        (b"", "begins with b''"),
        (b"PK\x03\x04", "begins with b'PK"),
        (b"\x80\x02}q\x00.", "begins with"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_shown(tmp_path, content, fault):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"tokenizer\.model(.|\n)*{fault}(.|\n)*"):
        load_tokenizer(tmp_path)


def test_tokens_added_beside_a_sentencepiece_model_are_names_without_text(pieces):
    (pieces / "added_tokens.json").write_text(json.dumps({"<pad>": 700, "<|im_end|>": 701}))
    decoder = {"1": {"content": "<s>"}, "700": {"content": "<pad>"}, "702": {"content": "<more>"}}
    (pieces / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    loaded = load_tokenizer(pieces)
    assert loaded.vocab_size == 703
    assert loaded.pad == 700
    assert loaded.special_names == ("<unk>", "<s>", "</s>", "<pad>", "<|im_end|>", "<more>")
    assert max(loaded.encode("<pad><|im_end|>")) < 700
    assert load_tokenizer(pieces / "tokenizer.model").vocab_size == 700  # a file alone is only itself


@pytest.mark.parametrize("added", [{"<pad>": 705}, {"<pad>": 5}, {"<pad>": -1}, {"<a>": 700, "<b>": 700}])
def test_added_tokens_that_do_not_follow_are_refused(pieces, added):
    (pieces / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(ArtifactError, match=r"has 700 pieces; '<.+>' was added as (.|\n)*hint: "):
        load_tokenizer(pieces)


@pytest.mark.parametrize("content", ["[]", "{", '{"<pad>": "700"}', '{"<pad>": 1.5}'])
def test_added_tokens_that_cannot_be_read_are_named(pieces, content):
    (pieces / "added_tokens.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"added_tokens\.json does not list added tokens(.|\n)*hint: "):
        load_tokenizer(pieces)
