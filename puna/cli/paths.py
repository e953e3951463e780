"""What a path on the command line means."""

import json
from pathlib import Path

from puna.errors import ArtifactError, shown


def model_path(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the final one of a run's folder."""
    record = path / "run.json"
    if not record.is_file():
        if not path.exists():
            raise ArtifactError(f"{path} does not exist", hint="give a checkpoint, or make one with `puna run tiny`")
        return path
    try:
        name = json.loads(record.read_text())["model"]
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"the model {shown(name)} is not in the folder")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{record} does not name the run's model: {error}", hint="run the recipe again") from None
    return path / name
