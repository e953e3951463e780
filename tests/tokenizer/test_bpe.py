"""Text to ids and back."""

import base64
import os
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from puna.errors import ArtifactError, PunaError
from puna.tokenizer import Tokenizer
from puna.tokenizer.bpe import MODEL_FILE, SPECIALS, write_ranks
from puna.tokenizer.pretokens import _SAFE_CUT, PATTERN, pieces

# Texts whose characters press on the pre-tokeniser: every class of character, and its edges.
EDGES = "ab Zé漢ж ſ'sS'llT19²٣Ⅷ!._-。，'\"\n\r\t \x1c\x85\u00a0\u3000\u2028\u200b\u0301<|eot_id|>🦙"
tangled = st.text(st.sampled_from(EDGES), max_size=60)
names = st.sampled_from([*SPECIALS[:12], "<|eot_id", "|>", "<|", "<|<|eot_id|>|>", "<|EOT_ID|>"])
hostile = st.lists(st.one_of(names, st.text(max_size=8)), max_size=8).map("".join)


@given(st.one_of(st.text(), tangled, hostile))
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.one_of(hostile, st.text(st.sampled_from("<|eot_id>")), st.text(st.characters(), max_size=20)))
def test_no_text_gives_a_special_id(tokenizer, text):
    assert all(i < len(tokenizer.ranks) for i in tokenizer.encode(text))


def test_specials_follow_the_ranks_in_llamas_order(tokenizer):
    assert tokenizer.vocab_size == 800 + 256
    assert len(set(tokenizer.special_names)) == 256
    offsets = {name: tokenizer.special(name) - 800 for name in tokenizer.special_names}
    assert [tokenizer.bos, tokenizer.eos, tokenizer.pad] == [800, 801, 804]
    assert [tokenizer.start_header, tokenizer.end_header] == [806, 807]
    assert [tokenizer.eom, tokenizer.eot, tokenizer.python_tag] == [808, 809, 810]
    assert offsets["<|step_id|>"] == 5 and offsets["<|image|>"] == 11
    assert offsets["<|reserved_special_token_2|>"] == 12 and offsets["<|reserved_special_token_245|>"] == 255
    assert tokenizer.stop_ids == {801, 808, 809}


def test_an_unknown_special_name_suggests_the_nearest(tokenizer):
    with pytest.raises(PunaError, match=r"did you mean '<\|eot_id\|>'"):
        tokenizer.special("<|eot|>")


def test_a_special_id_decodes_to_its_name(tokenizer):
    assert (
        tokenizer.decode([tokenizer.bos, *tokenizer.encode("wool"), tokenizer.eot]) == "<|begin_of_text|>wool<|eot_id|>"
    )


@pytest.mark.parametrize("wrong", [-1, 1056, 2**40])
def test_an_id_outside_the_vocabulary_is_named(tokenizer, wrong):
    with pytest.raises(PunaError, match=f"token id {wrong} "):
        tokenizer.decode([1, wrong])


def test_half_a_character_decodes_to_the_replacement(tokenizer):
    ids = tokenizer.encode("\U0001faad")  # not in the training text, so it takes several
    assert len(ids) > 1
    assert tokenizer.decode_bytes(ids[:1]) == "\U0001faad".encode()[: len(tokenizer.decode_bytes(ids[:1]))]
    assert tokenizer.decode(ids[:1]) == "\ufffd"


@given(st.text(st.characters(categories=["Cs", "Ll"]), max_size=20))
def test_surrogates_are_encoded_as_what_utf8_can_hold(tokenizer, text):
    decoded = tokenizer.decode(tokenizer.encode(text))
    assert decoded == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def test_a_surrogate_pair_is_its_character(tokenizer):
    assert tokenizer.encode("\ud83e\udd99") == tokenizer.encode("🦙")
    assert tokenizer.encode("a\udd99b") == tokenizer.encode("a\ufffdb")


@given(tangled)
def test_a_safe_cut_changes_no_id(tokenizer, text):
    whole = tokenizer.encode(text)
    for cut in _SAFE_CUT.finditer(text):
        assert tokenizer.encode(text[: cut.start()]) + tokenizer.encode(text[cut.start() :]) == whole


@given(tangled, st.integers(1, 12))
def test_pieces_are_bounded_and_make_up_the_text(text, limit):
    found = list(pieces(text, limit))
    assert "".join(found) == text
    assert all(len(piece) <= limit for piece in found)
    assert all(found) or not text


