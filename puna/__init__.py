"""Puna: the whole Llama 3.1 system in one Python package.

The public facts of how the Llama 3 family was made (arXiv 2407.21783), as code: pages in at one end, a chatting,
evaluated, quantised model out at the other. Start with `recipes/tiny.py`, which is the line from top to bottom.
"""

__version__ = "0.1.0"
