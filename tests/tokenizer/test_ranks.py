"""Llama 3's file of ranks at its true size: 128,000 ranks, 256 specials, and the published ids of known texts."""

import base64
import itertools

import pytest
import tiktoken

from puna.errors import ArtifactError
from puna.tokenizer import Tokenizer, load_tokenizer
from puna.tokenizer.bpe import read_ranks, write_ranks
from puna.tokenizer.export import byte_alphabet
from puna.tokenizer.pretokens import PATTERN

# The ids that Llama 3 has for these byte strings. Around them the vocabulary is filled with strings of no use.
KNOWN = {
    b"Hello": 9906, b" world": 1917, b"\n\n": 271, b"This": 2028, b" is": 374, b" a": 264, b" test": 1296,
    b" sentence": 11914, b"ot": 354, b"_id": 851, b"system": 9125, b"user": 882, b"assistant": 78191,
}  # fmt: skip


@pytest.fixture(scope="module")
def ranks():
    byte_order = list(byte_alphabet().values())  # Llama 3 gives the single bytes their ids in this order: "!" is 0
    tokens = {i: bytes([b]) for i, b in enumerate(byte_order)} | {id: token for token, id in KNOWN.items()}
    fillers = (bytes([0xFE, *rest]) for rest in itertools.product(range(256), repeat=3))
    return {tokens.get(i) or next(fillers): i for i in range(128_000)}


@pytest.fixture(scope="module")
def path(ranks, tmp_path_factory):
    path = tmp_path_factory.mktemp("llama3") / "tokenizer.model"
    write_ranks(path, ranks)
    return path


def test_the_layout_is_that_of_the_release(path):
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.vocab_size == 128_256
    ids = {
        "<|begin_of_text|>": 128_000,
        "<|end_of_text|>": 128_001,
        "<|reserved_special_token_0|>": 128_002,
        "<|reserved_special_token_1|>": 128_003,
        "<|finetune_right_pad_id|>": 128_004,
        "<|step_id|>": 128_005,
        "<|start_header_id|>": 128_006,
        "<|end_header_id|>": 128_007,
        "<|eom_id|>": 128_008,
        "<|eot_id|>": 128_009,
        "<|python_tag|>": 128_010,
        "<|image|>": 128_011,
        **{f"<|reserved_special_token_{n}|>": 128_010 + n for n in range(2, 246)},
    }
    assert {name: tokenizer.special(name) for name in tokenizer.special_names} == ids
    assert len(ids) == 256
    assert tokenizer.stop_ids == {128_001, 128_008, 128_009}


def test_known_texts_have_the_published_ids(path, ranks):
    tokenizer = load_tokenizer(path)
    vectors = {
        "Hello world": [9906, 1917],
        "\n\n": [271],
        "This is a test sentence.": [2028, 374, 264, 1296, 11914, 13],
        "system": [9125],
        "user": [882],
        "assistant": [78191],
        "<|eot_id|>": [27, 91, 68, 354, 851, 91, 29],
    }
    assert {text: tokenizer.encode(text) for text in vectors} == vectors
    peer = tiktoken.Encoding(name="peer", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert {text: peer.encode_ordinary(text) for text in vectors} == vectors


@pytest.mark.parametrize(
    ("damage", "line"),
    {
        "cut inside a rank": (lambda lines: [*lines[:299], lines[299][:-1]], 300),
        "cut inside a token": (lambda lines: [*lines[:299], lines[299][:3]], 300),
        "a rank twice": (lambda lines: [*lines[:299], lines[298], *lines[300:]], 300),
        "a rank of two tokens": (lambda lines: [*lines[:299], lines[299].split()[0] + b" 298", *lines[300:]], 300),
        "a token twice": (lambda lines: [*lines[:299], lines[5].split()[0] + b" 299", *lines[300:]], 300),
        "a gap": (lambda lines: lines[:299] + lines[300:], 300),
        "bad base64": (lambda lines: [*lines[:299], b"a*b= 299", *lines[300:]], 300),
        "base64 without its end": (lambda lines: [*lines[:299], b"YWI 299", *lines[300:]], 300),
        "a number that is none": (lambda lines: [*lines[:299], b"YWI= 2x9", *lines[300:]], 300),
        "a huge number": (lambda lines: [*lines[:299], b"YWI= " + b"9" * 6000, *lines[300:]], 300),
        "an empty line": (lambda lines: [*lines[:299], b"", *lines[299:]], 300),
        "three words": (lambda lines: [*lines[:299], lines[299] + b" x", *lines[300:]], 300),
    }.values(),
)
def test_a_wrong_line_is_named(path, tmp_path, damage, line):
    wrong = tmp_path / "tokenizer.model"
    wrong.write_bytes(b"\n".join(damage(path.read_bytes().splitlines()[:2000])))
    with pytest.raises(ArtifactError, match=rf"tokenizer\.model, line {line}: (.|\n)*hint: "):
        read_ranks(wrong)


def test_a_file_cut_between_lines_lacks_a_byte_or_is_shorter(path, tmp_path):
    """Nothing in the format says how many ranks there are; only the model's size can tell that some are missing."""
    short = tmp_path / "tokenizer.model"
    lines = path.read_bytes().splitlines(keepends=True)
    short.write_bytes(b"".join(lines[:200]))
    with pytest.raises(ArtifactError, match="has no rank for the byte"):
        read_ranks(short)
    short.write_bytes(b"".join(lines[:1000]))
    assert load_tokenizer(short).vocab_size == 1256


def test_a_file_too_large_to_be_a_vocabulary_is_not_read(tmp_path):
    huge = tmp_path / "tokenizer.model"
    with huge.open("wb") as file:
        file.write(base64.b64encode(b"a") + b" 0\n")
        file.truncate(1 << 35)
    with pytest.raises(ArtifactError, match="more than 67,108,864 bytes"):
        load_tokenizer(huge)
