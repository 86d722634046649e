"""Finding the native kernels and calling them.

They are plain C without Python in it, called through ctypes, which lets go of the interpreter lock
for the time of the call.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

from ...checkpoint.tensor import DTYPES
from .program import Program

INTERFACE_VERSION = 8

KERNELS_VARIABLE = "LAZYMERGE_KERNELS"
"""Set to "torch", the native kernels are not used."""

DTYPE_NUMBERS = {"F64": 0, "F32": 1, "F16": 2, "BF16": 3, "F8_E4M3": 4, "F8_E5M2": 5}
"""Dtypes that the kernels read, as in kernels.c."""

WRITTEN_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})

UNWRITTEN = -2
"""Of Kernel.stream: the output could not be written."""

LANES = 16
COUNTERS = 3

RANKED_BYTES = 24
"""Room that ranking takes for each element of a row: two of key and place."""


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("operation", ctypes.c_int32),
        ("dst", ctypes.c_int32),
        ("a", ctypes.c_int32),
        ("b", ctypes.c_int32),
        ("x", ctypes.c_double),
        ("y", ctypes.c_double),
        ("k", ctypes.c_int64),
        ("c", ctypes.c_int32),
        ("d", ctypes.c_int32),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        ("program", ctypes.c_void_p),
        ("inputs", ctypes.c_void_p),
        ("dtypes", ctypes.c_void_p),
        ("f8", ctypes.c_void_p),
        ("registers", ctypes.c_void_p),
        ("stores", ctypes.c_void_p),
        ("lanes", ctypes.c_void_p),
        ("counters", ctypes.c_void_p),
        ("lists", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("spare", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("length", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("is_wide", ctypes.c_int32),
        ("result", ctypes.c_int32),
        ("output_dtype", ctypes.c_int32),
        ("rounds_once", ctypes.c_int32),
    )


class _Stream(ctypes.Structure):
    _fields_ = (
        ("call", ctypes.c_void_p),
        ("descriptors", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("item_bytes", ctypes.c_void_p),
        ("room", ctypes.c_void_p),
        ("sink", ctypes.c_void_p),
        ("input_count", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("lane_count", ctypes.c_int64),
        ("counter_count", ctypes.c_int64),
        ("output_item_bytes", ctypes.c_int64),
        ("after", ctypes.c_void_p),
        ("after_lane_count", ctypes.c_int64),
    )


SHORT_BYTES = 240
"""Checksums of as little as this follow other rules, and are not made by the kernels."""


class Sink(ctypes.Structure):
    """Where the output of a run of blocks goes, and what is found out on the way.

    begins: 1 before the first call of several that make one checksum.
    descriptor: of an open file. offset: in it, of the next block's first byte.
    mask: bits that are all set in inf and nan; 0 where there is none.
    is_nonfinite: whether there was one.
    error: the system's number, if the output could not be written.
    unwritten: bytes of the block that this happened to.
    low, high: halves of the checksum of all that has been written, if more than SHORT_BYTES.
    """

    _fields_ = (
        ("begins", ctypes.c_int64),
        ("descriptor", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("mask", ctypes.c_int64),
        ("is_nonfinite", ctypes.c_int64),
        ("error", ctypes.c_int64),
        ("unwritten", ctypes.c_int64),
        ("low", ctypes.c_uint64),
        ("high", ctypes.c_uint64),
        ("checksum", ctypes.c_uint64 * 27),
    )

    def begin(self, descriptor: int, offset: int, mask: int) -> None:
        """Gets ready for another run."""
        self.begins = 1
        self.descriptor = descriptor
        self.offset = offset
        self.mask = mask

    def digest(self) -> bytes:
        """The checksum, as xxhash.xxh3_128_digest gives it."""
        return int(self.high << 64 | self.low).to_bytes(16, "big")


@dataclass(frozen=True, slots=True)
class EncodedProgram:
    """A program as the kernels read it; shared by all workers."""

    program: Program
    instructions: ctypes.Array[_Instruction]


def encode_program(program: Program) -> EncodedProgram:
    """Lays a program's instructions out in memory."""
    laid_out = (
        _Instruction(int(i.code), i.dst, i.a, i.b, i.x, i.y, i.k, i.c, i.d)
        for i in program.instructions
    )
    count = max(1, len(program.instructions))
    return EncodedProgram(program, (_Instruction * count)(*laid_out))


