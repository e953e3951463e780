"""Text to token ids and back, conversations to token ids and back, and token shards for training."""

from puna.tokenizer.bpe import Tokenizer

__all__ = ["Tokenizer"]
