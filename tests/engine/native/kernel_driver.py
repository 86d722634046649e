"""Operations run by the native kernels, by torch, and unfused, on vectors in memory.

What is run is a function of vectors, as the `run` of an operation is: called with torch tensors it
computes, called with registers it is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from lazymerge.engine.native import library
from lazymerge.engine.native.library import (
    COUNTERS,
    LANES,
    RANKED_BYTES,
    Kernel,
    StreamedInput,
    encode_program,
)
from lazymerge.engine.native.program import Code, Outcome, Program, _Recording, fuse
from lazymerge.graph.vector import Counts, spread, sum_of_lanes

CODES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
WORKING = {"F32": torch.float32, "F64": torch.float64}
WRITTEN = ["F64", "F32", "F16", "BF16"]

GUARD = 64
"""Elements behind every buffer that must stay as they were."""

Run = Callable[[Sequence[Any], Sequence[Any]], Any]
"""run(vectors, inputs): works on the vectors, whose first is the result; inputs have read_into."""


@dataclass
class TensorInput:
    """A tensor as the input of an operation that computes at once."""

    tensor: torch.Tensor

    def read_into(self, out: torch.Tensor) -> None:
        out.copy_(self.tensor)


def record(run: Run, vectors: int, inputs: int, *, fused: bool = True) -> Program:
    """What `run` asks of its vectors, as a program."""
    recording = _Recording()
    registers = recording.registers(vectors)
    outcome = run(registers, [recording.input(number) for number in range(inputs)])
    instructions = recording.recorder.instructions
    if fused:
        instructions = fuse(instructions, result=0)
    return replace(recording.program(outcome), instructions=tuple(instructions))


def by_torch(
    run: Run, vectors: int, inputs: Sequence[torch.Tensor], working: str
) -> tuple[torch.Tensor, Any]:
    """The result and what `run` returned. Vectors hold nan at first."""
    size = len(inputs[0])
    buffers = [torch.full((size,), torch.nan, dtype=WORKING[working]) for _ in range(vectors)]
    outcome = run(buffers, [TensorInput(tensor) for tensor in inputs])
    return buffers[0], outcome


def by_kernels(
    program: Program,
    inputs: Sequence[torch.Tensor],
    working: str,
    output: str | None = None,
    *,
    rounds_once: bool = False,
    start: int = 0,
    misaligned: int = 0,
) -> tuple[torch.Tensor, Any]:
    """The output in its dtype (the working one if not given) and what the recorded function
    returned.

    start: flat index of the block's first element.
    misaligned: bytes by which the inputs lie off their natural place.
    """
    assert library._library() is not None
    size = len(inputs[0])
    number = np.float64 if working == "F64" else np.float32
    chunk = library.chunk_elements()
    registers = guarded(chunk * program.registers, number)
    stores = [guarded(size, number) for _ in range(program.stores)]
    lengths = list_lengths(program, size)
    lists = [guarded(length, np.float64) for length in lengths]
    ranked = max((i.k for i in program.instructions if i.code is Code.RANK_ROWS), default=0)
    spare = np.full(RANKED_BYTES * ranked + GUARD, 77, np.uint8)
    dtype = CODES[output or working]
    out = torch.full((size + GUARD,), 77, dtype=dtype)
    held = [shifted(tensor, misaligned) for tensor in inputs]
    kernel = Kernel(
        encode_program(program),
        [
            StreamedInput(name_of(tensor.dtype), -1, misaligned, memory.ctypes.data)
            for tensor, memory in zip(inputs, held, strict=True)
        ],
        working_dtype=working,
        registers=registers.ctypes.data,
        stores=[store.ctypes.data for store in stores],
        lists=[each.ctypes.data for each in lists],
        spare=spare.ctypes.data,
        output=out.data_ptr(),
        output_dtype=output or working,
        rounds_once=rounds_once,
    )
    kernel.reset()
    for place, memory in enumerate(held):
        kernel.inputs[place] = memory.ctypes.data + misaligned
    kernel.run(start, size)
    for memory, elements in (
        (registers, chunk * program.registers),
        (spare, RANKED_BYTES * ranked),
        *((store, size) for store in stores),
        *zip(lists, lengths, strict=True),
    ):
        assert (memory[elements:] == 77).all(), "written beyond a buffer"
    assert (out[size:].double() == 77).all(), "written beyond the output"
    return out[:size], look_up(program.outcome, kernel, stores, size, lists)


def list_lengths(program: Program, size: int) -> list[int]:
    """Numbers that a block of that size leaves in each list."""
    lengths = {}
    for instruction in program.instructions:
        if instruction.code is Code.DOT_COLUMNS:
            lengths[instruction.dst] = instruction.k
        elif instruction.code in (Code.DOT_ROWS, Code.SUM_ROWS, Code.MAX_ROWS):
            lengths[instruction.dst] = size // instruction.k
    assert sorted(lengths) == list(range(program.lists))
    return [lengths[number] for number in range(program.lists)]


def guarded(elements: int, number: Any) -> Any:
    memory = np.full(elements + GUARD, np.nan, dtype=number)
    memory[elements:] = 77
    return memory


def shifted(tensor: torch.Tensor, offset: int) -> Any:
    """The tensor's bytes in memory of their own, `offset` bytes from a natural place."""
    memory = np.zeros(offset + tensor.numel() * tensor.itemsize + 64, np.uint8)
    if tensor.numel():
        data = tensor.contiguous().view(torch.uint8).numpy()
        memory[offset : offset + len(data)] = data
    return memory


