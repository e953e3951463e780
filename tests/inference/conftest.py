import pytest
from tiny_llama import hand_made_tokenizer, random_model

from puna.inference.engine import Engine
from puna.model.llama import Llama
from puna.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return hand_made_tokenizer()


@pytest.fixture(scope="session")
def model() -> Llama:
    return random_model()


@pytest.fixture
def engine(model, tokenizer) -> Engine:
    return Engine(model, tokenizer, slots=8)
