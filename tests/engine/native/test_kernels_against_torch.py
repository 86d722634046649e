"""Every instruction, every dtype: the kernels' bits are torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kernel_driver import (
    AWKWARD,
    CODES,
    WORKING,
    WRITTEN,
    assert_same,
    awkward_numbers,
    by_kernels,
    by_torch,
    record,
)
from lazymerge.engine.native import library
from lazymerge.engine.native.library import DTYPE_NUMBERS, WRITTEN_DTYPES, float8_values
from lazymerge.engine.native.program import Code
from lazymerge.graph.random_bits import stream_key
from lazymerge.graph.vector import (
    draw,
    drop_largest,
    exponential,
    keep_largest,
    logarithm,
    zero_from,
    zero_up_to,
)
from processors import processor  # noqa: F401 (a fixture)

from conftest import needs_kernels

pytestmark = [needs_kernels, pytest.mark.usefixtures("processor")]

working_dtypes = pytest.mark.parametrize("working", WORKING)

SIZES = [1, 2, 15, 16, 17, 1023, 1024, 1025, 2048, 3 * 1024 + 5]


def two(work: Callable[[Any, Any], Any]) -> Callable[..., None]:
    """A run of an instruction on two registers that hold inputs 0 and 1."""

    def run(vectors: Any, inputs: Any) -> None:
        inputs[0].read_into(vectors[0])
        inputs[1].read_into(vectors[1])
        work(vectors[0], vectors[1])

    return run


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "copy": lambda a, b: a.copy_(b),
    "add": lambda a, b: a.add_(b),
    "sub": lambda a, b: a.sub_(b),
    "mul": lambda a, b: a.mul_(b),
    "div": lambda a, b: a.div_(b),
    "add to itself": lambda a, b: a.add_(a),
    "subtract from itself": lambda a, b: a.sub_(a),
    "square": lambda a, b: a.mul_(a),
    "divide by itself": lambda a, b: a.div_(a),
    "abs": lambda a, b: a.abs_(),
}
SCALAR: dict[str, Callable[[Any, float], Any]] = {
    "add": lambda a, x: a.add_(x),
    "sub": lambda a, x: a.sub_(x),
    "mul": lambda a, x: a.mul_(x),
    "max": lambda a, x: a.clamp_min_(x),
    "min": lambda a, x: a.clamp_max_(x),
    "ge": lambda a, x: a.ge_(x),
    "gt": lambda a, x: a.gt_(x),
    "eq": lambda a, x: a.eq_(x),
}
SCALARS = [*AWKWARD, 0.1, -0.3, 1e-46, 1e-310, 1 / 3]


def both(run: Any, inputs: list[torch.Tensor], working: str, message: str = "") -> None:
    expected, _ = by_torch(run, 2, inputs, working)
    program = record(run, 2, len(inputs))
    for misaligned in (0, 1, 4):
        actual, _ = by_kernels(program, inputs, working, misaligned=misaligned)
        assert_same(actual, expected, message)


@working_dtypes
@pytest.mark.parametrize("name", BINARY)
def test_instructions_on_two_vectors(name: str, working: str, random: np.random.Generator) -> None:
    grid = torch.tensor(AWKWARD, dtype=WORKING[working])
    pairs = [grid.repeat(len(grid)), grid.repeat_interleave(len(grid))]
    both(two(BINARY[name]), pairs, working)
    for size in SIZES:
        both(two(BINARY[name]), [awkward_numbers(random, size, working) for _ in "ab"], working)


@working_dtypes
@pytest.mark.parametrize("name", SCALAR)
def test_instructions_with_a_number(name: str, working: str, random: np.random.Generator) -> None:
    values = [torch.tensor(AWKWARD, dtype=WORKING[working])]
    values += [awkward_numbers(random, size, working) for size in (1, 1025)]
    for x in SCALARS:
        if name in ("max", "min") and x != x:
            continue  # no bound

        def run(vectors: Any, inputs: Any, x: float = x) -> None:
            inputs[0].read_into(vectors[0])
            SCALAR[name](vectors[0], x)

        for block in values:
            both(run, [block], working, f"{name} {x}")


@working_dtypes
def test_numbers_are_rounded_to_the_working_dtype_first(working: str) -> None:
    """0.1 is no float32: compared with the float32 next to it, it must be that float32."""
    tenth = torch.tensor([0.1], dtype=WORKING[working])
    for compare in (lambda v: v.ge_(0.1), lambda v: v.eq_(0.1)):

        def run(vectors: Any, inputs: Any, compare: Any = compare) -> None:
            inputs[0].read_into(vectors[0])
            compare(vectors[0])

        assert by_kernels(record(run, 1, 1), [tenth], working)[0].tolist() == [1.0]


CUTS: dict[str, Callable[..., None]] = {
    "keep": lambda vectors, *threshold: keep_largest(vectors[0], *threshold),
    "drop": lambda vectors, *threshold: drop_largest(vectors[0], *threshold, vectors[1]),
}


@working_dtypes
@pytest.mark.parametrize("name", CUTS)
def test_cutting_at_a_threshold(name: str, working: str, random: np.random.Generator) -> None:
    number = np.float64 if working == "F64" else np.float32
    values = np.round(random.standard_normal(2600) * 4) / 4
    values[::50] = random.choice(AWKWARD, 52)
    block = torch.from_numpy(values).to(WORKING[working])
    for value in (0.0, 0.25, 0.5, 3.0, float("inf"), 2.0**-149):
        below = float(np.nextafter(number(value), number(0)))
        for start in (0, 1000, 5_000_000_000):
            for stop in (0, 1, 15, 1023, 1024, 1025, 2000, 2599, 2600, 99999):
                stop_index = start + stop - (7 if stop == 99999 else 0)
                check_cut(name, block, (value, below, stop_index), start, working)
    # stops outside of the block, and where the last of equal ones survive
    for stop_index in (0, 999, -5):
        check_cut(name, block, (0.5, 0.25, stop_index), 1000, working)
    for stop_index in (1000, 2024, 3000, 9999):
        check_cut(name, block, (0.25, 0.5, stop_index), 1000, working)


def check_cut(
    name: str,
    block: torch.Tensor,
    threshold: tuple[float, float, int],
    start: int,
    working: str,
) -> None:
    def run(vectors: Any, inputs: Any) -> None:
        inputs[0].read_into(vectors[0])
        CUTS[name](vectors, *threshold, start)

    expected, _ = by_torch(run, 2, [block], working)
    actual, _ = by_kernels(record(run, 2, 1), [block], working, start=start)
    assert_same(actual, expected, f"{name} {threshold} {start}")


# ----------------------------------------------------------------- zeroing by another vector


def zeroing(work: Callable[..., None]) -> Callable[..., None]:
    """A run on three registers that hold the inputs, and room."""

    def run(vectors: Any, inputs: Any) -> None:
        for vector, source in zip(vectors, inputs, strict=False):
            source.read_into(vector)
        work(*vectors)

    return run


ZEROING: dict[str, Callable[..., None]] = {
    "up to": lambda a, b, c, room: zero_up_to(a, b, 0.3, room),
    "up to, of itself": lambda a, b, c, room: zero_up_to(a, a, 0.3, room),
    "from": lambda a, b, c, room: zero_from(a, b, 0.3, room),
    "from, of itself": lambda a, b, c, room: zero_from(a, a, 0.3, room),
    "from others": lambda a, b, c, room: zero_from(a, b, c, room),
    "from others, of itself": lambda a, b, c, room: zero_from(a, a, c, room),
    "from itself": lambda a, b, c, room: zero_from(a, b, a, room),
}


@working_dtypes
@pytest.mark.parametrize("name", ZEROING)
def test_zeroing(name: str, working: str, random: np.random.Generator) -> None:
    run = zeroing(ZEROING[name])
    program = record(run, 4, 3)
    grid = torch.tensor(AWKWARD, dtype=WORKING[working])
    count = len(grid)
    every_pair = [grid.repeat(count), grid.repeat_interleave(count), grid.repeat(count).flip(0)]
    blocks = [every_pair]
    for size in SIZES:
        made = [awkward_numbers(random, size, working) for _ in "abc"]
        made[2][::3] = made[1][::3]  # equal ones
        blocks.append(made)
    for inputs in blocks:
        expected, _ = by_torch(run, 4, inputs, working)
        assert_same(by_kernels(program, inputs, working)[0], expected, name)


@working_dtypes
@pytest.mark.parametrize("function", [zero_up_to, zero_from])
def test_zeroing_by_any_number(
    function: Callable[..., None], working: str, random: np.random.Generator
) -> None:
    grid = torch.tensor(AWKWARD, dtype=WORKING[working])
    inputs = [grid.repeat(len(grid)), grid.repeat_interleave(len(grid))]
    for limit in [*SCALARS, float("-inf")]:
        for place in (0, 1):  # compared with itself, and with another

            def run(vectors: Any, inputs: Any, limit: float = limit, place: int = place) -> None:
                for vector, source in zip(vectors, inputs, strict=False):
                    source.read_into(vector)
                function(vectors[0], vectors[place], limit, vectors[2])

            expected, _ = by_torch(run, 3, inputs, working)
            actual, _ = by_kernels(record(run, 3, 2), inputs, working)
            assert_same(actual, expected, f"{limit} {place}")


# ----------------------------------------------------------------------------- random bits


@working_dtypes
def test_random_numbers(working: str, random: np.random.Generator) -> None:
    """Of any start and length: groups of counters begin and end within a chunk."""
    starts = [0, 1, 2, 3, 4, 63, 64, 65, 1000, 2**18 + 1, 2**33 + 7, 2**34 - 5, 2**40 + 2]
    for key in (0, -1, 2**63 - 1, -(2**63), stream_key(42, 1, "w"), 0x1234_5678_9ABC_DEF0):

        def run(vectors: Any, inputs: Any, key: int = key, start: int = 0) -> None:
            inputs[0].read_into(vectors[1])
            draw(vectors[0], key, start, vectors[2])

        program = record(run, 3, 1)
        for start in [*starts, int(random.integers(0, 2**40))]:
            for size in (1, 2, 3, 4, 5, 63, 64, 65, 127, 1023, 1024, 1025, 3000):
                blank = torch.zeros(size, dtype=WORKING[working])
                expected = torch.full_like(blank, torch.nan)
                draw(expected, key, start, torch.empty_like(blank))
                actual, _ = by_kernels(program, [blank], working, start=start)
                assert_same(actual, expected, f"key {key} start {start} size {size}")


# ------------------------------------------------------------- exponentials and logarithms


def of_one(function: Callable[..., None]) -> Callable[..., None]:
    def run(vectors: Any, inputs: Any) -> None:
        inputs[0].read_into(vectors[0])
        function(*vectors)

    return run


def check_function(function: Callable[..., None], values: np.ndarray) -> None:
    run = of_one(function)
    block = torch.from_numpy(values)
    expected, _ = by_torch(run, 3, [block], "F64")
    assert_same(by_kernels(record(run, 3, 1), [block], "F64")[0], expected)


def test_exponentials(random: np.random.Generator) -> None:
    """The bits of graph/vector.py, over all that they are defined for and at its ends."""
    halves = np.arange(-2042, 2046) * (np.log(2) / 2)  # where powers of two change
    check_function(
        exponential,
        np.concatenate(
            [
                random.uniform(-720, 709, 100_000),
                random.uniform(-1, 1, 50_000),
                random.standard_normal(20_000) * 10.0 ** random.uniform(-320, 2, 20_000),
                *(np.nextafter(halves, end) for end in (-np.inf, halves, np.inf)),
                [709.0, -707.9, -708.0, -708.1, -745.0, -1e308, -np.inf, np.nan, 0.0, -0.0],
            ]
        ),
    )
    for size in SIZES:
        check_function(exponential, random.uniform(-40, 3, size))


def test_logarithms(random: np.random.Generator) -> None:
    powers = 2.0 ** np.arange(-1022, 1024)
    check_function(
        logarithm,
        np.concatenate(
            [
                10.0 ** random.uniform(-307.6, 308.2, 100_000),
                random.uniform(0.5, 2, 100_000),
                *(powers * factor for factor in (1, np.sqrt(2), np.nextafter(np.sqrt(2), 0))),
                np.nextafter(powers[1:], 0),
                [np.finfo(np.float64).max, np.finfo(np.float64).tiny, np.inf, np.nan],
            ]
        ),
    )
    for size in SIZES:
        check_function(logarithm, random.uniform(1e-3, 1e3, size))


# ------------------------------------------------------------------------- reading inputs


def every_code(dtype: str, random: np.random.Generator) -> torch.Tensor:
    """Every bit pattern of a narrow dtype, a million at random of a wide one."""
    size = CODES[dtype].itemsize
    if size <= 2:
        kind = torch.uint8 if size == 1 else torch.int16
        return torch.arange(256**size).to(torch.int32).to(kind).view(CODES[dtype])
    bits = random.integers(0, 2**32, (1 << 20) * size // 4, dtype=np.uint32)
    return torch.from_numpy(bits.view(np.int32)).view(CODES[dtype])


@working_dtypes
@pytest.mark.parametrize("dtype", CODES)
def test_every_code_is_decoded_as_torch_does(
    dtype: str, working: str, random: np.random.Generator
) -> None:
    def run(vectors: Any, inputs: Any) -> None:
        inputs[0].read_into(vectors[0])

    codes = every_code(dtype, random)
    program = record(run, 1, 1)
    expected = codes.to(WORKING[working])
    for misaligned in (0, 1):
        assert_same(by_kernels(program, [codes], working, misaligned=misaligned)[0], expected)
    for size in SIZES:  # loops have tails
        part = codes[100 : 100 + size] if size <= len(codes) - 100 else codes[:size]
        assert_same(by_kernels(program, [part], working)[0], part.to(WORKING[working]))


LOADS: dict[Code, Callable[[Any, Any], None]] = {
    Code.LOAD: lambda v, i: i[1].read_into(v[0]),
    Code.LOAD_SUB: lambda v, i: (i[1].read_into(v[1]), v[1].sub_(v[0]), v[0].copy_(v[1])),
    Code.LOAD_MUL: lambda v, i: (i[1].read_into(v[0]), v[0].mul_(0.3)),
    Code.LOAD_MUL_ADD: lambda v, i: (i[1].read_into(v[1]), v[0].add_(v[1].mul_(0.3))),
    Code.LOAD_SUB_MUL_ADD: lambda v, i: (
        i[1].read_into(v[1]),
        v[0].add_(v[1].sub_(v[2]).mul_(0.3)),
    ),
    Code.MUL_ADD: lambda v, i: (
        i[1].read_into(v[1]),
        v[1].abs_(),
        v[0].add_(v[1].mul_(0.3)),
    ),
}


@working_dtypes
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("code", LOADS)
def test_fused_instructions_of_every_dtype_round_as_their_parts_do(
    code: Code, dtype: str, working: str, random: np.random.Generator
) -> None:
    def run(vectors: Any, inputs: Any) -> None:
        inputs[0].read_into(vectors[0])
        inputs[2].read_into(vectors[2])
        LOADS[code](vectors, inputs)

    codes = every_code(dtype, random)[:70_000]
    inputs = [awkward_numbers(random, len(codes), working), codes]
    inputs.append(awkward_numbers(random, len(codes), working))
    program = record(run, 3, 3)
    assert code in [instruction.code for instruction in program.instructions]
    expected, _ = by_torch(run, 3, inputs, working)
    assert_same(by_kernels(program, inputs, working)[0], expected)
    assert_same(by_kernels(record(run, 3, 3, fused=False), inputs, working)[0], expected)


def test_the_tables_of_eight_bit_floats_are_torchs() -> None:
    for dtype in ("F8_E4M3", "F8_E5M2"):
        codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(CODES[dtype])
        table = torch.tensor(float8_values(dtype), dtype=torch.float64)
        assert_same(table, codes.double())


def test_what_is_read_and_written_is_tested_here() -> None:
    assert set(DTYPE_NUMBERS) == set(CODES)
    assert set(WRITTEN_DTYPES) == set(WRITTEN)
    assert all(library.reads(dtype) for dtype in CODES)
    assert not library.reads("I32")
    assert not library.writes("F8_E4M3")
