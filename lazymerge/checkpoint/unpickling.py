"""Read the pickle of a torch file as data. Python's own unpickler is not used, and nothing called.

A pickle is a program for a machine with a stack, and its instructions can import and call anything.
This machine knows those that torch.save needs, and six kinds of name: OrderedDict, the functions
that torch rebuilds tensors and parameters with, storages, and dtypes. They stand for what they
would make; none is imported, so torch is not either. Any other name or instruction is an error.

    "storage", FloatStorage, key, place, count    ─BINPERSID─►  _Storage
    _rebuild_tensor_v2, (_Storage, offset, …)     ─REDUCE────►  StoredTensor

Bounded: instructions are counted; a memo is a mapping and takes what is put into it, whatever
numbers it is put under; lengths are checked before anything of that length is made; keys are
strings and numbers, for hashing nested tuples can take forever; and no code here follows what is
nested, so it may be nested as deep as it likes, or within itself.

Format: Python, Lib/pickletools.py. What torch writes: torch/serialization.py and torch/_utils.py.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pickletools import opcodes
from typing import Any

from .broken_file import BrokenFileError
from .tensor import DTYPES, DType
from .wording import quoted

INSTRUCTION_LIMIT = 6_000_000
"""About 36 make a tensor: 160,000 tensors in one file, in five seconds."""

NAME_LIMIT_BYTES = 200
"""Of a module or of a name in it. Those that are known have at most 20."""

EXTENT_LIMIT = 2**63
DIMENSION_LIMIT = 64
"""Of a tensor: torch's own."""

SAVE_TENSORS_ALONE = (
    "If you trust where the file is from, load it in Python and save its tensors alone: "
    "safetensors.torch.save_file(STATE_DICT, 'model.safetensors')."
)


class _Function(Enum):
    """A name that stands for what calling it would make."""

    ORDERED_DICT = "OrderedDict"
    TENSOR = "_rebuild_tensor_v2"
    TENSOR_WITH_DTYPE = "_rebuild_tensor_v3"
    PARAMETER = "_rebuild_parameter"


@dataclass(frozen=True, slots=True)
class _StorageKind:
    """A storage class. dtype: None for storages of bytes, whose tensors name their dtype."""

    dtype: DType | None


@dataclass(frozen=True, slots=True)
class _Storage:
    """A run of bytes, in the zip entry data/KEY."""

    dtype: DType | None
    key: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor, and the storage that its elements lie in.

    key: of the storage: its bytes are the zip entry data/KEY.
    storage_bytes: length of the storage.
    offset: of the tensor's first element in the storage, in elements.
    shape, stride: in elements, of equal length.
    """

    dtype: DType
    key: str
    storage_bytes: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one after another, in the order of its indexes."""
        expected = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if extent != 1 and stride != expected:
                return 0 in self.shape
            expected *= extent
        return True


_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip

_NAMES: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): _Function.ORDERED_DICT,
    ("torch._utils", "_rebuild_tensor_v2"): _Function.TENSOR,
    ("torch._utils", "_rebuild_tensor_v3"): _Function.TENSOR_WITH_DTYPE,
    ("torch._utils", "_rebuild_parameter"): _Function.PARAMETER,
    ("torch.storage", "UntypedStorage"): _StorageKind(None),
    **{("torch", name): _StorageKind(DTYPES[dtype]) for name, dtype in _STORAGES.items()},
    **{("torch", dtype.torch_name): dtype for dtype in DTYPES.values()},
}
"""Everything that a pickle may name."""

_OTHER_DTYPES = ("complex", "float", "qint", "quint", "int", "uint", "bits")
"""How names of dtypes begin that safetensors, or this version, has not."""


def unpickle(data: bytes) -> object:
    """What a torch file's pickle makes: mappings, lists, tuples, strings, numbers, StoredTensors.

    Raises BrokenFileError, naming what the pickle would import or do.
    """
    return _Machine(data).run()


