"""What a path on the command line means."""

import json
from pathlib import Path

from puna.errors import ArtifactError


def model_path(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the final one of a run's folder."""
    record = path / "run.json"
    if not record.is_file():
        if not path.exists():
            raise ArtifactError(f"{path} does not exist", hint="make one with `puna run tiny`")
        return path
    return path / json.loads(record.read_text())["model"]
