"""The small version of benchmarks/soak.py."""

import importlib.util
import sys
from pathlib import Path

PATH = Path(__file__).parents[2] / "benchmarks" / "soak.py"


def test_hundreds_of_requests_of_all_kinds_leak_nothing_and_get_what_they_get_alone():
    spec = importlib.util.spec_from_file_location("soak", PATH)
    module = sys.modules["soak"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    report = module.soak(*module.engines(), 200)
    assert report.faults() == []
    assert report.preemptions > 5 and report.most_at_once > 4
    counts = report.counts
    assert min(counts["refused"], counts["given up"], counts["busy"], counts["ended: stop"]) > 3
    assert sum(counts.values()) == 200
