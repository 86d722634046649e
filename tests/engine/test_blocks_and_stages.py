"""Blocks cover a tensor exactly; a stage's buffers never overlap, for every method and dtype."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lazymerge.checkpoint import DTYPES
from lazymerge.engine.blocks import BLOCK_ELEMENTS, block_count, block_length, block_range
from lazymerge.engine.execution import Execution, Kernels, ReadMode
from lazymerge.engine.native import library
from lazymerge.engine.null import layout_slots, verify_layout
from lazymerge.engine.plan import Resources
from lazymerge.engine.stages import (
    BUFFER_ALIGNMENT,
    RUN_BLOCKS,
    NativeLayout,
    RawLayout,
    Slot,
    StageLayout,
    TorchLayout,
    bytes_read,
    expected_passes,
    stage_layout,
    statistics_bytes,
)

from conftest import write_checkpoint
from merging import plan_of

NEAR_BOUNDARIES = [n * BLOCK_ELEMENTS + d for n in (0, 1, 2, 7) for d in (-1, 0, 1)]


@given(
    st.integers(0, 20 * BLOCK_ELEMENTS) | st.sampled_from([n for n in NEAR_BOUNDARIES if n >= 0])
)
def test_blocks_cover_every_element_once(elements: int) -> None:
    ranges = [block_range(block, elements) for block in range(block_count(elements))]
    assert [start for start, _ in ranges] == [0, *[stop for _, stop in ranges]][: len(ranges)]
    assert (ranges[-1][1] if ranges else 0) == elements
    lengths = [stop - start for start, stop in ranges]
    assert all(length == BLOCK_ELEMENTS for length in lengths[:-1])
    assert max(lengths, default=0) == block_length(elements)


def test_the_size_of_a_block_is_part_of_the_format() -> None:
    # It decides how reductions round. Changing it changes outputs: raise the version with it.
    assert BLOCK_ELEMENTS == 262_144


RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"models": [{"model": m, "parameters": {"weight": 1}} for m in ("base", "a", "b")]},
    "passthrough": {"models": [{"model": "a"}]},
    "task_arithmetic": {
        "base_model": "base",
        "models": [{"model": m, "parameters": {"weight": 1}} for m in ("a", "b")],
    },
    "slerp": {
        "base_model": "base",
        "models": [{"model": "base"}, {"model": "a"}],
        "parameters": {"t": 0.5},
    },
    "ties": {
        "base_model": "base",
        "models": [{"model": m, "parameters": {"weight": 1, "density": 0.5}} for m in ("a", "b")],
    },
}
KERNELS: list[Kernels] = ["native", "torch"]
MODES: list[ReadMode] = ["pread", "mmap"]
INPUTS = [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn]
OUTPUTS = [None, "float64", "float32", "bfloat16", "float8_e5m2"]


@pytest.mark.parametrize("method", RECIPES)
def test_buffers_are_aligned_and_apart(tmp_path: Path, method: str) -> None:
    seen: Counter[tuple[type[StageLayout], str]] = Counter()
    for number, (base, other, out) in enumerate(product(INPUTS, INPUTS, OUTPUTS)):
        folder = tmp_path / str(number)
        models = {
            name: {"w": torch.zeros(1001).to(dtype), "ids": torch.arange(3)}
            for name, dtype in (("base", base), ("a", other), ("b", torch.float16))
        }
        recipe = {"merge_method": method, **RECIPES[method]}
        planned = plan_of(folder, recipe | ({"out_dtype": out} if out else {}), models)
        for kernels, mode in product(KERNELS, MODES):
            plan = planned.with_resources(Resources(8 << 30, 2, mode, kernels))
            for stage in chain.from_iterable(task.stages for task in plan.tasks):
                layout = stage_layout(plan.graph, stage, plan.execution)
                verify_layout(layout, plan.memory.arena_bytes)
                # by hand too, and that the check has seen every buffer there is
                slots = list(slots_within(layout))
                assert set(slots) == set(layout_slots(layout))
                ends = sorted(
                    (s.offset, s.offset + s.elements * DTYPES[s.dtype].item_bytes) for s in slots
                )
                assert all(stop <= start for (_, stop), (start, _) in pairwise(ends))
                assert all(start % BUFFER_ALIGNMENT == 0 for start, _ in ends)
                assert ends[-1][1] <= layout.size_bytes < ends[-1][1] + BUFFER_ALIGNMENT
                seen[type(layout), kernels] += 1
    merges = len(INPUTS) ** 2 * len(OUTPUTS)
    assert seen.total() >= 2 * len(KERNELS) * len(MODES) * merges
    assert seen[NativeLayout, "torch"] == 0
    assert seen[RawLayout, "native"] == seen[RawLayout, "torch"] > 0
    if library.is_available():
        assert seen[NativeLayout, "native"] > seen[TorchLayout, "native"]


def slots_within(value: Any) -> Iterator[Slot]:
    """Every Slot that is somewhere in a layout."""
    if isinstance(value, Slot):
        yield value
    elif isinstance(value, Mapping):
        yield from slots_within(tuple(value.values()))
    elif isinstance(value, tuple):
        for part in value:
            yield from slots_within(part)
    elif is_dataclass(value):
        yield from slots_within(tuple(getattr(value, field.name) for field in fields(value)))


def test_buffers_are_of_a_few_blocks_however_large_the_tensor(tmp_path: Path) -> None:
    """Of one, and the native kernels' output of RUN_BLOCKS."""
    sizes = {}
    for blocks in (1, RUN_BLOCKS, RUN_BLOCKS + 1, 9):
        models = {
            name: {"w": torch.zeros(blocks * BLOCK_ELEMENTS, dtype=torch.bfloat16)}
            for name in ("base", "a", "b")
        }
        recipe = {"merge_method": "ties", **RECIPES["ties"]}
        plan = plan_of(tmp_path / str(blocks), recipe, models)
        (task,) = plan.tasks
        sizes[blocks] = [
            stage_layout(plan.graph, stage, Execution(mode, kernels)).size_bytes
            for stage in task.stages
            for kernels, mode in product(KERNELS, MODES)
        ]
    assert sizes[RUN_BLOCKS] == sizes[RUN_BLOCKS + 1] == sizes[9]
    grown = [many - one for one, many in zip(sizes[1], sizes[9], strict=True)]
    more_output = (RUN_BLOCKS - 1) * BLOCK_ELEMENTS * 2
    native = [more_output] * 2 if library.chunk_elements() else [0, 0]
    assert grown == [0, 0, 0, 0, *native, 0, 0]  # reductions; the write, by torch


def test_what_a_task_reads(tmp_path: Path) -> None:
    models = {name: {"w": torch.zeros(1000)} for name in ("base", "a", "b")}
    expected = {  # passes, bytes read
        "linear": (1, 3 * 4000),
        "passthrough": (1, 4000),
        "task_arithmetic": (1, 3 * 4000),
        "slerp": (2, 2 * 2 * 4000),
        "ties": (2, 2 * 3 * 4000),
    }
    for name in models:
        write_checkpoint(tmp_path / name, models[name])
    for method, (passes, size) in expected.items():
        plan = plan_of(tmp_path, {"merge_method": method, **RECIPES[method]}, {})
        (task,) = plan.tasks
        assert (expected_passes(task), bytes_read(plan.graph, task)) == (passes, size), method
        assert (statistics_bytes(plan.graph, task) > 0) == (passes > 1)
        assert plan.bytes_read == size
        assert plan.passes == {passes: 1}
