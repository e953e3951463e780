"""llama.cpp through llama-cpp-python's plain functions: a batch of tokens in, logits where they are needed.

A *context* of llama.cpp is its cache and its memory for computing; one is made for each kind of question and dropped
with the next. Reading 16K tokens takes it minutes, so the cache of a long sequence is saved to a file once, and shorter
ones are made of its beginning.
"""

import ctypes
from collections.abc import Iterable
from pathlib import Path

import llama_cpp as llama
import numpy as np

from inference_peers.exchange import prompt

_LENGTHS = (512, 4096, 16384)  # of saved sequences
_MOST = 512  # tokens of a batch


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, path: str, threads: int, flash: bool = True, unified: bool = False, mmap: bool = True):
        self.path, self.threads, self.flash, self.unified, self.mmap = Path(path), threads, flash, unified, mmap
        self.context = None
        self._quiet = llama.llama_log_callback(lambda *_: None)
        llama.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama.llama_backend_init()

    def load(self) -> dict:
        settings = llama.llama_model_default_params()
        settings.load_mode = llama.LLAMA_LOAD_MODE_MMAP if self.mmap else llama.LLAMA_LOAD_MODE_NONE
        self.model = llama.llama_load_model_from_file(str(self.path).encode(), settings)
        if not self.model:
            raise ValueError(f"{self.path} cannot be loaded")
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        system = llama.llama_print_system_info().decode().strip()
        how = [
            "flash attention" * self.flash,
            "mmap" * self.mmap,
            "one cache" * self.unified,
            "float16 cache",
            "repacked",
        ]
        return {"settings": ", ".join(filter(None, how)), "system": system, "version": llama.__version__}

    def prefill(self, tokens: int) -> int:
        self._context(("prefill", max(tokens, 512)), 1, max(tokens, 512))
        llama.llama_memory_clear(self.memory, True)
        self._read(((t, i, 0) for i, t in enumerate(prompt(tokens))), tokens)
        return int(self._following()[0])

    def start(self, contexts: list[int], room: int) -> None:
        self.contexts = contexts
        self.last = [prompt(1, i)[0] for i in range(len(contexts))]
        longest = max(contexts)
        saved = next((n for n in _LENGTHS if n >= longest), longest) if longest else 0
        state = np.fromfile(self._saved(saved), np.uint8) if saved else None
        each = saved + room
        self._context(("decode", tuple(contexts), room), len(contexts), each)
        llama.llama_memory_clear(self.memory, True)
        for sequence, context in enumerate(contexts if saved else []):
            self._restore(state, sequence)
            llama.llama_memory_seq_rm(self.memory, sequence, context, -1)

    def decode(self, steps: int) -> list[int]:
        said = []
        for _ in range(steps):
            self._read(((t, c, i) for i, (t, c) in enumerate(zip(self.last, self.contexts))), 0)
            self.last = self._following().tolist()
            self.contexts = [context + 1 for context in self.contexts]
            said.append(self.last[0])
        return said

    def rest(self) -> None:
        if self.context is not None:
            llama.llama_free(self.context)
        self.context = None

    def logits(self, tokens: list[int]) -> np.ndarray:
        """After every token of a text, (tokens, V) float32."""
        self._context(("logits", len(tokens)), 1, max(len(tokens), 512))
        llama.llama_memory_clear(self.memory, True)
        found = []
        for start in range(0, len(tokens), _MOST):
            part = tokens[start : start + _MOST]
            self._read(((t, start + i, 0) for i, t in enumerate(part)), 0)
            found.append(self._rows().copy())
        return np.concatenate(found)

    def _context(self, key: tuple, sequences: int, each: int) -> None:
        """Make a context for `sequences` of `each` tokens, unless the present one was made for the same."""
        if self.context is not None and self.key == key:
            return
        self.rest()
        self.key = key
        settings = llama.llama_context_default_params()
        settings.n_ctx = -(-each // 256) * 256 * sequences
        settings.n_batch = settings.n_ubatch = _MOST
        settings.n_seq_max = sequences
        settings.n_threads = settings.n_threads_batch = self.threads
        settings.flash_attn_type = int(self.flash)
        settings.kv_unified = self.unified
        settings.no_perf = True
        self.context = llama.llama_init_from_model(self.model, settings)
        if not self.context:
            raise ValueError(f"no context of {settings.n_ctx} tokens")
        self.memory = llama.llama_get_memory(self.context)
        if not hasattr(self, "batch"):
            self.batch = llama.llama_batch_init(_MOST, 0, 1)

    def _read(self, rows: Iterable[tuple[int, int, int]], quiet: int) -> None:
        """Decode (token, position, sequence), `_MOST` at a time; with `quiet` only the last row has logits."""
        rows = list(rows)
        for start in range(0, len(rows), _MOST):
            part, batch = rows[start : start + _MOST], self.batch
            for i, (token, position, sequence) in enumerate(part):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = not quiet or start + i == len(rows) - 1
            batch.n_tokens = len(part)
            self.wanted = 1 if quiet else len(part)
            if code := llama.llama_decode(self.context, batch):
                raise ValueError(f"llama_decode said {code}")
        llama.llama_synchronize(self.context)

    def _rows(self) -> np.ndarray:
        pointer = llama.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, (self.wanted, self.vocabulary))

    def _following(self) -> np.ndarray:
        return self._rows().argmax(1)

    def _saved(self, tokens: int) -> Path:
        """The file that has the cache of a sequence of `tokens`."""
        file = self.path.with_name(f"{self.path.stem}-{tokens}-{'flash' if self.flash else 'plain'}.state")
        if not file.is_file():
            self._context(("fill", tokens), 1, tokens)
            llama.llama_memory_clear(self.memory, True)
            self._read(((t, i, 0) for i, t in enumerate(prompt(tokens))), tokens)
            state = np.empty(llama.llama_state_seq_get_size(self.context, 0), np.uint8)
            _must(llama.llama_state_seq_get_data(self.context, _bytes(state), len(state), 0), "a state cannot be had")
            partial = file.with_suffix(".partial")
            state.tofile(partial)
            partial.rename(file)
        return file

    def _restore(self, state: np.ndarray, sequence: int) -> None:
        """Give a sequence the saved cache.

        A state counts the streams of the cache (a separate part for each sequence, if they do not share one), its third
        word, and ends with the cells of each; this one was saved where there was one, so the others are added, empty.
        """
        streams = 1 if self.unified else len(self.contexts)
        state = np.concatenate([state, np.zeros(4 * (streams - 1), np.uint8)])
        state[8:12].view(np.uint32)[0] = streams
        done = llama.llama_state_seq_set_data(self.context, _bytes(state), len(state), sequence)
        _must(done, "a saved state cannot be read back")


def _bytes(array: np.ndarray) -> "ctypes.Array":
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def _must(done: int, otherwise: str) -> None:
    if not done:
        raise ValueError(otherwise)
