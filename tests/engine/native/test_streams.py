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
    guarded,
    record,
    shifted,
)
from lazymerge.engine.native import library
from lazymerge.engine.native.library import (
    COUNTERS,
    LANES,
    Kernel,
    StreamedInput,
    encode_program,
)
from lazymerge.graph.vector import dot, find_equal, sum_of_lanes, total
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
