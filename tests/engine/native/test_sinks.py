"""Blocks that the kernels write themselves: the bytes, their checksum, and what is not finite."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lazymerge.engine.finite import MASKS, WIDTHS
from lazymerge.engine.native import library
from lazymerge.engine.native.library import (
    SHORT_BYTES,
    UNWRITTEN,
    Kernel,
    Sink,
    StreamedInput,
    encode_program,
)
from lazymerge.engine.native.program import decoding
from processors import processor  # noqa: F401 (a fixture)
from xxhash import xxh3_128_digest

from conftest import needs_kernels

pytestmark = [needs_kernels, pytest.mark.usefixtures("processor")]

OFFSET = 13
STRIPE, STIR = 64, 1024
"""Where the checksum's rules change."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "output"


@pytest.fixture
def file(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


class Decoding:
    """Values in memory, written in another dtype."""

    def __init__(self, values: np.ndarray[Any, Any], output_dtype: str, block: int) -> None:
        self.values = np.ascontiguousarray(values, np.float32)
        self.block = block
        width = WIDTHS[output_dtype]
        self.output = np.zeros(width * max(block, len(values)) + 64, np.uint8)
        self.registers = np.zeros(library.chunk_elements(), np.float64)
        self.kernel = Kernel(
            encode_program(decoding()),
            [StreamedInput("F32", -1, 0, self.values.ctypes.data)],
            working_dtype="F64",
            registers=self.registers.ctypes.data,
            stores=[],
            output=self.output.ctypes.data,
            output_dtype=output_dtype,
        )
        self.width = width

    def run(self, start: int, stop: int, sink: Sink | None = None) -> int | None:
        return self.kernel.stream(start, stop - start, self.block, sink)

    def expected(self) -> bytes:
        """What leaves the kernels without a sink."""
        assert self.run(0, len(self.values)) is None
        return self.output[: self.width * len(self.values)].tobytes()


def lengths() -> list[int]:
    """Of data in bytes, at and around all places where rules change."""
    edges = [SHORT_BYTES + 1, *range(256, 2 * STIR + 1, STRIPE), 9 * STIR, 70_000]
    return sorted({n + d for n in edges for d in (-1, 0, 1) if n + d > SHORT_BYTES})


@pytest.mark.parametrize("block", [1, 7, 32, 33, 250, 512, 4096])
def test_checksums_are_those_of_xxhash(
    path: Path, file: int, random: np.random.Generator, block: int
) -> None:
    """Of 2 bytes an element, and however they are cut."""
    for size in lengths():
        work = Decoding(random.standard_normal(-(-size // 2)), "BF16", block)
        sink = Sink()
        sink.begin(file, 0, MASKS["BF16"])
        assert work.run(0, len(work.values), sink) is None
        written = path.read_bytes()[: 2 * len(work.values)]
        assert sink.digest() == xxh3_128_digest(written), size


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("block", [150, 1024, 1500])
def test_what_is_written_is_what_would_have_been_left(
    path: Path, file: int, random: np.random.Generator, dtype: str, block: int
) -> None:
    for count in (block, block + 1, 7 * block - 1):
        work = Decoding(random.standard_normal(count), dtype, block)
        expected = work.expected()
        sink = Sink()
        sink.begin(file, OFFSET, MASKS[dtype])
        assert work.run(0, count, sink) is None
        assert path.read_bytes()[OFFSET : OFFSET + len(expected)] == expected
        assert sink.digest() == xxh3_128_digest(expected)
        assert sink.offset == OFFSET + len(expected)
        assert not sink.is_nonfinite


def test_several_calls_make_one_checksum(
    path: Path, file: int, random: np.random.Generator
) -> None:
    """A call for each window of a mapped file; then another span, which knows of none before."""
    work = Decoding(random.standard_normal(3001), "F16", 250)
    expected = work.expected()
    sink = Sink()
    for _ in range(2):
        sink.begin(file, OFFSET, MASKS["F16"])
        for start in range(0, 3001, 1000):
            assert work.run(start, min(start + 1000, 3001), sink) is None
        assert sink.digest() == xxh3_128_digest(expected)
    assert path.read_bytes()[OFFSET:] == expected


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), None])
def test_what_is_not_finite_is_seen_in_any_block(
    file: int, random: np.random.Generator, dtype: str, value: float | None
) -> None:
    for place in (0, 99, 100, 350, 419):
        values = random.standard_normal(420)
        if value is not None:
            values[place] = value
        work = Decoding(values, dtype, 100)
        sink = Sink()
        sink.begin(file, 0, MASKS[dtype])
        assert work.run(0, 420, sink) is None
        assert bool(sink.is_nonfinite) == (value is not None)
        sink.begin(file, 0, MASKS[dtype])
        assert Decoding(np.ones(420), dtype, 100).run(0, 420, sink) is None
        assert not sink.is_nonfinite  # what was found before is forgotten


def test_a_write_that_fails_says_why_and_how_much_is_missing(random: np.random.Generator) -> None:
    work = Decoding(random.standard_normal(420), "F32", 100)
    sink = Sink()
    full = os.open("/dev/full", os.O_WRONLY)
    sink.begin(full, 0, MASKS["F32"])
    assert work.run(0, 420, sink) == UNWRITTEN
    assert (sink.error, sink.unwritten) == (errno.ENOSPC, 400)
    os.close(full)
    sink.begin(full, 0, MASKS["F32"])
    assert work.run(320, 420, sink) == UNWRITTEN
    assert (sink.error, sink.unwritten) == (errno.EBADF, 400)
    assert sink.is_nonfinite == 0
