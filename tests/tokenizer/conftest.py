"""A small world: sentences in several scripts, code, numbers, and a tokenizer learnt from them."""

import io

import pytest
from hypothesis import settings

from puna.tokenizer import Tokenizer
from puna.tokenizer.train import train_ranks

settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no deadline")

SENTENCES = [
    "The herd was raised on the high grassland, where it isn't easy to find water in the dry months.",
    "They've said that we'll see 1234567 animals by 2031, and that's 89% more than there were.",
    "La manada pasta en la puna; el pastor camina despacio y canta para que nadie se pierda.",
    "Das Gras auf der Hochebene wächst langsam, größer wird es nur nach dem Regen.",
    "Стадо поднялось на высокое плато, и пастух запел старую песню.",
    "高原上的草生长缓慢，牧人唱着古老的歌。ラマは高原で草を食べています。",
    "يرعى القطيع في المرتفعات الجافة. הרועה שר שיר ישן. हिन्दी में एक वाक्य।",
    "def graze(herd, *, hours=8):\n    for animal in herd:\n        if animal.hungry():\n            animal.eat(hours)\n",
    "    return {\n\t\t'name': \"llama\",\r\n\t\t'wool': 3.14159,\n    }\n\n\n",
    "=== results ===\n| name | value |\n|------|-------|\n| wool | 12.5  |\n\n----\n",
    'assistant user system ipython {"name": "lookup", "parameters": {"query": "wool", "limit": 10}}',
    "🦙🦙 emoji, na\u00efve, e\u0301tude, \u200bzero width\u00a0no-break",
]


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    return SENTENCES


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_ranks(SENTENCES * 3, 800))


SENTENCEPIECE = {
    "model_type": "bpe",
    "vocab_size": 700,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.99,
}


@pytest.fixture(scope="session")
def learn_sentencepiece(tmp_path_factory):
    """Makes the `tokenizer.model` of a vocabulary that the SentencePiece library learns with Llama's options or others."""
    spm = pytest.importorskip("sentencepiece")
    texts = ["a  b   c    d     e " * 3, "foo [TOOL] fofoo [TOOL [TOOL]]", "she is to be at the farm " * 5]

    def learn(**options):
        model = io.BytesIO()
        lines = iter((SENTENCES + texts) * 4)
        spm.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, minloglevel=2, **SENTENCEPIECE | options
        )
        path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
        path.write_bytes(model.getvalue())
        return path

    return learn


@pytest.fixture(scope="session")
def llama_model(learn_sentencepiece):
    """The path of a `tokenizer.model` as Llama 2 has it."""
    return learn_sentencepiece()
