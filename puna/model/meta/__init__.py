"""Meta's original checkpoint folders: `params.json`, `consolidated.NN.pth`. Read by `load_meta`, written by `write_meta`."""

from puna.model.meta.files import MetaFiles, load_meta
from puna.model.meta.write import write_meta

__all__ = ["MetaFiles", "load_meta", "write_meta"]
