"""What every result says of where it came from: the command, the revision and the processor."""

import platform
import re
import subprocess
import sys
from pathlib import Path


def revision() -> str:
    """The commit, and whether the tree differs from it."""
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return asked.stdout.strip() or "unknown"


def processor() -> str:
    """The processor's name, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def command() -> str:
    """The command that runs, but for where it writes, which changes no result; of files elsewhere their names alone."""
    words = sys.argv[1:]
    kept = [w for before, w in zip(["", *words], words) if not {"--out", "--into"} & {before, w}]
    kept = [re.sub(r"(^|=)/.*/", r"\1PATH/", w) for w in kept]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *kept])
