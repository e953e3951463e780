"""Whatever tokenizer a checkpoint has, the one that is saved, quantised or converted from it gives the same ids."""

import io
import json
import shutil

import pytest

from puna.errors import ArtifactError
from puna.model.checkpoint import save_model
from puna.model.conversion import convert
from puna.model.llama import Llama
from puna.model.opening import checkpoint_format, checkpoint_tokenizer
from puna.model.sizes import LlamaConfig
from puna.quant import QuantConfig, quantise
from puna.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from puna.tokenizer.bpe import MODEL_FILE, SPECIALS, write_ranks
from puna.tokenizer.carry import carry, chat_template
from puna.tokenizer.export import write_hugging_face
from puna.tokenizer.sentencepiece import Kind, Piece, write_sentencepiece
from puna.tokenizer.train import train_ranks

SENTENCES = ["the herd hums on the hill, and the puna is cold; naïve llamas see 山 and 3141 stars"] * 3
TEXT = "the herd hums  3141 naïve 🦙 <|eot_id|> </s>\n\n  x"
SHAPE = LlamaConfig(
    dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=64, vocab_size=640, context=4096
)  # fmt: skip


def ranks():
    return train_ranks(SENTENCES, 300)


def llama_2(folder):
    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / MODEL_FILE).write_bytes(model.getvalue())
    size = load_tokenizer(folder).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "[INST] {{ messages }} [/INST]"}))


def llama_3_0(folder):
    names = [f"<|reserved_special_token_9{n:02}|>" if n in (4, 5, 8, 10) else name for n, name in enumerate(SPECIALS)]
    write_hugging_face(folder, Tokenizer(ranks(), names), context=512)


def llama_3_1(folder):
    write_ranks(folder / MODEL_FILE, ranks())


def with_added(folder):
    write_hugging_face(folder, Tokenizer(ranks(), (*SPECIALS, "<|thought|>", "<|/thought|>")), context=512)
    (folder / "chat_template.jinja").write_text("{{ messages }}<|thought|>")


KINDS = [llama_2, llama_3_0, llama_3_1, with_added]


@pytest.fixture(params=KINDS, ids=[kind.__name__ for kind in KINDS])
def source(request, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    request.param(folder)
    save_model(Llama(SHAPE).init_weights(0), folder, tmp_path / "model")
    return folder


def assert_same(path, tokenizer):
    found = checkpoint_tokenizer(path)
    assert type(found) is type(tokenizer) and found.vocab_size == tokenizer.vocab_size
    assert found.encode(TEXT) == tokenizer.encode(TEXT) and found.special_names == tokenizer.special_names
    assert all(found.special(name) == tokenizer.special(name) for name in tokenizer.special_names)
    ids = range(tokenizer.vocab_size)
    assert [found.decode_bytes([id]) for id in ids] == [tokenizer.decode_bytes([id]) for id in ids]


def test_saved(source, tmp_path):
    assert_same(tmp_path / "model", load_tokenizer(source))
    assert chat_template(source) in ("", chat_template(tmp_path / "model"))


@pytest.mark.parametrize("kind", [llama_3_0, with_added])
def test_ranks_stand_beside_a_tokenizer_json_where_they_say_the_same(tmp_path, kind):
    def carried() -> tuple[Tokenizer, bool]:
        made = tmp_path / "made"
        made.mkdir()
        carry(tmp_path, made, context=512)
        found, has_ranks = load_tokenizer(made), (made / MODEL_FILE).is_file()
        shutil.rmtree(made)
        return found, has_ranks

    kind(tmp_path)
    given = load_tokenizer(tmp_path)
    for expected in (True, False):
        found, has_ranks = carried()
        assert has_ranks == expected and not (tmp_path / MODEL_FILE).exists()
        assert found.special_names == given.special_names and found.encode(TEXT) == given.encode(TEXT)
        (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)  # no other file knows the names


def test_quantised(source, tmp_path):
    quantise(QuantConfig(group_size=32), tmp_path / "model", out=tmp_path / "int4")
    assert_same(tmp_path / "int4", load_tokenizer(source))


@pytest.mark.parametrize("to", ["huggingface", "meta", "gguf"])
def test_converted(source, tmp_path, to):
    convert(tmp_path / "model", tmp_path / "converted", to)
    tokenizer = load_tokenizer(source)
    found = checkpoint_tokenizer(tmp_path / "converted")
    assert found.encode(TEXT) == tokenizer.encode(TEXT)
    assert found.special_names[: len(tokenizer.special_names)] == tokenizer.special_names
    if to != "gguf":
        assert_same(tmp_path / "converted", tokenizer)
    assert checkpoint_format(tmp_path / "converted").name == checkpoint_format(tmp_path / "model").name


def test_there_and_back_by_way_of_gguf(tmp_path):
    (tmp_path / "source").mkdir()
    llama_2(tmp_path / "source")
    save_model(Llama(SHAPE).init_weights(0), tmp_path / "source", tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "a.gguf", "gguf")
    convert(tmp_path / "a.gguf", tmp_path / "b", "huggingface")
    assert_same(tmp_path / "b", load_tokenizer(tmp_path / "source"))
    assert chat_template(tmp_path / "b") == "[INST] {{ messages }} [/INST]"


def test_a_sentencepiece_model_that_was_written_anew_is_read_alike_by_its_library(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    llama_2(tmp_path)
    ours = load_tokenizer(tmp_path)
    write_sentencepiece(tmp_path / "anew.model", ours)
    theirs = spm.SentencePieceProcessor(model_file=str(tmp_path / "anew.model"))
    before = spm.SentencePieceProcessor(model_file=str(tmp_path / MODEL_FILE))
    for text in (TEXT, "", " ", "山é", "  the  herd "):
        assert theirs.encode(text) == before.encode(text) == ours.encode(text)
        assert theirs.decode(theirs.encode(text)) == ours.decode(ours.encode(text))
    assert theirs.bos_id() == ours.bos and theirs.eos_id() == ours.eos and theirs.unk_id() == ours.unk


def test_a_vocabulary_that_sentencepiece_cannot_say_is_refused(tmp_path):
    pieces = [
        Piece(text, 0.0, Kind(kind)) for text, kind in [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("a", 1), ("aa", 1)]
    ]
    with pytest.raises(ArtifactError, match=r"keep the tokenizer\.json"):
        write_sentencepiece(tmp_path / "a.model", SentencePieceTokenizer(pieces, merges=[("a", "a")]))
    assert not (tmp_path / "a.model").exists()


def test_names_beside_ranks_that_do_not_fit_are_refused(tmp_path):
    llama_3_1(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|thought|>": 5000}))
    with pytest.raises(ArtifactError, match="was added as 5000"):
        load_tokenizer(tmp_path)