class StreamedInput(NamedTuple):
    """Where the kernels find an input.

    descriptor: of its open file, -1 where it lies in memory.
    first_byte: of its first element, from the start of the file or of `address`.
    address: room for a block, or the memory.
    """

    dtype: str
    descriptor: int
    first_byte: int
    address: int


@cache
def _library() -> ctypes.CDLL | None:
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_kernels{suffix}"
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
                if library.lm_version() != INTERFACE_VERSION:
                    continue  # left from an older installation
            except (OSError, AttributeError):
                continue
            library.lm_run.argtypes = [ctypes.c_void_p]
            library.lm_run.restype = None
            library.lm_stream.argtypes = [ctypes.c_void_p]
            library.lm_stream.restype = ctypes.c_int32
            library.lm_has_bits.argtypes = [ctypes.c_void_p, *(3 * [ctypes.c_int64])]
            library.lm_has_bits.restype = ctypes.c_int32
            return library
    return None


def is_available() -> bool:
    """Whether the kernels are built, and wanted."""
    return os.environ.get(KERNELS_VARIABLE) != "torch" and _library() is not None


def has_bits(data: memoryview, width: int, mask: int) -> bool | None:
    """Whether some number of `width` bytes among the data has all bits of a mask set; None where
    the kernels are not there.

    data: writable.
    """
    library = _library() if is_available() else None
    if library is None:
        return None
    address = ctypes.addressof(ctypes.c_char.from_buffer(data))
    return bool(library.lm_has_bits(address, len(data) // width, width, mask))


def chunk_elements() -> int:
    """Elements of one register."""
    library = _library()
    return 0 if library is None else int(library.lm_chunk())


@cache
def float8_values(dtype: str) -> tuple[float, ...]:
    """The values of an 8-bit float's 256 codes.

    Source: Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433.
    """
    exponent_bits, mantissa_bits = {"F8_E4M3": (4, 3), "F8_E5M2": (5, 2)}[dtype]
    bias = (1 << (exponent_bits - 1)) - 1
    values = []
    for code in range(256):
        exponent = (code & 0x7F) >> mantissa_bits
        mantissa = code & ((1 << mantissa_bits) - 1)
        largest = (1 << exponent_bits) - 1
        if dtype == "F8_E5M2" and exponent == largest:
            value = float("nan") if mantissa else float("inf")
        elif dtype == "F8_E4M3" and code & 0x7F == 0x7F:
            value = float("nan")  # E4M3 has no infinity
        elif exponent == 0:
            value = mantissa * 2.0 ** (1 - bias - mantissa_bits)
        else:
            value = (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
        values.append(-value if code & 0x80 else value)
    return tuple(values)


@cache
def _float8_tables() -> ctypes.Array[ctypes.c_void_p]:
    tables = [(ctypes.c_float * 256)(*float8_values(d)) for d in ("F8_E4M3", "F8_E5M2")]
    pointers = (ctypes.c_void_p * 2)(*map(ctypes.addressof, tables))
    pointers._tables = tables  # type: ignore[attr-defined]  # they live as long as the pointers
    return pointers


class Kernel:
    """A program with its memory, ready to be called for block after block."""

    def __init__(
        self,
        encoded: EncodedProgram,
        inputs: Sequence[StreamedInput],
        *,
        working_dtype: str,
        registers: int,
        stores: Sequence[int],
        lists: Sequence[int] = (),
        spare: int = 0,
        output: int = 0,
        output_dtype: str | None = None,
        rounds_once: bool = False,
        blocks_at_once: int = 1,
        lanes: ctypes.Array[ctypes.c_double] | None = None,
    ) -> None:
        """lanes: room for LANES for each that the program fills, for as many blocks as are run at
        once; None: it is made.

        registers, stores, lists, spare, output: addresses of memory that outlives the kernel.

        Each store has room for a block of the working dtype, each list for a float64 for every row
        of a block (or column of the tensor), spare for RANKED_BYTES for each element of a row that
        is ranked, output for a block, or as many as are run at once without a sink.
        """
        library = _library()
        assert library is not None
        program = encoded.program
        assert len(stores) >= program.stores
        assert len(lists) >= program.lists
        self.program = program
        self._run = library.lm_run
        self._stream = library.lm_stream
        count = max(1, len(inputs))
        self._encoded = encoded  # must outlive the call that points to it
        self.inputs = (ctypes.c_void_p * count)()
        self._dtypes = (ctypes.c_int32 * count)(*(DTYPE_NUMBERS[i.dtype] for i in inputs))
        self._item_bytes = (ctypes.c_int32 * count)(*(DTYPES[i.dtype].item_bytes for i in inputs))
        self._descriptors = (ctypes.c_int32 * count)(*(i.descriptor for i in inputs))
        self.room = (ctypes.c_void_p * count)(*(i.address for i in inputs))
        self._first_bytes = [i.first_byte for i in inputs]
        self._widths = [DTYPES[i.dtype].item_bytes for i in inputs]
        self._offsets = (ctypes.c_int64 * count)()
        self._stores = (ctypes.c_void_p * max(1, len(stores)))(*stores)
        self._lists = (ctypes.c_void_p * max(1, len(lists)))(*lists)
        self._tables = (ctypes.c_void_p * max(1, len(program.tables)))(
            *(table.ctypes.data for table in program.tables)
        )
        if lanes is None:
            lanes = (ctypes.c_double * (LANES * max(1, program.lanes) * blocks_at_once))()
        self.lanes = lanes
        self.counters = (ctypes.c_int64 * (COUNTERS * max(1, program.counters) * blocks_at_once))()
        self._call = _Call(
            program=ctypes.addressof(encoded.instructions),
            inputs=ctypes.addressof(self.inputs),
            dtypes=ctypes.addressof(self._dtypes),
            f8=ctypes.addressof(_float8_tables()),
            registers=registers,
            stores=ctypes.addressof(self._stores),
            lanes=ctypes.addressof(self.lanes),
            counters=ctypes.addressof(self.counters),
            lists=ctypes.addressof(self._lists),
            tables=ctypes.addressof(self._tables),
            spare=spare,
            output=output,
            length=len(program.instructions),
            is_wide=working_dtype == "F64",
            result=program.result,
            output_dtype=0 if output_dtype is None else DTYPE_NUMBERS[output_dtype],
            rounds_once=rounds_once,
        )
        self._address = ctypes.addressof(self._call)
        self._run_of_blocks = _Stream(
            call=self._address,
            descriptors=ctypes.addressof(self._descriptors),
            offsets=ctypes.addressof(self._offsets),
            item_bytes=ctypes.addressof(self._item_bytes),
            room=ctypes.addressof(self.room),
            input_count=len(inputs),
            lane_count=program.lanes,
            counter_count=program.counters,
            output_item_bytes=0 if output_dtype is None else DTYPES[output_dtype].item_bytes,
        )
        self._run_address = ctypes.addressof(self._run_of_blocks)

    def reset(self) -> None:
        """Sets lanes and counters to zero."""
        ctypes.memset(self.lanes, 0, ctypes.sizeof(self.lanes))
        ctypes.memset(self.counters, 0, ctypes.sizeof(self.counters))

    def run(self, start: int, count: int) -> None:
        """Runs the program on a block; `inputs` has been set to the addresses of its elements.

        start: flat index of the first element.
        """
        call = self._call
        call.start = start
        call.count = count
        self._run(self._address)

    def bind(self, inputs: Sequence[StreamedInput]) -> None:
        """Goes on with other inputs of the same dtypes."""
        for number, source in enumerate(inputs):
            self._descriptors[number] = source.descriptor
            self.room[number] = source.address
        self._first_bytes = [source.first_byte for source in inputs]

    def stream(
        self,
        start: int,
        count: int,
        block: int,
        sink: Sink | None = None,
        after: Kernel | None = None,
    ) -> int | None:
        """Reads and runs blocks of `block` elements each, one after the other.

        start: flat index of the first element; count: of all elements.
        sink: where their output goes; None: to `output`, one block after the other.
        after: is run on every block when it is done, and has the output as one more input.

        Returns the number of the input that could not be read, UNWRITTEN where the output could
        not be written, None where nothing went wrong.
        """
        for number, width in enumerate(self._widths):
            self._offsets[number] = self._first_bytes[number] + start * width
        stream = self._run_of_blocks
        stream.start = start
        stream.count = count
        stream.block = block
        stream.sink = None if sink is None else ctypes.addressof(sink)
        stream.after = None if after is None else after._address
        stream.after_lane_count = 0 if after is None else after.program.lanes
        failed: int = self._stream(self._run_address)
        return failed - 1 if failed else None


def reads(dtype: str) -> bool:
    """Whether the kernels decode a dtype."""
    return dtype in DTYPE_NUMBERS


def writes(dtype: str) -> bool:
    """Whether the kernels encode a dtype."""
    return dtype in WRITTEN_DTYPES


assert DTYPE_NUMBERS.keys() == {name for name, dtype in DTYPES.items() if dtype.is_float}
