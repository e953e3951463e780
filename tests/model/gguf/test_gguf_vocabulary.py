"""The vocabulary inside a file: ours there and back, Hugging Face's names, SentencePiece's lists, and damage."""

import dataclasses
from pathlib import Path

import pytest

from puna.errors import ArtifactError, ConfigError
from puna.model.gguf import GgufFile, write_gguf
from puna.model.gguf.format import Container, write_container
from puna.model.gguf.vocabulary import CONTROL, Vocabulary, from_tokenizer, read_vocabulary, to_tokenizer
from puna.model.llama import Llama
from puna.tokenizer.bpe import SPECIALS, Tokenizer

TEXTS = ["", "the than 山 é", " <|eot_id|> the", "\x00\x1b\t\r\n   a", "🦙" * 3]
HERE = Path("m.gguf")


def stored(vocabulary: Vocabulary, path: Path) -> Vocabulary:
    write_container(path, vocabulary.settings(), {})
    with Container(path) as file:
        return read_vocabulary(file)


def test_a_tokenizer_comes_back_from_a_models_file(tmp_path, config, tokenizer):
    write_gguf(Llama(config).init_weights(0), tokenizer, tmp_path / "m.gguf", "Q8_0")
    with GgufFile(tmp_path / "m.gguf") as file:
        vocabulary = file.vocabulary()
    assert len(vocabulary.tokens) == config.vocab_size
    assert vocabulary.ids == {"bos": 265, "eos": 274, "eot": 274, "eom": 273, "padding": 269}
    again = to_tokenizer(vocabulary, tmp_path / "m.gguf")
    assert again.ranks == tokenizer.ranks
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_a_peers_reading_of_the_vocabulary_is_the_same(tmp_path, config, tokenizer):
    """transformers builds its own tokenizer from the file's tokens and merges."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    write_gguf(Llama(config).init_weights(0), tokenizer, tmp_path / "m.gguf", "Q8_0")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("the than 山 é", "a the\n\nthan"):
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.convert_tokens_to_ids("<|eot_id|>") == tokenizer.eot


def test_special_tokens_that_others_call_reserved_are_accepted(tokenizer):
    vocabulary = from_tokenizer(tokenizer, 530)
    renamed = {"<|step_id|>": "<|reserved_special_token_902|>", "<|image|>": "<|reserved_special_token_903|>"}
    tokens = [renamed.get(token, token) for token in vocabulary.tokens]
    read = to_tokenizer(dataclasses.replace(vocabulary, tokens=tokens), HERE)
    assert read.eot == tokenizer.eot and read.special("<|reserved_special_token_903|>") == tokenizer.special(
        "<|image|>"
    )


def test_special_tokens_that_were_added_keep_names_and_ids(tokenizer):
    more = Tokenizer(tokenizer.ranks, (*SPECIALS, "<|thought|>"))
    read = to_tokenizer(from_tokenizer(more, more.vocab_size + 3), HERE)
    assert read.special_names == more.special_names and read.vocab_size == more.vocab_size


def test_a_sentencepiece_vocabulary_keeps_its_lists(tmp_path):
    vocabulary = Vocabulary(
        model="llama",
        tokens=["<unk>", "<s>", "</s>", "<0x00>", "▁the"],
        types=[2, 3, 3, 6, 1],
        scores=[0.0, 0.0, 0.0, 0.0, -1.5],
        merges=[],
        ids={"bos": 1, "eos": 2, "unknown": 0},
        add_bos=True,
        chat_template="{{ x }}",
    )
    assert stored(vocabulary, tmp_path / "m.gguf") == vocabulary
    with pytest.raises(ArtifactError, match="of the kind 'llama'"):
        to_tokenizer(vocabulary, HERE)


def test_a_file_without_a_vocabulary_says_so(tmp_path):
    write_container(tmp_path / "m.gguf", {"general.architecture": "llama"}, {})
    with Container(tmp_path / "m.gguf") as file, pytest.raises(ArtifactError, match="has no vocabulary"):
        read_vocabulary(file)


def test_vocabularies_that_would_encode_otherwise_are_refused(tokenizer):
    good = from_tokenizer(tokenizer, 530)
    tokens, types = list(good.tokens), list(good.types)
    eot = tokens.index("<|eot_id|>")
    cases = [
        ({"pre": "gpt-2"}, "cut in the way 'gpt-2'"),
        ({"tokens": ["a" if t == "th" else t for t in tokens]}, "not all different"),
        ({"tokens": ["t h" if t == "th" else t for t in tokens]}, "' ', which stands for no byte"),
        ({"merges": list(good.merges)[::-1]}, "merge 1 .* does not follow the order"),
        ({"merges": ["x y"]}, "merge 0 'x y' does not follow"),
        ({"tokens": tokens[:eot] + ["<|end|>"] + tokens[eot + 1 :]}, "special token 9 is '<|end|>'"),
        ({"tokens": tokens[:300], "types": types[:300]}, "is None"),
        ({"types": [*types[:-1], 1]}, "normal tokens follow the special ones"),
        ({"types": [CONTROL, *types[1:]]}, "lack one of the 256 bytes"),
    ]
    for change, fault in cases:
        with pytest.raises(ArtifactError, match=fault.replace("|", r"\|")):
            to_tokenizer(dataclasses.replace(good, **change), HERE)


def test_lists_that_do_not_fit_together_are_refused(tmp_path, tokenizer):
    good = from_tokenizer(tokenizer, 530)
    cases = [
        ({"types": list(good.types)[:-1]}, "530 tokens and 529"),
        ({"ids": {"bos": 530}}, "the bos token is 530"),
        ({"tokens": [1, 2]}, "tokens is not a list of the right type"),
    ]
    for change, fault in cases:
        with pytest.raises(ArtifactError, match=fault):
            stored(dataclasses.replace(good, **change), tmp_path / "m.gguf")


def test_a_vocabulary_of_another_size_is_refused(tmp_path, config, tokenizer):
    with pytest.raises(ConfigError, match="has 525 tokens, the model 530"):
        vocabulary = from_tokenizer(tokenizer, 525)
        write_gguf(Llama(config).init_weights(0), vocabulary, tmp_path / "m.gguf", "F32")
    assert len(SPECIALS) == 256
