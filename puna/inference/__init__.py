"""Answering with a model: sequences share a cache and a batch; the engine is what the outside sees.

Read `engine.py` first, then what it is made of: `sequence.py` and `text.py` (one request), `scheduler.py` (who runs),
`cache.py` and `runner.py` (tokens to logits), `sampler.py` (logits to tokens), `scoring.py` (how likely a text is).
"""
