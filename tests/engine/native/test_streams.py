"""Several blocks in one call of the kernels, read from files or from memory."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_driver import (
    CODES,
    assert_same,
    by_kernels,
    by_torch,
    guarded,
    list_lengths,
    look_up,
    record,
    shifted,
)
from lazymerge.engine.native import library
from lazymerge.engine.native.library import (
    COUNTERS,
    LANES,
    RANKED_BYTES,
    Kernel,
    StreamedInput,
    encode_program,
)
from lazymerge.graph.vector import (
    column_dot,
    dot,
    draw,
    find_equal,
    rank_rows,
    row_total,
    scale_columns,
    scale_rows,
    sum_of_lanes,
    total,
    wait_for_rows,
    zero_from,
)
from processors import processor  # noqa: F401 (a fixture)

from conftest import needs_kernels

pytestmark = [needs_kernels, pytest.mark.usefixtures("processor")]

DTYPES = ["BF16", "F32", "F8_E5M2"]
BLOCK = 1500
ELEMENTS = 4 * BLOCK + 77


def combined(vectors: Any, inputs: Any) -> Any:
    out, other, room = vectors
    inputs[0].read_into(out)
    for source in inputs[1:]:
        source.read_into(other)
        out.add_(other.mul_(0.3))
    return total(out), dot(out, out, room), find_equal(out, 0.0, 1, 0)


@pytest.fixture
def tensors(random: np.random.Generator) -> list[torch.Tensor]:
    values = np.round(random.standard_normal((3, ELEMENTS)) * 4) / 4
    values[:, ::BLOCK] = 0.0  # for every block to have one
    return [torch.from_numpy(v).to(CODES[d]) for v, d in zip(values, DTYPES, strict=True)]


@pytest.fixture
def files(tmp_path: Path, tensors: list[torch.Tensor]) -> Any:
    """Each tensor in a file of its own, at an odd place."""
    opened = []
    for number, tensor in enumerate(tensors):
        path = tmp_path / str(number)
        data = tensor.view(torch.uint8).numpy().tobytes()
        path.write_bytes(b"x" * (7 + number) + data + b"y" * 5)
        opened.append(os.open(path, os.O_RDONLY))
    yield opened
    for descriptor in opened:
        os.close(descriptor)


class Stream:
    """A kernel over the three tensors, from files or from memory."""

    def __init__(self, tensors: list[torch.Tensor], files: list[int] | None, at_once: int) -> None:
        self.program = record(combined, 3, 3)
        self.registers = guarded(library.chunk_elements() * 3, np.float64)
        self.output = torch.full((at_once * BLOCK + 64,), 77, dtype=torch.float16)
        if files is None:
            self.memory = [shifted(tensor, 3) for tensor in tensors]
            places = [(-1, 3)] * 3
        else:
            self.memory = [np.full(BLOCK * t.itemsize + 64, 99, np.uint8) for t in tensors]
            places = [(descriptor, 7 + n) for n, descriptor in enumerate(files)]
        self.kernel = Kernel(
            encode_program(self.program),
            [
                StreamedInput(dtype, descriptor, first_byte, memory.ctypes.data)
                for dtype, (descriptor, first_byte), memory in zip(
                    DTYPES, places, self.memory, strict=True
                )
            ],
            working_dtype="F64",
            registers=self.registers.ctypes.data,
            stores=[],
            output=self.output.data_ptr(),
            output_dtype="F16",
            blocks_at_once=at_once,
        )

    def partial(self, block: int) -> tuple[float, float, int]:
        kernel = self.kernel
        sums = []
        for lane in range(2):
            first = (block * 2 + lane) * LANES
            sums.append(sum_of_lanes(kernel.lanes[first : first + LANES]))
        return (sums[0], sums[1], kernel.counters[block * COUNTERS + 1])


@pytest.mark.parametrize("at_once", [1, 2, 5])
@pytest.mark.parametrize("is_mapped", [False, True])
def test_blocks_at_once_are_blocks_one_by_one(
    tensors: list[torch.Tensor], files: list[int], at_once: int, is_mapped: bool
) -> None:
    stream = Stream(tensors, None if is_mapped else files, at_once)
    for start in range(0, ELEMENTS, at_once * BLOCK):
        stop = min(start + at_once * BLOCK, ELEMENTS)
        stream.kernel.reset()
        assert stream.kernel.stream(start, stop - start, BLOCK) is None
        for number, first in enumerate(range(start, stop, BLOCK)):
            last = min(first + BLOCK, stop)
            block = [tensor[first:last] for tensor in tensors]
            expected, outcome = by_kernels(stream.program, block, "F64", "F16", start=first)
            assert_same(stream.output[first - start : last - start], expected)
            assert stream.partial(number) == outcome
    assert (stream.output[at_once * BLOCK :] == 77).all()
    if not is_mapped:
        for memory in stream.memory:
            assert (memory[-64:] == 99).all(), "read beyond a block's room"


# ------------------------------------------------------- what depends on where a block lies

ROW = 300
ROWS = -(-ELEMENTS // ROW)


def placed(tables: Any, start: int) -> Any:
    """Ranks, random numbers and tables: a function of the row and the place in the tensor."""

    def run(vectors: Any, inputs: Any) -> None:
        out, ranks, draws, room = vectors
        inputs[1].read_into(ranks)
        rank_rows(ranks, ROW)
        inputs[0].read_into(out)
        draw(draws, 2**60 + 1, start, room)
        zero_from(out, draws, ranks.mul_(1 / ROW), room)
        scale_rows(out, tables[0], ROW, start)
        inputs[2].read_into(room)
        scale_columns(room, tables[1], start)
        out.add_(room)

    return run


def by_row_and_column(vectors: Any, inputs: Any) -> Any:
    out, other, room = vectors
    inputs[0].read_into(out)
    inputs[1].read_into(other)
    columns = column_dot(out, other, ROW, 0, room)
    before = row_total(out, ROW)
    wait_for_rows(out)
    inputs[2].read_into(out)
    return before, columns, row_total(out, ROW), total(out)


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_blocks_know_where_they_lie_in_the_tensor(
    tensors: list[torch.Tensor], files: list[int], random: np.random.Generator, at_once: int
) -> None:
    """The store of the ranks is used again by every block of a run; nothing of it is left."""
    assert BLOCK % ROW == 0
    whole = ELEMENTS // ROW * ROW
    tables = [random.standard_normal(ROWS), random.standard_normal(ROW)]
    program = record(placed(tables, 0), 4, 3)
    chunk = library.chunk_elements()
    registers, store = guarded(4 * chunk, np.float64), guarded(BLOCK, np.float64)
    spare = np.zeros(RANKED_BYTES * ROW, np.uint8)
    memory = [np.full(BLOCK * t.itemsize + 64, 99, np.uint8) for t in tensors]
    output = torch.full((at_once * BLOCK + 64,), 77, dtype=torch.float64)
    kernel = Kernel(
        encode_program(program),
        [
            StreamedInput(dtype, descriptor, 7 + number, room.ctypes.data)
            for number, (dtype, descriptor, room) in enumerate(
                zip(DTYPES, files, memory, strict=True)
            )
        ],
        working_dtype="F64",
        registers=registers.ctypes.data,
        stores=[store.ctypes.data],
        spare=spare.ctypes.data,
        output=output.data_ptr(),
        output_dtype="F64",
        blocks_at_once=at_once,
    )
    for start in range(0, whole, at_once * BLOCK):
        stop = min(start + at_once * BLOCK, whole)
        kernel.reset()
        assert kernel.stream(start, stop - start, BLOCK) is None
        for first in range(start, stop, BLOCK):
            last = min(first + BLOCK, stop)
            block = [tensor[first:last] for tensor in tensors]
            expected, _ = by_torch(placed(tables, first), 4, block, "F64")
            assert_same(output[first - start : last - start], expected)
            alone, _ = by_kernels(program, block, "F64", start=first)
            assert_same(alone, expected)
    assert (output[at_once * BLOCK :] == 77).all()
    assert (store[BLOCK:] == 77).all()


def test_lists_of_one_block_leave_nothing_to_the_next(
    tensors: list[torch.Tensor], files: list[int]
) -> None:
    """Sums begin anew, in lists that hold the block's before."""
    program = record(by_row_and_column, 3, 3)
    registers = guarded(3 * library.chunk_elements(), np.float64)
    lengths = list_lengths(program, BLOCK)
    lists = [guarded(length, np.float64) for length in lengths]
    memory = [np.full(BLOCK * t.itemsize + 64, 99, np.uint8) for t in tensors]
    kernel = Kernel(
        encode_program(program),
        [
            StreamedInput(dtype, descriptor, 7 + number, room.ctypes.data)
            for number, (dtype, descriptor, room) in enumerate(
                zip(DTYPES, files, memory, strict=True)
            )
        ],
        working_dtype="F64",
        registers=registers.ctypes.data,
        stores=[],
        lists=[each.ctypes.data for each in lists],
    )
    whole = ELEMENTS // ROW * ROW
    for _ in range(2):
        for start in range(0, whole, BLOCK):
            size = min(BLOCK, whole - start)
            kernel.reset()
            assert kernel.stream(start, size, BLOCK) is None
            block = [tensor[start : start + size] for tensor in tensors]
            _, expected = by_torch(by_row_and_column, 3, block, "F64")
            found = look_up(program.outcome, kernel, [], size, lists)
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one, other)
    for each, length in zip(lists, lengths, strict=True):
        assert (each[length:] == 77).all()


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_file_that_ends_too_early_is_named_by_its_number(
    tmp_path: Path, tensors: list[torch.Tensor], files: list[int], broken: int
) -> None:
    stream = Stream(tensors, files, 5)
    assert stream.kernel.stream(0, ELEMENTS, BLOCK) is None
    item_bytes = tensors[broken].itemsize
    os.truncate(tmp_path / str(broken), 7 + broken + ELEMENTS * item_bytes - 1)
    assert stream.kernel.stream(0, 4 * BLOCK, BLOCK) is None  # it is all there
    assert stream.kernel.stream(4 * BLOCK, 77, BLOCK) == broken
    assert stream.kernel.stream(0, ELEMENTS, BLOCK) == broken


def test_a_descriptor_that_is_none(tensors: list[torch.Tensor], files: list[int]) -> None:
    stream = Stream(tensors, [files[0], 9999, files[2]], 1)
    assert stream.kernel.stream(0, BLOCK, BLOCK) == 1


def test_nothing_to_do(tensors: list[torch.Tensor], files: list[int]) -> None:
    stream = Stream(tensors, files, 1)
    stream.kernel.reset()
    assert stream.kernel.stream(0, 0, BLOCK) is None
    assert stream.partial(0) == (0.0, 0.0, 0)
    assert (stream.output == 77).all()


def test_reset_leaves_nothing(tensors: list[torch.Tensor], files: list[int]) -> None:
    stream = Stream(tensors, files, 5)
    stream.kernel.stream(0, ELEMENTS, BLOCK)
    stream.kernel.reset()
    assert not any(stream.kernel.lanes)
    assert not any(stream.kernel.counters)
    assert ctypes.sizeof(stream.kernel.lanes) == 5 * 2 * LANES * 8
