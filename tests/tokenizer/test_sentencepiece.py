"""Llama 1's and 2's tokenizer next to the SentencePiece library: the same ids, the same text, and no text that is a control."""

import io
import os
import random
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import ArtifactError, PunaError
from puna.kernels import pieces
from puna.tokenizer import load_tokenizer, sentencepiece
from puna.tokenizer.sentencepiece import SPACE, Kind, Piece, SentencePieceTokenizer, read_sentencepiece

spm = pytest.importorskip("sentencepiece")
EXAMPLES = int(os.environ.get("PUNA_EXAMPLES", "100"))  # strings for each property and each of the five models

VARIANTS = {
    "llama": {},
    "user-defined symbols": {"user_defined_symbols": ["[TOOL]", "[TOOL", "fo", "foo", f"{SPACE}{SPACE}", "ä漢", "<s"]},
    "pieces across words": {"split_by_whitespace": False, "vocab_size": 900},
    "no byte fallback": {"byte_fallback": False, "vocab_size": 500},
    "no space before": {"add_dummy_prefix": False},
}


@pytest.fixture(scope="module", params=[(name, way) for name in VARIANTS for way in ("Python", "C++")], ids=" in ".join)
def pair(request, learn_sentencepiece):
    """Our tokenizer, merging every text in one language, and the library's, from one file that the library learnt."""
    name, way = request.param
    if way == "C++" and not pieces.available():
        pytest.skip("the C++ kernels were not built")
    path = learn_sentencepiece(**VARIANTS[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentencepiece, "_LONG", 1 << 60 if way == "Python" else 0)
        yield load_tokenizer(path), spm.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="module")
def llama(llama_model):
    return read_sentencepiece(llama_model)


names = st.sampled_from(["<s>", "</s>", "<unk>", "<0x41>", "<0x0A>", "[TOOL]", "[TOOL", "<s", "foo", "fo", SPACE, " "])
EDGES = (
    "abteh Zé漢ä\0\x01\x1c\x7f\x85\t\n\r \u00a0\u3000\u2028\u200b\u200d\u0301\ufeff\ufffd▁<>s/_[]019🦙👩‍👩‍👧\U0010ffff"
)
tangled = st.text(st.sampled_from(EDGES), max_size=60)
words = st.lists(st.sampled_from(["the", "to be", "herd", " ", "  ", "a", "isn't", "草", "на", "\n"]), max_size=20).map(
    "".join
)
adversarial = st.one_of(
    st.text(max_size=40),
    tangled,
    words,
    st.lists(st.one_of(names, tangled, words), max_size=6).map("".join),
    st.tuples(st.sampled_from(" \t\na▁é"), st.integers(1, 200)).map(lambda run: run[0] * run[1]),
)


@settings(max_examples=EXAMPLES)
@given(adversarial)
def test_ids_and_text_are_the_librarys(pair, text):
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids)


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_any_ids_decode_to_the_librarys_text(pair, data):
    ours, theirs = pair
    any_id = st.integers(0, ours.vocab_size - 1)
    early = st.integers(0, min(270, ours.vocab_size - 1))  # controls and bytes, which text rarely gives
    ids = data.draw(st.lists(st.one_of(any_id, early), max_size=30))
    assert ours.decode(ids) == theirs.decode(ids)


@settings(max_examples=EXAMPLES)
@given(st.one_of(adversarial, st.lists(names, max_size=10).map("".join)))
def test_no_text_gives_a_control_id(pair, text):
    ours, _ = pair
    assert not {ours.bos, ours.eos} & set(ours.encode(text))


def test_the_specials_are_the_librarys(pair):
    ours, theirs = pair
    assert ours.vocab_size == theirs.vocab_size()
    assert (ours.bos, ours.eos, ours.unk) == (theirs.bos_id(), theirs.eos_id(), theirs.unk_id())
    assert ours.special_names == ("<unk>", "<s>", "</s>")
    assert ours.stop_ids == {theirs.eos_id()}
    assert [ours.special(n) for n in ours.special_names] == [0, 1, 2]
    with pytest.raises(PunaError, match="did you mean '</s>'"):
        ours.special("<//s>")