def test_a_long_text_is_cut_only_where_it_changes_nothing(tokenizer, sentences):
    for sentence in sentences:
        text = (sentence + " ") * 40
        ids = [i for piece in pieces(text, 120) for i in tokenizer.encode(piece)]
        assert len(list(pieces(text, 120))) > 4
        assert ids == tokenizer.encode(text)


@pytest.mark.parametrize("unit", [" ", "\n", "a", "7", "=", "漢"])
def test_a_run_that_breaks_the_engine_is_encoded(tokenizer, unit):
    text = unit * 1_100_000  # the engine's stack ends at a million
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_long_number_keeps_its_groups_of_three(tokenizer):
    text = "pi is 3." + "1415926535" * 90_000
    engine = tiktoken.Encoding(name="t", pat_str=PATTERN, mergeable_ranks=tokenizer.ranks, special_tokens={})
    assert tokenizer.encode(text) == engine.encode_ordinary(text)


def test_a_batch_equals_one_by_one(tokenizer, sentences):
    one_by_one = [tokenizer.encode(s) for s in sentences]
    assert tokenizer.encode_batch(sentences, threads=1) == one_by_one
    assert tokenizer.encode_batch(sentences, threads=3) == one_by_one


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    write_ranks(tmp_path / MODEL_FILE, tokenizer.ranks)
    assert Tokenizer.load(tmp_path).ranks == tokenizer.ranks


def _damage(lines: list[bytes], how: str) -> bytes:
    match how:
        case "cut inside a line":
            return b"\n".join(lines)[:-6]
        case "not base64":
            return b"\n".join([*lines[:300], b"\xff\xfe 300", *lines[301:]])
        case "a rank left out":
            return b"\n".join(lines[:300] + lines[301:])
        case "a token twice":
            return b"\n".join([*lines[:300], lines[5].split()[0] + b" 300", *lines[301:]])
        case "a byte missing":
            return b"\n".join(base64.b64encode(b"\x00" + bytes([i])) + b" %d" % i for i in range(256))
        case "another file":
            return os.urandom(2000)
        case "empty":
            return b""


@pytest.mark.parametrize(
    "how",
    ["cut inside a line", "not base64", "a rank left out", "a token twice", "a byte missing", "another file", "empty"],
)
def test_a_damaged_file_is_a_clear_error(tokenizer, tmp_path, how):
    path = tmp_path / MODEL_FILE
    write_ranks(path, tokenizer.ranks)
    path.write_bytes(_damage(path.read_bytes().splitlines(), how))
    with pytest.raises(ArtifactError, match=r"tokenizer\.model(.|\n)*hint: "):
        Tokenizer.load(tmp_path)


def test_a_directory_without_a_tokenizer_is_a_clear_error(tmp_path):
    with pytest.raises(ArtifactError, match=r"is not a tokenizer(.|\n)*hint: "):
        Tokenizer.load(tmp_path)
    with pytest.raises(ArtifactError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path / "absent")


LLAMA3 = os.environ.get("PUNA_LLAMA3_TOKENIZER", "")


@pytest.mark.skipif(
    not LLAMA3, reason="PUNA_LLAMA3_TOKENIZER does not name the directory of a released tokenizer.model"
)
def test_the_released_vocabulary_gives_the_published_ids():
    released = Tokenizer.load(Path(LLAMA3))
    assert released.vocab_size == 128_256
    assert released.encode("Hello world") == [9906, 1917]
    assert released.encode("\n\n") == [271]
    assert released.encode("This is a test sentence.") == [2028, 374, 264, 1296, 11914, 13]
    assert released.encode("<|eot_id|>") == [27, 91, 68, 354, 851, 91, 29]
    assert (released.bos, released.eot, released.python_tag) == (128_000, 128_009, 128_010)


def merged_by_rank(ranks: dict[bytes, int], word: bytes) -> list[int]:
    """The definition, as slowly as it reads: join the pair of lowest rank until none is left."""
    parts = [bytes([b]) for b in word]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[p] for p in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@given(st.one_of(tangled, st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40)))
def test_encoding_is_the_definition(tokenizer, text):
    words = regex.findall(PATTERN, text)
    assert "".join(words) == text
    assert tokenizer.encode(text) == [i for word in words for i in merged_by_rank(tokenizer.ranks, word.encode())]
