"""`tokenizer.json` next to the library that it was made for: the same ids, or a clear refusal."""

import copy
import json
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from puna import tokenizer as ours
from puna.errors import ArtifactError
from puna.tokenizer.bpe import SPECIALS
from puna.tokenizer.export import tokenizer_json, write_hugging_face
from puna.tokenizer.hugging_face import read_tokenizer_json
from puna.tokenizer.pretokens import PATTERN
from puna.tokenizer.sentencepiece import SPACE, Kind, read_sentencepiece

EXAMPLES = int(os.environ.get("PUNA_EXAMPLES", "100"))  # strings for each property and each file

EDGES = "abteh Zé漢ж'sS19²Ⅷ!._-\n\r\t\0\x1c\x7f\u00a0\u3000\u200b\u0301|<>/🦙▁👩‍👧"
words = st.sampled_from(
    ["the", "herd", " ", "  ", "isn't", "草", "на", "\n", "<s>", "</s>", "<|eot_id|>", "<0x41>", SPACE]
)
strings = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40),
    st.text(st.sampled_from(EDGES), max_size=60),
    st.lists(words, max_size=20).map("".join),
    st.tuples(st.sampled_from(" \na▁"), st.integers(1, 200)).map(lambda run: run[0] * run[1]),
)


def written(folder, data):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def both(path):
    """Ours, and the library's with its finding of specials in text switched off."""
    peer = Tokenizer.from_file(str(path))
    peer.encode_special_tokens = True
    return read_tokenizer_json(path), peer


def assert_same(pair, text):
    mine, peer = pair
    ids = mine.encode(text)
    assert ids == peer.encode(text, add_special_tokens=False).ids
    assert mine.decode(ids) == peer.decode(ids)


# Llama 3: byte-level


@pytest.fixture(scope="module")
def byte_level(tokenizer):
    return tokenizer_json(tokenizer)


@pytest.fixture(scope="module", params=["pairs", "strings"])
def llama3(request, byte_level, tmp_path_factory):
    data = copy.deepcopy(byte_level)
    if request.param == "strings":
        data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    return both(written(tmp_path_factory.mktemp("llama3"), data))


@settings(max_examples=EXAMPLES)
@given(strings)
def test_a_byte_level_file_gives_the_librarys_ids(llama3, text):
    assert_same(llama3, text)


def test_reading_undoes_writing(tokenizer, tmp_path):
    write_hugging_face(tmp_path, tokenizer, context=512)
    read = read_tokenizer_json(tmp_path / "tokenizer.json")
    assert read.ranks == tokenizer.ranks
    assert read.special_names == tokenizer.special_names
    assert read.stop_ids == tokenizer.stop_ids


def test_the_layout_of_the_library_keeps_its_names_and_llamas_ids(byte_level, tmp_path):
    """Hugging Face calls the places 5 and 11 reserved, and numbers the others on."""
    data, base = copy.deepcopy(byte_level), 800
    named = {0: SPECIALS[0], 1: SPECIALS[1], 4: SPECIALS[4], 6: SPECIALS[6], 7: SPECIALS[7], 8: SPECIALS[8]}
    named |= {9: SPECIALS[9], 10: SPECIALS[10]}
    rest = (f"<|reserved_special_token_{n}|>" for n in range(248))
    for place, token in enumerate(data["added_tokens"]):
        token["content"] = named.get(place) or next(rest)
    mine, peer = both(written(tmp_path, data))
    assert mine.special_names[5] == "<|reserved_special_token_2|>"
    assert mine.special_names[255] == "<|reserved_special_token_247|>"
    assert all(peer.token_to_id(name) == mine.special(name) for name in mine.special_names)
    assert (mine.bos, mine.eos, mine.pad, mine.start_header) == (base, base + 1, base + 4, base + 6)
    assert mine.stop_ids == {base + 1, base + 8, base + 9}
    with pytest.raises(ours.bpe.PunaError, match="is not a special token"):
        mine.special("<|step_id|>")