def name_of(dtype: torch.dtype) -> str:
    return next(name for name, code in CODES.items() if code == dtype)


def look_up(
    outcome: Any, kernel: Kernel, stores: Sequence[Any], size: int, lists: Sequence[Any] = ()
) -> Any:
    """What a function returned, with the numbers that the kernels have left."""
    if isinstance(outcome, tuple | list):
        return type(outcome)(look_up(part, kernel, stores, size, lists) for part in outcome)
    if not isinstance(outcome, Outcome):
        return outcome
    if outcome.kind == "sum":
        return sum_of_lanes(kernel.lanes[outcome.lane * LANES : (outcome.lane + 1) * LANES])
    if outcome.kind == "largest":
        return max(kernel.lanes[outcome.lane * LANES : (outcome.lane + 1) * LANES])
    if outcome.kind == "copy":
        return stores[outcome.store][:size].copy()
    if outcome.kind == "rows":
        return lists[outcome.list][: size // outcome.row_elements].copy()
    if outcome.kind == "columns":
        return lists[outcome.list][: outcome.row_elements].copy()
    first = outcome.counter * COUNTERS
    above, inside = kernel.counters[first], kernel.counters[first + 1]
    if outcome.kind == "index":
        return inside
    values = stores[outcome.store][: inside if outcome.collects else 0]
    return Counts(above, inside, spread(values, outcome.quota))


def integers(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bits, all nan as one."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    bits = tensor.contiguous().view(kind)
    return torch.where(torch.isnan(tensor.double()), torch.full_like(bits, 0x7F), bits)


def assert_same(actual: torch.Tensor, expected: torch.Tensor, message: str = "") -> None:
    """Bit for bit, but for what a nan carries."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    differ = torch.nonzero(integers(actual) != integers(expected)).flatten()
    nan = torch.isnan(actual.double()) != torch.isnan(expected.double())
    assert not nan.any(), f"{message} nan at {torch.nonzero(nan).flatten()[:5].tolist()}"
    assert len(differ) == 0, (
        f"{message} {len(differ)} of {len(actual)} differ, first at {differ[0]}: "
        f"{actual[differ[0]].item()!r} for {expected[differ[0]].item()!r}"
    )


AWKWARD = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1.5,
    float("inf"),
    -float("inf"),
    float("nan"),
    2.0**-149,
    -(2.0**-149),
    2.0**-126,
    1.1754942e-38,
    3.4028234663852886e38,
    -3.4028234663852886e38,
    2.0**-133,
    65504.0,
    65520.0,
    1e-30,
    448.0,
    1 + 2.0**-23,
]
"""Values at which one implementation may go another way than the other; all are float32."""


def awkward_numbers(random: np.random.Generator, size: int, working: str) -> torch.Tensor:
    """A mix of normal deviates of all scales and AWKWARD."""
    values = random.standard_normal(size) * 2.0 ** random.integers(-60, 60, size)
    places = random.random(size) < 0.3
    values[places] = random.choice(AWKWARD, int(places.sum()))
    with np.errstate(over="ignore"):
        return torch.from_numpy(values).to(WORKING[working])
