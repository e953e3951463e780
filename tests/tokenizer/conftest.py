"""A small world: sentences in several scripts, code, numbers, and a tokenizer learnt from them."""

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