class _Machine:
    """A stack, a memo and the instructions."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> object:
        data = self._data
        length = len(data)
        for _ in range(INSTRUCTION_LIMIT):
            if self._position >= length:
                raise self._broken("ends without an end")
            code = data[self._position]
            self._position += 1
            if code == _STOP:
                return self._result()
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise self._unknown(code)
            instruction(self)
        raise BrokenFileError(
            f"has a pickle of more than {INSTRUCTION_LIMIT:,} instructions.",
            "Spread the tensors over several files, if they are a model's.",
        )

    def _result(self) -> object:
        if len(self._stack) != 1 or self._below or self._position != len(self._data):
            raise self._broken("leaves something behind")
        return self._stack[0]

    def _broken(self, rule: str) -> BrokenFileError:
        return BrokenFileError(f"has a pickle that {rule} (byte {self._position:,} of it).")

    def _unknown(self, code: int) -> BrokenFileError:
        name = next((known.name for known in opcodes if ord(known.code) == code), f"0x{code:02x}")
        return BrokenFileError(
            f"has a pickle with the instruction {name} (byte {self._position - 1:,} of it), which "
            "no mapping of tensors needs; it is not carried out.",
            SAVE_TENSORS_ALONE,
        )

    # ------------------------------------------------------------------ what they work with

    def _take(self, count: int) -> bytes:
        start = self._position
        stop = start + count
        if stop > len(self._data):
            raise self._broken("ends within an instruction")
        self._position = stop
        return self._data[start:stop]

    def _number(self, count: int) -> int:
        return int.from_bytes(self._take(count), "little")

    def _line(self) -> str:
        stop = self._data.find(b"\n", self._position, self._position + NAME_LIMIT_BYTES)
        if stop < 0:
            raise self._broken("names something without an end")
        line = self._data[self._position : stop]
        self._position = stop + 1
        return line.decode("utf-8", "backslashreplace")

    def _pop(self) -> Any:
        if not self._stack:
            raise self._broken("takes from an empty stack")
        return self._stack.pop()

    def _pop_several(self, count: int) -> tuple[Any, ...]:
        if len(self._stack) < count:
            raise self._broken("takes from an empty stack")
        values = tuple(self._stack[-count:])
        del self._stack[-count:]
        return values

    def _pop_to_mark(self) -> list[Any]:
        if not self._below:
            raise self._broken("goes back to a mark that is not there")
        values = self._stack
        self._stack = self._below.pop()
        return values

    def _top(self, *kinds: type) -> Any:
        if not self._stack or type(self._stack[-1]) not in kinds:
            raise self._broken("fills what is no list or mapping")
        return self._stack[-1]

    def _text(self, length_bytes: int) -> None:
        data = self._take(self._number(length_bytes))
        try:
            self._stack.append(data.decode("utf-8"))
        except UnicodeDecodeError:
            raise self._broken("holds a string that is not UTF-8") from None

    # ------------------------------------------------------------------ the instructions

    def _protocol(self) -> None:
        self._take(1)

    def _frame(self) -> None:
        self._take(8)

    def _mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _float(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def _signed(self) -> None:
        self._stack.append(int.from_bytes(self._take(4), "little", signed=True))

    def _long(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._number(1)), "little", signed=True))

    def _tuple(self) -> None:
        values = tuple(self._pop_to_mark())
        self._stack.append(values)

    def _append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def _appends(self) -> None:
        values = self._pop_to_mark()
        self._top(list).extend(values)

    def _set_item(self) -> None:
        self._fill(list(self._pop_several(2)))

    def _set_items(self) -> None:
        self._fill(self._pop_to_mark())

    def _fill(self, values: list[Any]) -> None:
        mapping = self._top(dict, OrderedDict)
        if len(values) % 2:
            raise self._broken("has a key without a value")
        for place in range(0, len(values), 2):
            key = values[place]
            if type(key) not in _KEY_TYPES:
                raise self._broken("holds a key that is neither a string nor a number")
            if type(key) is int and not -MOST_KEY < key < MOST_KEY:
                raise self._broken("holds a key that is larger than any number of a layer")
            if key in mapping:
                raise self._broken(f"holds the key {_shown_key(key)} twice")
            mapping[key] = values[place + 1]

    def _remember(self, number: int) -> None:
        if not self._stack:
            raise self._broken("takes from an empty stack")
        self._memo[number] = self._stack[-1]

    def _recall(self, number: int) -> None:
        if number not in self._memo:
            raise self._broken("asks for what it has not kept")
        self._stack.append(self._memo[number])

    def _name(self) -> None:
        module = self._line()
        self._find(module, self._line())

    def _name_from_stack(self) -> None:
        module, name = self._pop_several(2)
        if type(module) is not str or type(name) is not str:
            raise self._broken("names something without a string")
        self._find(module, name)

    def _find(self, module: str, name: str) -> None:
        found = _NAMES.get((module, name))
        if found is None:
            raise _not_allowed(module, name)
        self._stack.append(found)

    def _call(self) -> None:
        function, arguments = self._pop_several(2)
        if type(function) is not _Function or type(arguments) is not tuple:
            raise self._broken("calls what cannot be called")
        if function is _Function.ORDERED_DICT and not arguments:
            self._stack.append(OrderedDict())
            return
        made = None
        if function is _Function.PARAMETER:
            made = arguments[0] if len(arguments) == 3 else None
        elif function is _Function.TENSOR:
            made = _tensor(arguments)
        elif function is _Function.TENSOR_WITH_DTYPE:
            made = _tensor_with_dtype(arguments)
        if type(made) is not StoredTensor:
            raise self._broken(f"calls {function.value} with arguments that torch does not give")
        self._stack.append(made)

    def _build(self) -> None:
        """The attributes of an OrderedDict: `_metadata` of a state dict, with version numbers."""
        self._pop()
        self._top(OrderedDict)

    def _storage(self) -> None:
        made = _storage(self._pop())
        if made is None:
            raise self._broken("refers to something other than a storage")
        self._stack.append(made)


_Instruction = Callable[[_Machine], None]


def _push(make: Callable[[], object]) -> _Instruction:
    return lambda machine: machine._stack.append(make())


def _push_number(count: int) -> _Instruction:
    return lambda machine: machine._stack.append(machine._number(count))


def _push_tuple(count: int) -> _Instruction:
    return lambda machine: machine._stack.append(machine._pop_several(count))


_STOP = ord(".")
MOST_KEY = 1 << 60
"""Python gives numbers below this hashes of their own; of greater ones, many can be chosen that all
have the same, and a mapping of some 100,000 takes minutes to fill."""

_KEY_TYPES = frozenset({str, int, float, bool, type(None)})

_BY_NAME: dict[str, _Instruction] = {
    "PROTO": _Machine._protocol,
    "FRAME": _Machine._frame,
    "MARK": _Machine._mark,
    "NONE": _push(lambda: None),
    "NEWTRUE": _push(lambda: True),
    "NEWFALSE": _push(lambda: False),
    "EMPTY_DICT": _push(dict),
    "EMPTY_LIST": _push(list),
    "EMPTY_TUPLE": _push(tuple),
    "BININT1": _push_number(1),
    "BININT2": _push_number(2),
    "BININT": _Machine._signed,
    "LONG1": _Machine._long,
    "BINFLOAT": _Machine._float,
    "SHORT_BINUNICODE": lambda machine: machine._text(1),
    "BINUNICODE": lambda machine: machine._text(4),
    "TUPLE": _Machine._tuple,
    "TUPLE1": _push_tuple(1),
    "TUPLE2": _push_tuple(2),
    "TUPLE3": _push_tuple(3),
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "SETITEM": _Machine._set_item,
    "SETITEMS": _Machine._set_items,
    "BINPUT": lambda machine: machine._remember(machine._number(1)),
    "LONG_BINPUT": lambda machine: machine._remember(machine._number(4)),
    "MEMOIZE": lambda machine: machine._remember(len(machine._memo)),
    "BINGET": lambda machine: machine._recall(machine._number(1)),
    "LONG_BINGET": lambda machine: machine._recall(machine._number(4)),
    "GLOBAL": _Machine._name,
    "STACK_GLOBAL": _Machine._name_from_stack,
    "REDUCE": _Machine._call,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._storage,
}
"""By the names of Python's pickletools; STOP ends the program."""