def test_documents_have_the_librarys_ids(pair):
    ours, theirs = pair
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in (io, random, struct, pytest, st)]
    assert ours.encode_batch(sources, threads=2) == theirs.encode(sources)
    assert sum(map(len, sources)) > 40_000


@pytest.mark.parametrize("length", [1, 2, 3, 1000, 30_001])
@pytest.mark.parametrize("unit", [" ", "\n", "ab", "é", "x "])
def test_long_runs_have_the_librarys_ids(pair, unit, length):
    ours, theirs = pair
    assert ours.encode(unit * length) == theirs.encode(unit * length)


@pytest.mark.parametrize("unit", [" ", "the", "q"])
def test_time_grows_as_the_text_does(llama, unit):
    def seconds(length):
        started = time.process_time()
        llama.encode(unit * (length // len(unit)))
        return time.process_time() - started

    # 8 times the text; were the time a square, it would be 64 times as long
    assert seconds(240_000) < 24 * min(seconds(30_000) for _ in range(2)) + 0.1


@given(st.text(st.characters(categories=["Cs", "Ll"]), max_size=20))
@settings(max_examples=100)
def test_surrogates_are_encoded_as_what_utf8_can_hold(pair, text):
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


@given(st.data())
@settings(max_examples=100)
def test_bytes_of_a_sequence_are_those_of_its_parts(llama, data):
    ids = data.draw(st.lists(st.integers(0, llama.vocab_size - 1), max_size=20))
    assert llama.decode_bytes(ids) == b"".join(llama.decode_bytes([i]) for i in ids)


def test_a_streamed_answer_is_the_text_and_a_space_before_it(llama):
    assert llama.decode_bytes(llama.encode("wool 🦙")) == " wool 🦙".encode()


@pytest.mark.parametrize("wrong", [-1, 700, 2**70])
def test_an_id_outside_the_vocabulary_is_named(llama, wrong):
    for decode in (llama.decode, llama.decode_bytes):
        with pytest.raises(PunaError, match=f"token id {wrong} "):
            decode([5, wrong])


def test_remembered_words_stay_bounded(llama, monkeypatch):
    monkeypatch.setattr("puna.tokenizer.sentencepiece._REMEMBERED_WORDS", 50)
    text = " ".join(f"{n:x}" for n in range(300))
    once = llama.encode(text)
    assert len(llama._remembered) <= 50
    assert llama.encode(text) == once


# Files that are no model, or not one of ours. A message is written by hand, so that it can be wrong.


def varint(n: int) -> bytes:
    out = b""
    while n > 0x7F:
        out, n = out + bytes([n & 0x7F | 0x80]), n >> 7
    return out + bytes([n])


def field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def piece(text: str | bytes, score: float = 0.0, kind: int = 1) -> bytes:
    text = text if isinstance(text, bytes) else text.encode()
    return field(1, field(1, text) + field(2, score) + field(3, kind))


SPECIALS = piece("<unk>", kind=2) + piece("<s>", kind=3) + piece("</s>", kind=3)
BYTES = b"".join(piece(f"<0x{b:02X}>", kind=6) for b in range(256))
LETTERS = piece("ab", -1.0) + piece("a", -2.0) + piece("b", -3.0) + piece(SPACE, -4.0)
TRAINER = field(2, field(3, 2) + field(35, 1))
NORMALIZER = field(3, field(1, b"identity") + field(3, 1) + field(4, 0) + field(5, 1))
WHOLE = SPECIALS + BYTES + LETTERS + TRAINER + NORMALIZER


def test_a_file_written_by_hand_is_read_by_both(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(WHOLE)
    assert load_tokenizer(path).encode("abba") == spm.SentencePieceProcessor(model_proto=WHOLE).encode("abba")
    assert load_tokenizer(path).encode("ab") == [262, 259]


@pytest.mark.parametrize(
    ("data", "fault"),
    {
        "empty": (b"", "0 pieces"),
        "a length beyond the end": (field(1, b"abc")[:-1], "claims 3 bytes, 2 are left"),
        "ten gigabytes in a few bytes": (b"\x0a" + varint(10 << 30) + b"x", "claims 10,737,418,240 bytes"),
        "a number without an end": (b"\x0a" + b"\xff" * 11, "has no end"),
        "field number zero": (b"\x02\x00", "field number 0"),
        "a group": (WHOLE + b"\x0b", "unknown wire type 3"),
        "a piece that is a number": (field(1, 7), r"field 1 \(pieces\) has wire type 0"),
        "a score that is text": (field(1, field(1, b"a") + field(2, b"-1.0")), "piece 0: field 2"),
        "a score that is none": (WHOLE + piece("c", float("nan")), "its score is nan"),
        "an unknown kind": (WHOLE + piece("c", kind=9), "its kind 9"),
        "a piece that is no UTF-8": (WHOLE + piece(b"\xff"), "piece 263: .*decode"),
        "a piece without text": (WHOLE + piece(""), "piece 263 is ''"),
        "a piece twice": (WHOLE + piece("ab"), "'ab', which was there before"),
        "two unknown pieces": (WHOLE + piece("<unk2>", kind=2), "2 unknown pieces"),
        "no bos": (piece("<unk>", kind=2) + BYTES + LETTERS + TRAINER + NORMALIZER, "no control piece '<s>'"),
        "a byte missing": (WHOLE.replace(piece("<0x41>", kind=6), b""), "'<0x41>' is missing"),
        "bytes without fallback": (SPECIALS + BYTES + field(2, field(3, 2)) + NORMALIZER, "without byte_fallback"),
        "an unused piece": (WHOLE + piece("c", kind=5), "UNUSED"),
        "a unigram model": (SPECIALS + LETTERS + field(2, field(3, 1)) + NORMALIZER, "'unigram', not 'bpe'"),
        "a character map": (WHOLE + field(3, field(2, b"map")), "changes characters"),
        "spaces removed": (WHOLE + field(3, field(4, 1)), "removes spaces"),
        "spaces kept": (WHOLE + field(3, field(5, 0)), "does not mark spaces"),
        "a space behind each word": (WHOLE + field(2, field(24, 1)), "does not mark spaces"),
    }.values(),
    ids=lambda v: "" if isinstance(v, bytes) else v,
)
def test_a_wrong_file_is_a_clear_error(tmp_path, data, fault):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"tokenizer\.model(.|\n)*{fault}(.|\n)*hint: "):
        read_sentencepiece(path)


def test_a_file_too_large_to_be_a_vocabulary_is_not_read(tmp_path):
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        file.truncate(1 << 34)  # sparse: takes no room
    with pytest.raises(ArtifactError, match="more than 67,108,864 bytes"):
        read_sentencepiece(path)


def test_an_absurd_number_of_fields_is_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\x0a\x00" * 525_000)
    with pytest.raises(ArtifactError, match="more than 524,388 fields"):
        read_sentencepiece(path)


def test_a_damaged_file_is_an_error_or_a_tokenizer(llama_model, tmp_path):
    """400 truncations and flips: nothing but `ArtifactError` is ever raised."""
    rng, whole, path = random.Random(0), llama_model.read_bytes(), tmp_path / "tokenizer.model"
    refused = 0
    for number in range(400):
        data = bytearray(whole)
        if number % 2:
            del data[rng.randrange(len(data)) :]
        else:
            data[rng.randrange(min(400, len(data)) if number % 4 else len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            tokenizer = read_sentencepiece(path)
            tokenizer.decode(tokenizer.encode("the herd 🦙"))
        except ArtifactError as error:
            assert error.hint
            refused += 1
    assert refused > 200


def test_a_vocabulary_from_elsewhere_may_hold_unused_pieces():
    """As those inside GGUF files do, up to the size of the model's output."""
    texts = ["<unk>", "<s>", "</s>", "a", SPACE, "[PAD]", "[PAD]", "aa"]
    kinds = [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL, Kind.NORMAL, Kind.NORMAL, Kind.UNUSED, Kind.UNUSED, Kind.NORMAL]
    tokenizer = SentencePieceTokenizer([Piece(t, -float(i), k) for i, (t, k) in enumerate(zip(texts, kinds))])
    assert tokenizer.encode("aaa[PAD]") == [4, 7, 3, 0]
    assert tokenizer.vocab_size == 8
