"""The planner needs no PyTorch, and answers at once."""

import subprocess
import sys

ALL = """
import importlib, pkgutil, sys
import puna.planner
for module in pkgutil.iter_modules(puna.planner.__path__):
    importlib.import_module(f"puna.planner.{module.name}")
print([name for name in ("torch", "pyarrow", "transformers") if name in sys.modules])
"""

TIMED = """
import resource, sys
from puna.cli import main
code = main(["plan", "--gpus", "64xH100", "--days", "14", "--serve-tokens", "2e12", "--fits", "24GB"])
used = resource.getrusage(resource.RUSAGE_SELF)
print(code, "torch" in sys.modules, used.ru_utime + used.ru_stime, file=sys.stderr)
"""


def test_no_module_of_the_planner_imports_pytorch():
    done = subprocess.run([sys.executable, "-c", ALL], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plan_takes_less_than_two_seconds_of_processor_and_no_pytorch():
    done = subprocess.run([sys.executable, "-c", TIMED], capture_output=True, text=True, check=True)
    code, torch, seconds = done.stderr.split()
    assert (code, torch) == ("0", "False")
    assert float(seconds) < 2.0
    assert "parameters" in done.stdout
