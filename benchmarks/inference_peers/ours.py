"""Ours, at two depths: the runner alone (spans in, logits out, the largest is the next token), and the whole engine."""

from pathlib import Path

import numpy as np

from inference_peers.exchange import prompt
from puna.inference.native import NativeRunner
from puna.inference.spans import BLOCK_TOKENS, Span

CHUNK = 512  # tokens of a prompt that are read at a time
CACHE_TOKENS = 40_000  # memory is taken as they are written


class Runner:
    """The native runner, on spans."""

    def __init__(self, path: str, threads: int, chunk: int = CHUNK):
        self.path, self.threads, self.chunk = Path(path), threads, chunk

    def load(self) -> dict:
        self.runner = native_runner(self.path, self.threads)
        return {"settings": "bfloat16 cache", "read per token": self.runner.network.read_bytes}

    def prefill(self, tokens: int) -> int:
        ids, blocks = prompt(tokens), list(range(-(-tokens // BLOCK_TOKENS)))
        for start in range(0, tokens, self.chunk):
            part = ids[start : start + self.chunk]
            wanted = int(start + len(part) == tokens)
            logits = self.runner.forward([Span(part, start, blocks, wanted, screened=True)])
        return int(logits[-1].argmax())

    def start(self, contexts: list[int], room: int) -> None:
        """Fill the cache with random keys and values: what they are takes no part in how long reading them takes."""
        self.runner.forget()
        self.contexts = contexts
        self.last = [prompt(1, i)[0] for i in range(len(contexts))]
        self.blocks, begin = [], 0
        for context in contexts:
            count = -(-(context + room) // BLOCK_TOKENS)
            self.blocks.append(list(range(begin, begin + count)))
            begin += count
        config = self.runner.config
        longest = max(contexts)
        shape = (2, longest, config.n_kv_heads, config.head_dim)
        keys = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        for blocks, context in zip(self.blocks, contexts):
            for layer in range(config.n_layers if context else 0):
                table = np.array(blocks, dtype=np.int32)
                self.runner.cache.write(layer, table, 0, keys[0, :context], keys[1, :context])

    def decode(self, steps: int) -> list[int]:
        said = []
        for _ in range(steps):
            spans = [Span([t], c, b, screened=True) for t, c, b in zip(self.last, self.contexts, self.blocks)]
            self.last = self.runner.forward(spans).argmax(-1).tolist()
            self.contexts = [context + 1 for context in self.contexts]
            said.append(self.last[0])
        return said

    def rest(self) -> None:
        self.runner.forget()


class WholeEngine:
    """Requests in, texts out: with the scheduler, the sampler and the tokenizer. A letter is a token.

    Prompts are read when a question starts and found in the prefix cache when it is measured, but for less than a block
    of each; so a decoding figure has a little of reading in it.
    """

    def __init__(self, path: str, threads: int):
        self.path, self.threads = Path(path), threads

    def load(self) -> dict:
        from puna.inference.engine import Engine
        from puna.tokenizer import Tokenizer

        tokenizer = Tokenizer({bytes([i]): i for i in range(256)})
        runner = native_runner(self.path, self.threads)
        self.engine = Engine(runner, tokenizer)
        return {"settings": "end to end, bfloat16 cache", "read per token": runner.network.read_bytes}

    def prefill(self, tokens: int) -> str:
        self.engine.clear()
        return self._answers([tokens], 1)[0]

    def start(self, contexts: list[int], room: int) -> None:
        self.engine.clear()
        self.contexts = [max(1, context) for context in contexts]  # the begin-of-text token is there always
        self._answers(self.contexts, 1)

    def decode(self, steps: int) -> list[str]:
        """Always the first steps after the contexts."""
        return self._answers(self.contexts, steps)

    def rest(self) -> None:
        self.engine.clear()

    def _answers(self, lengths: list[int], tokens: int) -> list[str]:
        from puna.chat import Request, Sampling

        greedy = Sampling(temperature=0, max_tokens=tokens, min_tokens=tokens)
        texts = ["".join(chr(97 + t % 26) for t in prompt(length - 1, i)) for i, length in enumerate(lengths)]
        found = self.engine.generate([Request(prompt=text, sampling=greedy) for text in texts])
        if any(answer.completion_tokens != tokens for answer in found):
            raise ValueError("an answer has less tokens than it should")
        return [answer.text[:16] for answer in found]


def native_runner(path: Path, threads: int, dtype: str = "bfloat16") -> NativeRunner:
    """The model at `path` in the kernels' hands; numbers and cache are of type `dtype`, codes stay codes."""
    return NativeRunner.load(path, dtype=dtype, threads=threads, blocks=CACHE_TOKENS // BLOCK_TOKENS)
