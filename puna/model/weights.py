"""The tensors of a checkpoint, whatever file they lie in: what `checkpoint.WeightFiles`, `meta.MetaFiles` and
`gguf.GgufFile` have in common.

Names and row order are Hugging Face's. Whoever only describes a checkpoint needs `Headers`; whoever reads it, `Weights`.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Headers(Protocol):
    """The tensors as headers tell them."""

    @property
    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def bytes(self, name: str) -> int:
        """Bytes in the file, packed as they are."""
        ...

    def form(self, name: str) -> str:
        """How the numbers are stored: `BF16`, `Q4_K`, ..."""
        ...


class Weights(Headers, Protocol):
    """The tensors themselves."""

    def read(self, name: str) -> "Tensor":
        """A whole tensor: in its stored type, or float32 where that is packed."""
        ...

    def pieces(self, name: str, multiple: int = 1) -> "Iterator[tuple[int, Tensor]]":
        """A tensor as (first row, rows), each piece a multiple of `multiple` rows and a few megabytes long."""
        ...

    def expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises `ArtifactError` unless exactly these tensors are there, in these shapes."""
        ...
