"""The kernels as a program of their own, here and, with a cross compiler and an emulator, on a processor we don't have."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "puna" / "kernels" / "native"

pytestmark = pytest.mark.skipif(not os.environ.get("PUNA_SLOW"), reason="half a minute of compiling: set PUNA_SLOW=1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "compiler, emulator, expected",
    [("g++", [], "plain C++"), ("aarch64-linux-gnu-g++", ["qemu-aarch64", "-cpu", "max"], "NEON")],
)
def test_every_instruction_set_agrees_with_plain_cpp(tmp_path, compiler, emulator, expected):
    for tool in [compiler, *emulator[:1]]:
        if not shutil.which(tool):
            pytest.skip(f"no {tool} on this machine")
    sources = [str(HERE / "agree.cpp"), *(str(f) for f in NATIVE.glob("*.cpp") if f.name != "interface.cpp")]
    flags = ["-std=c++20", "-O1", "-w", "-ffp-contract=off", "-static", "-pthread", f"-I{NATIVE}"]
    subprocess.run([compiler, *flags, "-o", str(tmp_path / "agree"), *sources], check=True)
    run = subprocess.run([*emulator, str(tmp_path / "agree")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert expected in run.stdout.split("\n")
