"""What holds for all tests: those marked `slow` skip by themselves."""

import os

import pytest


def pytest_collection_modifyitems(items):
    if os.environ.get("PUNA_SLOW"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: PUNA_SLOW=1 runs it"))
