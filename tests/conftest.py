"""What all tests share: tests marked `gpu` skip where there is no GPU, and Triton's interpreter stands in for one."""

import importlib.util
import os

import hypothesis
import pytest
import torch

# A suite that holds today holds tomorrow: the same inputs each time. PUNA_RANDOM=1 draws new ones; so does
# benchmarks/fuzz.py, for as long as one likes.
hypothesis.settings.register_profile("puna", derandomize=not os.environ.get("PUNA_RANDOM"))
hypothesis.settings.load_profile("puna")

# Triton asks for this once, when it is imported, and anything may import it: so it is said before all else.
if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