_INSTRUCTIONS = {ord(op.code): _BY_NAME[op.name] for op in opcodes if op.name in _BY_NAME}


def _storage(reference: object) -> _Storage | None:
    """The storage that a persistent id means: "storage", kind, key, place, element count."""
    if type(reference) is not tuple or len(reference) != 5:
        return None
    word, kind, key, place, count = reference
    if (
        word != "storage"
        or type(kind) is not _StorageKind
        or type(key) is not str
        or type(place) is not str
        or not _is_extent(count)
    ):
        return None
    item_bytes = 1 if kind.dtype is None else kind.dtype.item_bytes
    return _Storage(kind.dtype, key, count * item_bytes)


def _tensor(arguments: tuple[Any, ...]) -> StoredTensor | None:
    """_rebuild_tensor_v2: storage, offset, size, stride, requires_grad, hooks, and marks of views
    (conjugated, negated), of which there must be none."""
    if len(arguments) not in (6, 7) or (len(arguments) == 7 and arguments[6] not in (None, {})):
        return None
    storage = arguments[0]
    if type(storage) is not _Storage or storage.dtype is None:
        return None
    return _stored(storage, storage.dtype, arguments)


def _tensor_with_dtype(arguments: tuple[Any, ...]) -> StoredTensor | None:
    """_rebuild_tensor_v3: as v2, the storage one of bytes, and the dtype behind the hooks."""
    if len(arguments) not in (7, 8) or (len(arguments) == 8 and arguments[7] not in (None, {})):
        return None
    storage, dtype = arguments[0], arguments[6]
    if type(storage) is not _Storage or storage.dtype is not None or type(dtype) is not DType:
        return None
    return _stored(storage, dtype, arguments)


def _stored(storage: _Storage, dtype: DType, arguments: tuple[Any, ...]) -> StoredTensor | None:
    offset, shape, stride = arguments[1:4]
    if type(shape) is not tuple or type(stride) is not tuple or len(shape) != len(stride):
        return None
    if len(shape) > DIMENSION_LIMIT or not all(map(_is_extent, (offset, *shape, *stride))):
        return None
    return StoredTensor(dtype, storage.key, storage.size_bytes, offset, shape, stride)


def _is_extent(value: object) -> bool:
    return type(value) is int and 0 <= value < EXTENT_LIMIT


def _shown_key(key: object) -> str:
    return quoted(key) if isinstance(key, str) else str(key)[:NAME_LIMIT_BYTES]


def _not_allowed(module: str, name: str) -> BrokenFileError:
    full = quoted(f"{module}.{name}")
    if module == "torch" and (name.endswith("Storage") or name.startswith(_OTHER_DTYPES)):
        return BrokenFileError(
            f"has a pickle that names {full}, a kind of tensor that is not known to this version.",
            "Convert the model to another dtype, or leave these tensors out of the file.",
        )
    return BrokenFileError(
        f"has a pickle that names {full}, which is no part of a tensor; it is not imported.",
        SAVE_TENSORS_ALONE,
    )
