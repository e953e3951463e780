"""What a checkpoint's pickle says, found out without running it.

A pickle is a program for a small stack machine. `torch.save` writes one that reads, for each tensor,

    BINUNICODE 'layers.0.attention.wq.weight'        the name
    GLOBAL 'torch._utils _rebuild_tensor_v2'         whom to call
      MARK
        MARK 'storage' GLOBAL 'torch BFloat16Storage' '7' 'cpu' 16777216 TUPLE BINPERSID     entry data/7 of the archive
        0  (4096, 4096)  (4096, 1)  False  ...       offset, shape, strides in elements
      TUPLE
    REDUCE                                           call it
    SETITEMS

Python's own machine would import what GLOBAL names and call what REDUCE finds: any command, on loading. The machine here
has no such power. The standard library's `pickletools` splits the bytes into opcodes; the opcodes that such a file needs
are carried out on plain values; a name after GLOBAL stays a pair of strings, and "calling" one of the few names in
`_NAMES` means to note down where a tensor lies. Every other opcode and every other name ends the reading with an error.
Lists and dictionaries are never walked into, so depth, cycles and repetitions cost nothing.
"""

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from puna.errors import ArtifactError

MOST_BYTES = 16 << 20  # of pickle; the 405B model in one file needs about 200 KB
MOST_OPCODES = 250_000  # there: about 50,000
_MOST_DIMENSIONS = 8
_HINT = "only tensors are read, never code: do not load this file elsewhere unless you trust where it comes from"
_DAMAGED = "the file is damaged or was not copied completely: fetch it again"

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class Name:
    """Something a pickle refers to by module and name. It is never imported."""

    module: str
    name: str


