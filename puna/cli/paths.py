"""What a path on the command line means."""

import json
from pathlib import Path

from puna.errors import ArtifactError, ConfigError, shown


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


def writable(option: str, path: Path | None) -> None:
    """Raises `ConfigError` where no file can be made, before anything is computed for it."""
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder", hint=f"give a file: {option} {path / 'plan'}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {path.absolute().parent}", hint=f"make it, or give another {option}")
