"""Meta's original checkpoint folders: `params.json`, `consolidated.NN.pth`. Read by `load_meta`, written by `write_meta`."""

from typing import Any

__all__ = ["MetaFiles", "load_meta", "write_meta"]


def __getattr__(name: str) -> Any:
    """The reader or the writer, when it is asked for: both need PyTorch, and telling kinds of models apart does not."""
    if name == "write_meta":
        from puna.model.meta.write import write_meta

        return write_meta
    if name in __all__:
        from puna.model.meta import files

        return getattr(files, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
