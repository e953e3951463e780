"""The kernels compile for a GPU on any machine that has Triton; in a process of their own, without the interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

MOST_SHARED = 227 * 1024  # bytes that a program may have on compute capability 9.0


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_kernel_compiles_to_machine_code_of_an_h200_and_fits_its_shared_memory():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compiled.py")
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, str(script), "90"], capture_output=True, text=True, env=environment | {"PYTHONPATH": root}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    names = {line[0] for line in lines}
    assert names == {"_kernel", "_chunks", "_join", "_tiles", "_one", "_few", "_expanded"} and len(lines) > 20
    assert all(int(line[-1]) <= MOST_SHARED for line in lines)
