"""GGUF, the one-file format of llama.cpp: Llamas read from it and written to it."""

from puna.model.gguf.llama import GgufFile, load_gguf
from puna.model.gguf.write import KINDS, write_gguf

__all__ = ["KINDS", "GgufFile", "load_gguf", "write_gguf"]
