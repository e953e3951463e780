"""What all tests share: those marked `gpu` or `slow` skip by themselves, and Triton's interpreter stands in for a GPU."""

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
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "no CUDA device"
    if not os.environ.get("PUNA_SLOW"):
        reasons["slow"] = "slow: PUNA_SLOW=1 runs it"
    for item in items:
        for mark, reason in reasons.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))