def test_llama_3_0s_reserved_places_are_what_3_1_made_of_them(byte_level, tmp_path):
    data = copy.deepcopy(byte_level)
    for number, place in enumerate([4, 5, 8, 10]):
        data["added_tokens"][place]["content"] = f"<|reserved_special_token_{900 + number}|>"
    mine = read_tokenizer_json(written(tmp_path, data))
    assert (mine.pad, mine.eom, mine.python_tag, mine.eot) == (804, 808, 810, 809)


def test_more_specials_may_follow(byte_level, tmp_path):
    data = copy.deepcopy(byte_level)
    data["added_tokens"].append({**data["added_tokens"][-1], "id": 800 + 256, "content": "<|im_start|>"})
    mine = read_tokenizer_json(written(tmp_path, data))
    assert mine.vocab_size == 800 + 257
    assert mine.special("<|im_start|>") == 1056
    assert mine.decode([1056]) == "<|im_start|>"


def test_without_ignore_merges_the_ids_are_still_the_librarys(byte_level, tmp_path):
    data = copy.deepcopy(byte_level)
    data["model"]["ignore_merges"] = False
    pair = both(written(tmp_path, data))
    for text in ["The herd isn't far.", "  \n\n草", "wool" * 50]:
        assert_same(pair, text)


def test_a_token_that_no_merges_reach_needs_ignore_merges(byte_level, tmp_path):
    data = copy.deepcopy(byte_level)
    vocab = data["model"]["vocab"]
    token = next(t for t, _ in sorted(vocab.items(), key=lambda i: i[1])[256:] if len(t) == 2)  # two bytes: one merge
    loses = {token: "ÿþýüû"}
    data["model"]["vocab"] = {loses.get(t, t): i for t, i in vocab.items()}
    data["model"]["merges"] = [m for m in data["model"]["merges"] if token not in m and m[0] + m[1] != token]
    path = written(tmp_path, data)
    assert (
        read_tokenizer_json(path).encode("wool")
        == Tokenizer.from_file(str(path)).encode("wool", add_special_tokens=False).ids
    )
    data["model"]["ignore_merges"] = False
    with pytest.raises(ArtifactError, match="ignore_merges is false, and no joins lead to the token"):
        read_tokenizer_json(written(tmp_path, data))


def test_a_vocabulary_with_one_split_for_each_token_is_refused(sentences, byte_level, tmp_path):
    """What the library's own trainer writes: its ids differ from joining by rank where a token has a second split."""
    model = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        sentences * 3, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    data = json.loads(model.to_str())
    data["added_tokens"] = [{**t, "id": 600 + i} for i, t in enumerate(byte_level["added_tokens"])]
    with pytest.raises(ArtifactError, match=r"lists 344 merges, but its tokens split into two tokens in \d+ ways"):
        read_tokenizer_json(written(tmp_path, data))


# Llama 1 and 2: pieces


@pytest.fixture(scope="module")
def metaspace(llama_model, tmp_path_factory):
    """What `transformers` makes of a Llama 2 vocabulary and writes."""
    pieces = read_sentencepiece(llama_model).pieces
    vocab = {piece.text: id for id, piece in enumerate(pieces)}
    scores = {piece.text: piece.score for piece in pieces if piece.kind == Kind.NORMAL}
    out = tmp_path_factory.mktemp("transformers")
    LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores)).save_pretrained(out)
    return json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))