_DICT = Name("collections", "OrderedDict")
_TENSOR = Name("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = Name("torch._utils", "_rebuild_parameter")
_NAMES = {_DICT, _TENSOR, _PARAMETER, *(Name("torch", storage) for storage in _STORAGES)}


@dataclass(frozen=True)
class StorageRef:
    """Numbers in the archive: entry `data/{key}`, `count` elements of `dtype`."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor that was not read: `offset` and `stride` count elements of its storage."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize


class _Refused(Exception):
    """What is wrong, in words that follow 'the pickle'; `hint` differs for damage and for code."""

    def __init__(self, what: str, hint: str = _DAMAGED):
        super().__init__(what)
        self.hint = hint


def read_tensors(data: bytes, file: Path) -> dict[str, TensorRef]:
    """The tensors by name that the pickle `data` (of the archive `file`) describes.

    Raises `ArtifactError` for a pickle that is damaged, is too long, or would do anything but describe tensors.
    """
    if len(data) > MOST_BYTES:
        raise ArtifactError(f"{file}: its pickle has {len(data):,} bytes, at most {MOST_BYTES:,} are read", hint=_HINT)
    try:
        found = _Machine().run(data)
        if type(found) is not dict:
            raise _Refused(f"holds a {_kind(found)}, not tensors by name", _HINT)
        for name, value in found.items():
            if type(value) is not TensorRef:
                raise _Refused(f"has a {_kind(value)} under {name[:80]!r}, where a tensor should be", _HINT)
    except _Refused as refused:
        raise ArtifactError(f"{file}: the pickle {refused}", hint=refused.hint) from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as error:
        # What pickletools and the stack raise for bytes that are no pickle.
        raise ArtifactError(f"{file}: the pickle is broken: {str(error)[:120]}", hint=_DAMAGED) from None
    return found


def _kind(value: Any) -> str:
    return {Name: "name of a class or function", StorageRef: "storage", TensorRef: "single tensor"}.get(
        type(value), type(value).__name__
    )


class _Machine:
    """The stack, the marks on it and the memo; `run` carries out one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
            if count >= MOST_OPCODES:
                raise _Refused(f"has more than {MOST_OPCODES:,} opcodes", _HINT)
            if opcode.name == "STOP":
                break
            action = _ACTIONS.get(opcode.name)
            if action is None:
                raise _Refused(f"uses the opcode {opcode.name} at byte {position}, which no tensor needs", _HINT)
            action(self, argument)
        if len(self.stack) != 1 or self.marks:
            raise _Refused("does not end with one value")
        return self.stack[0]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        """The topmost value; never one from below a mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise _Refused("takes a value from an empty stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise _Refused("looks for a mark where there is none")
        begin = self.marks.pop()
        values = self.stack[begin:]
        del self.stack[begin:]
        return values

    def remember(self, index: int | None) -> None:
        value = self.pop()
        self.push(value)
        self.memo[len(self.memo) if index is None else index] = value

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise _Refused(f"recalls the value {index}, which it never stored")
        self.push(self.memo[index])

    def tuple_of(self, count: int) -> None:
        self.push(tuple([self.pop() for _ in range(count)][::-1]))

    def extend(self, values: list[Any]) -> None:
        target = self._top(list)
        target.extend(values)

    def update(self, values: list[Any]) -> None:
        target = self._top(dict)
        if len(values) % 2:
            raise _Refused("sets a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) is not str:
                raise _Refused(f"has a {_kind(key)} as a key, only names can be", _HINT)
            target[key] = value

    def _top(self, kind: type) -> Any:
        target = self.pop()
        self.push(target)
        if type(target) is not kind:
            raise _Refused(f"adds to a {_kind(target)}, a {kind.__name__} was expected", _HINT)
        return target

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str or Name(module, name) not in _NAMES:
            asked = f"{module}.{name}" if type(module) is type(name) is str else "a name that is no text"
            raise _Refused(f"asks for {asked[:120]!r}, which no tensor needs", _HINT)
        self.push(Name(module, name))

    def stack_name(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def persistent(self) -> None:
        """('storage', type, key, device, number of elements) -> a reference to the archive's entry."""
        found = self.pop()
        if type(found) is not tuple or len(found) < 5 or found[0] != "storage":
            raise _Refused("refers to something that is no storage", _HINT)
        _, kind, key, _, count = found[:5]
        named = type(kind) is Name and kind.module == "torch" and type(key) is str
        if not named or type(count) is not int or count < 0:
            raise _Refused("describes a storage that cannot be", _HINT)
        self.push(StorageRef(key, _STORAGES[kind.name], count))

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(arguments) is not tuple or type(function) is not Name:
            raise _Refused(f"calls a {_kind(function)}", _HINT)
        if function == _DICT and not arguments:
            self.push({})
        elif function == _TENSOR and len(arguments) >= 4:
            self.push(_tensor(*arguments[:4]))
        elif function == _PARAMETER and arguments and type(arguments[0]) is TensorRef:
            self.push(arguments[0])
        else:
            raise _Refused(f"calls {function.module}.{function.name} in a way no tensor needs", _HINT)

    def set_state(self) -> None:
        """Attributes of an OrderedDict, such as a module's `_metadata`: dropped. Nothing else has any."""
        self.pop()
        self._top(dict)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> TensorRef:
    """Raises `_Refused` unless the tensor lies inside its storage and no two of its elements share a place."""
    if type(storage) is not StorageRef or type(shape) is not tuple or type(stride) is not tuple:
        raise _Refused("describes a tensor that cannot be", _HINT)
    numbers = (offset, *shape, *stride)
    if any(type(n) is not int or n < 0 for n in numbers) or len(shape) != len(stride) or len(shape) > _MOST_DIMENSIONS:
        raise _Refused("describes a tensor that cannot be", _HINT)
    reach = 0  # the farthest element from the first, over the dimensions so far, from the finest stride to the widest
    for step, length in sorted(zip(stride, shape, strict=True)):
        if length > 1 and step <= reach and math.prod(shape):
            raise _Refused(f"describes a tensor of shape {_short(shape)} whose elements overlap", _HINT)
        reach += step * max(0, length - 1)
    if math.prod(shape) and offset + reach >= storage.count:
        found = f"the {_short([storage.count])[1:-1]} elements of its storage"
        raise _Refused(f"describes a tensor of shape {_short(shape)}, which {found} do not hold", _HINT)
    return TensorRef(storage, offset, shape, stride)


def _short(numbers: Any) -> str:
    """A shape for a message; a number of a thousand digits, which a file may claim, is not printed."""
    return "[" + ", ".join(str(n) if n < 1 << 64 else "over 2^64" for n in numbers) + "]"


def _pushes(value: Any) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(value)


_PUSH_ARGUMENT = "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, _: None),
    **dict.fromkeys(_PUSH_ARGUMENT, _Machine.push),
    **{name: _pushes(value) for name, value in (("NONE", None), ("NEWTRUE", True), ("NEWFALSE", False))},
    "EMPTY_TUPLE": _pushes(()),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.update([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.update(machine.pop_to_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.recall),
    "GLOBAL": lambda machine, names: machine.name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.stack_name(),
    "BINPERSID": lambda machine, _: machine.persistent(),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.set_state(),
}
