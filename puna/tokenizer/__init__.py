"""Text to token ids and back, conversations to token ids and back, and token shards for training."""

from puna.tokenizer.bpe import Tokenizer
from puna.tokenizer.load import AnyTokenizer, load_tokenizer
from puna.tokenizer.sentencepiece import SentencePieceTokenizer

__all__ = ["AnyTokenizer", "SentencePieceTokenizer", "Tokenizer", "load_tokenizer"]