def with_normalizer(data):
    """The older form, as the released Llama 2 has it."""
    data = copy.deepcopy(data)
    steps = [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    shell = Tokenizer(models.BPE())
    shell.normalizer = normalizers.Sequence(steps)
    data["normalizer"] = json.loads(shell.to_str())["normalizer"]
    data["pre_tokenizer"] = None
    data["model"]["unk_token"] = "<unk>"
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    return data


def without_space(data):
    data = copy.deepcopy(data)
    data["pre_tokenizer"]["prepend_scheme"] = "never"
    data["decoder"]["decoders"].pop()
    return data


def learnt_by_the_library(_):
    """One merge for each token, in an order that no scores give, and unknowns in place of bytes."""
    model = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    text = ["the herd is to be here and there, the other animals at the farm " * 3, "abab aab aaa baba bbb aabb " * 5]
    specials = [AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")]
    model.train_from_iterator(text, trainers.BpeTrainer(vocab_size=120, special_tokens=specials, show_progress=False))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(steps)
    return json.loads(model.to_str())


@pytest.fixture(scope="module", params=[copy.deepcopy, with_normalizer, without_space, learnt_by_the_library])
def llama2(request, metaspace, tmp_path_factory):
    return both(written(tmp_path_factory.mktemp("llama2"), request.param(metaspace)))


@settings(max_examples=EXAMPLES)
@given(strings)
def test_a_file_of_pieces_gives_the_librarys_ids(llama2, text):
    mine, peer = llama2
    ids = mine.encode(text)
    assert ids == peer.encode(text, add_special_tokens=False).ids
    if mine.unk not in ids:
        assert mine.decode(ids) == peer.decode(ids)


@settings(max_examples=EXAMPLES)
@given(strings)
def test_no_text_gives_a_special_id(llama2, text):
    assert not {llama2[0].bos, llama2[0].eos} & set(llama2[0].encode(text))


@pytest.fixture(scope="module")
def three_forms(llama_model, metaspace, tmp_path_factory):
    path = written(tmp_path_factory.mktemp("older"), with_normalizer(metaspace))
    return read_sentencepiece(llama_model), *both(path)


@settings(max_examples=EXAMPLES)
@given(strings)
def test_the_older_json_of_a_llama_2_vocabulary_gives_the_ids_of_its_model(three_forms, text):
    model, mine, peer = three_forms
    assert model.encode(text) == mine.encode(text) == peer.encode(text, add_special_tokens=False).ids


def test_a_merge_that_spells_a_special_token_is_left_out(metaspace, tmp_path):
    data = copy.deepcopy(metaspace)
    vocab = data["model"]["vocab"]
    for text in ("<", "s>"):
        vocab.setdefault(text, len(vocab))
    data["model"]["merges"].append(["<", "s>"])
    mine = read_tokenizer_json(written(tmp_path, data))
    assert mine.bos not in mine.encode("<s>")


# What is not ours, and what is damaged


def change(data, path, value):
    data = copy.deepcopy(data)
    inside = data
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return data


BYTE_LEVEL_FAULTS = {
    "a unigram model": (["model", "type"], "Unigram", "model.type is 'Unigram'"),
    "no model": (["model"], None, "model.type is None"),
    "dropout": (["model", "dropout"], 0.1, "model.dropout is 0.1"),
    "a prefix": (["model", "continuing_subword_prefix"], "##", "continuing_subword_prefix"),
    "a normalizer": (["normalizer"], {"type": "NFC"}, "has a normalizer"),
    "another pattern": (["pre_tokenizer", "pretokenizers", 0, "pattern"], {"Regex": r"\w+"}, "not Llama 3's"),
    "a space before": (["pre_tokenizer", "pretokenizers", 1, "add_prefix_space"], True, "not Llama 3's"),
    "another decoder": (["decoder"], {"type": "Metaspace"}, "decoder is not ByteLevel"),
    "a vocabulary that is a list": (["model", "vocab"], [], "model.vocab is no table"),
    "an id that is text": (["model", "vocab", "a"], "5", "the id of the token 'a' is '5'"),
    "an id that is true": (["model", "vocab", "a"], True, "the id of the token 'a' is True"),
    "an id twice": (["model", "vocab", "a"], 7, "without gaps"),
    "a gap": (["model", "vocab", "a"], 10**30, "without gaps"),
    "a token that stands for no bytes": (["model", "vocab", "漢"], 800, "'漢', which stands for no byte"),
    "merges that are text": (["model", "merges"], "a b", "model.merges is no list"),
    "a merge of three": (["model", "merges", 3], "a b c", "merge 3 is 'a b c'"),
    "a merge of one": (["model", "merges", 3], ["a"], "merge 3 is"),
    "a merge of numbers": (["model", "merges", 3], [1, 2], "merge 3 is"),
    "a special without an id": (["added_tokens", 0], {"content": "x"}, "added token 0 has no name and id"),
    "a special that is a number": (["added_tokens", 0], 7, "added token 0 has no name and id"),
    "half a character": (["added_tokens", 0, "content"], "\ud800", "added token 0 has no name and id"),
    "a word that is found in text": (["added_tokens", 9, "special"], False, r"'<\|eot_id\|>' is not special"),
    "specials elsewhere": (["added_tokens", 9, "id"], 5000, "do not follow those of the 800 tokens"),
    "no end of turn": (["added_tokens", 9, "content"], "<|end|>", r"no '<\|eot_id\|>', and '<\|end\|>' at its place"),
    "no specials": (["added_tokens"], [], "only 0 special tokens"),
}


@pytest.mark.parametrize(("path", "value", "fault"), BYTE_LEVEL_FAULTS.values(), ids=BYTE_LEVEL_FAULTS)
def test_what_is_not_llama_3s_is_refused(byte_level, tmp_path, path, value, fault):
    with pytest.raises(ArtifactError, match=rf"tokenizer\.json(.|\n)*{fault}(.|\n)*hint: "):
        read_tokenizer_json(written(tmp_path, change(byte_level, path, value)))


PIECES_FAULTS = {
    "split at spaces": (["pre_tokenizer", "split"], True, "not Llama 2's"),
    "another mark": (["pre_tokenizer", "replacement"], "_", "not Llama 2's"),
    "a normalizer": (["normalizer"], {"type": "NFKC"}, "not Llama 2's"),
    "ignored merges": (["model", "ignore_merges"], True, "no ignore_merges"),
    "unknowns one by one": (["model", "byte_fallback"], False, "needs byte_fallback, or fuse_unk"),
    "a byte missing": (["model", "vocab", "<0x41>"], 699, "without gaps"),
    "a merge of unknown tokens": (["model", "merges", 0], ["zq", "qz"], "joins or gives what is no ordinary piece"),
    "another decoder": (["decoder"], {"type": "WordPiece"}, "decoder is not Llama 2's"),
    "an unknown that is none": (["model", "unk_token"], "<nothing>", "0 unknown pieces"),
}


@pytest.mark.parametrize(("path", "value", "fault"), PIECES_FAULTS.values(), ids=PIECES_FAULTS)
def test_what_is_not_llama_2s_is_refused(metaspace, tmp_path, path, value, fault):
    with pytest.raises(ArtifactError, match=rf"tokenizer\.json(.|\n)*{fault}(.|\n)*hint: "):
        read_tokenizer_json(written(tmp_path, change(metaspace, path, value)))


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b'{"model": ' + b"[" * 200_000, b"\xff\xfe{}", b'"text"'])
def test_what_is_no_json_object_is_a_clear_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json(.|\n)*hint: "):
        read_tokenizer_json(tmp_path / "tokenizer.json")


def test_a_damaged_file_is_an_error_or_a_tokenizer(metaspace, byte_level, tmp_path):
    """120 changes of single characters, half of them where the structure is: nothing but `ArtifactError` is raised."""
    rng, refused = random.Random(0), 0
    for number in range(120):
        text = list(json.dumps([metaspace, byte_level][number % 2]))
        places = [i for i, c in enumerate(text[:4000]) if c in '{}[]":,'] if number % 4 < 2 else range(len(text))
        text[rng.choice(places)] = rng.choice('0"[]{},:x-')
        (tmp_path / "tokenizer.json").write_text("".join(text), encoding="utf-8")
        try:
            read_tokenizer_json(tmp_path / "tokenizer.json").encode("the herd")
        except ArtifactError:
            refused += 1
    assert refused > 60
