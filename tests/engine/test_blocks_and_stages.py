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
from lazymerge.engine.blocks import (
    BLOCK_ELEMENTS,
    DEVICE_BLOCK_ELEMENTS,
    WINDOW_BLOCKS,
    DeviceClass,
    block_count,
    block_length,
    block_range,
    elements_per_block,
)
from lazymerge.engine.execution import Execution, Kernels, ReadMode
from lazymerge.engine.native import library
from lazymerge.engine.null import layout_slots, verify_layout
from lazymerge.engine.plan import Plan
from lazymerge.engine.resources import Resources
from lazymerge.engine.stages import (
    BUFFER_ALIGNMENT,
    RUN_BLOCKS,
    DeviceLayout,
    NativeLayout,
    RawLayout,
    Slot,
    StageLayout,
    TorchLayout,
    bytes_read,
    expected_passes,
    is_for_host,
    is_native,
    joined_statistics_bytes,
    row_elements,
    stage_layout,
    stage_operations,
    statistics_bytes,
)
from lazymerge.graph.graph import Graph
from lazymerge.graph.node import Apply, Reduce, Write, as_parameters
from lazymerge.graph.operations.selection import SAMPLE_RUN_ELEMENTS, SAMPLE_RUNS

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


ROWS = [1, 2, 3, 1000, BLOCK_ELEMENTS // 2, BLOCK_ELEMENTS // 2 + 1, BLOCK_ELEMENTS - 1]
ROWS += [BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, 3 * BLOCK_ELEMENTS, DEVICE_BLOCK_ELEMENTS + 1]


@given(st.integers(1, 20 * BLOCK_ELEMENTS) | st.sampled_from(ROWS), st.integers(0, 60))
def test_blocks_of_whole_rows(row: int, rows: int) -> None:
    """As many as fit into a usual block, or one row; on either class of device."""
    elements = rows * row
    classes: list[tuple[DeviceClass, int]] = [
        ("cpu", BLOCK_ELEMENTS),
        ("cuda", DEVICE_BLOCK_ELEMENTS),
    ]
    for device, usual in classes:
        of_a_block = max(1, usual // row)
        assert elements_per_block(device, row) == of_a_block * row
        count = block_count(elements, device, row)
        assert count == -(-rows // of_a_block)
        ranges = [block_range(block, elements, device, row) for block in range(count)]
        starts = [start for start, _ in ranges]
        assert starts == [block * of_a_block * row for block in range(count)]
        assert [stop for _, stop in ranges] == [*starts[1:], elements][:count]
        assert block_length(elements, device, row) == min(of_a_block * row, elements)


@given(st.integers(0, 20 * BLOCK_ELEMENTS), st.integers(0, 20))
def test_where_rows_do_not_matter_blocks_are_the_usual_ones(elements: int, block: int) -> None:
    for device in ("cpu", "cuda"):
        assert block_count(elements, device, 1) == block_count(elements, device)
        assert block_range(block, elements, device, 1) == block_range(block, elements, device)
        assert block_length(elements, device, 1) == block_length(elements, device)


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
    # ranks within rows; statistics of rows and of what is computed; of columns; of many searches
    "della": {
        "base_model": "base",
        "models": [{"model": m, "parameters": {"weight": 1, "density": 0.5}} for m in ("a", "b")],
    },
    "arcee_fusion": {"base_model": "base", "models": [{"model": "a"}]},
    "nuslerp": {
        "models": [{"model": m, "parameters": {"weight": 1}} for m in ("a", "b")],
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "model_stock": {
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"filter_wise": True},
    },
    "sce": {
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"select_topk": 0.5},
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
            name: {"w": torch.zeros(91, 11).to(dtype), "ids": torch.arange(3)}
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
    sizes = {}
    for blocks in (1, 4, 9):
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
    assert sizes[4] == sizes[9]
    grown = [many - one for one, many in zip(sizes[1], sizes[9], strict=True)]
    # one block needs no sample: all its values are candidates
    sample = SAMPLE_RUNS * SAMPLE_RUN_ELEMENTS * 2 * 3 if library.chunk_elements() else 0
    assert grown == [0, sample, 0, 0, 0, 0, 0, 0]  # reductions; the write


# ------------------------------------------------------------------------ rows and columns


def planned(folder: Path, method: str, shape: tuple[int, ...], **parameters: Any) -> Plan:
    """A merge of one tensor."""
    models = {name: {"w": torch.zeros(shape)} for name in ("base", "a", "b")}
    recipe = {"merge_method": method, **RECIPES[method]}
    if parameters:
        recipe["parameters"] = parameters
    return plan_of(folder, recipe, models, Resources(8 << 30, 2, kernels="native"))


def stages_of(plan: Plan) -> dict[str, Reduce | Write]:
    """The stages of the one tensor, by what they are."""
    (task,) = plan.tasks
    names = [s.operation if isinstance(s, Reduce) else "write" for s in task.stages]
    return dict(zip(names, task.stages, strict=True))


def test_which_stages_have_blocks_of_whole_rows(tmp_path: Path) -> None:
    expected = {
        "linear": {"write": 1},
        "ties": {"magnitude_thresholds": 1, "write": 1},
        "della": {"write": 11},
        "model_stock": {"gram_of_rows": 11, "write": 1},
        "nuslerp": {"gram_of_columns": 1, "write": 1},
        "arcee_fusion": {"row_divergence": 11, "largest_values": 1, "write": 1},
    }
    for method, rows in expected.items():
        plan = planned(tmp_path / method, method, (7, 3, 11))
        found = {name: row_elements(plan.graph, stage) for name, stage in stages_of(plan).items()}
        assert found == rows, method


@pytest.mark.parametrize(("shape", "row"), [((), 1), ((30,), 30), ((5, 1), 1), ((2, 3, 4), 4)])
def test_rows_of_tensors_of_any_dimension(tmp_path: Path, shape: tuple[int, ...], row: int) -> None:
    plan = planned(tmp_path, "arcee_fusion", shape)
    assert row_elements(plan.graph, stages_of(plan)["row_divergence"]) == row


def test_a_nested_operation_by_rows_makes_the_stages_blocks(tmp_path: Path) -> None:
    """Whatever a stage computes on the way counts; each once, inputs after those who use them."""
    plan = planned(tmp_path, "della", (7, 11))
    graph = Graph()
    for node in plan.graph:
        if not isinstance(node, Write):
            graph.add(node)
    (mix,) = (node for node in plan.graph if isinstance(node, Apply))
    parameters = as_parameters({"coefficients": (1.0, 1.0, 1.0)})
    inputs = (mix.id, mix.id, mix.inputs[0])
    outer = Apply("linear_combination", parameters, inputs, (), (7, 11), "F64")
    write = Write("w", "F32", (7, 11), graph.add(outer))
    graph.add(write)
    operations = [node.operation for node, _ in stage_operations(graph, write)]
    assert operations == ["linear_combination", "ranked_sign_consensus"]
    assert row_elements(graph, write) == 11
    assert is_for_host(graph, write)
    assert not is_native(graph, write)  # float32 within float64


def test_what_accelerators_leave_to_the_processor(tmp_path: Path) -> None:
    """Ranks, and numbers by row or column; the rest of the merge is theirs."""
    left = {
        "linear": set(),
        "ties": set(),
        "sce": set(),
        "della": {"write"},
        "model_stock": {"gram_of_rows", "write"},
        "nuslerp": {"gram_of_columns", "write"},
        "arcee_fusion": {"row_divergence", "largest_values", "write"},
    }
    for method, expected in left.items():
        plan = planned(tmp_path / method, method, (7, 11))
        on_gpu = plan.with_resources(Resources(8 << 30, 2, device="cuda", vram_limit_bytes=1 << 30))
        found = set()
        for name, stage in stages_of(plan).items():
            assert is_for_host(plan.graph, stage) == (name in expected), (method, name)
            layout = stage_layout(plan.graph, stage, on_gpu.execution)
            if not isinstance(layout, DeviceLayout):
                found.add(name)
        assert found == expected, method


def native(plan: Plan, stage: Reduce | Write) -> NativeLayout:
    layout = stage_layout(plan.graph, stage, Execution("pread", "native"))
    assert isinstance(layout, NativeLayout)
    return layout


def test_lists_and_spare_room_of_the_native_kernels(tmp_path: Path) -> None:
    """A number for every row of a block or every column, for each statistic; and 24 bytes for
    every element of a row that is ranked."""
    rows, row = 3 * BLOCK_ELEMENTS // 1000, 1000
    of_a_block = BLOCK_ELEMENTS // row

    def lists(method: str, name: str, shape: tuple[int, ...] = (rows, row)) -> list[int]:
        folder = tmp_path / f"{method} {name} {len(shape)}"
        plan = planned(folder, method, shape, **RECIPES[method].get("parameters", {}))
        layout = native(plan, stages_of(plan)[name])
        assert {slot.dtype for slot in layout.lists} <= {"F64"}
        by_rows = row_elements(plan.graph, stages_of(plan)[name]) > 1
        assert layout.block_elements == (of_a_block * row if by_rows else BLOCK_ELEMENTS)
        assert (layout.spare is not None) == (method == "della")
        if layout.spare is not None:
            assert (layout.spare.dtype, layout.spare.elements) == ("U8", 24 * row)
            assert len(layout.stores) == 2
        return [slot.elements for slot in layout.lists]

    assert lists("linear", "write") == []
    assert lists("della", "write") == []
    assert lists("arcee_fusion", "row_divergence") == [of_a_block] * 5
    assert lists("arcee_fusion", "write") == []
    assert lists("model_stock", "gram_of_rows") == [of_a_block] * 3
    # columns run along the first dimension
    assert lists("nuslerp", "gram_of_columns") == [row] * 3
    assert lists("nuslerp", "gram_of_columns", (rows, row // 10, 10)) == [row] * 3


def test_as_many_blocks_at_once_as_leave_nothing_behind(tmp_path: Path) -> None:
    """Lists and stores hold one block's; what a write leaves there, nobody looks at."""
    for method, name, expected in (
        ("linear", "write", RUN_BLOCKS),
        ("della", "write", RUN_BLOCKS),
        ("slerp", "gram", RUN_BLOCKS),
        ("ties", "magnitude_thresholds", 1),
        ("arcee_fusion", "row_divergence", 1),
        ("nuslerp", "gram_of_columns", 1),
    ):
        folder = tmp_path / method
        plan = planned(folder, method, (7, 11), **RECIPES[method].get("parameters", {}))
        stage = stages_of(plan)[name]
        assert native(plan, stage).blocks_at_once == expected, method
        mapped = stage_layout(plan.graph, stage, Execution("mmap", "native"))
        assert isinstance(mapped, NativeLayout)
        assert mapped.blocks_at_once == min(expected, WINDOW_BLOCKS), method


def test_one_row_that_is_longer_than_a_block(tmp_path: Path) -> None:
    shape = (2, BLOCK_ELEMENTS + 5)
    plan = planned(tmp_path, "arcee_fusion", shape)
    stages = stages_of(plan)
    layout = native(plan, stages["row_divergence"])
    assert layout.block_elements == BLOCK_ELEMENTS + 5
    assert [slot.elements for slot in layout.lists] == [1] * 5
    assert [slot.elements for slot in layout.raw] == [4 * (BLOCK_ELEMENTS + 5)] * 2
    assert native(plan, stages["write"]).block_elements == BLOCK_ELEMENTS


def test_statistics_that_are_joined_are_counted_by_worker_not_by_task(tmp_path: Path) -> None:
    plan = planned(tmp_path, "nuslerp", (600, 1000), **RECIPES["nuslerp"]["parameters"])
    stages = stages_of(plan)
    (task,) = plan.tasks
    assert statistics_bytes(plan.graph, task) == 0
    assert joined_statistics_bytes(plan.graph, stages["gram_of_columns"]) >= 2 * 3 * 8 * 1000
    assert joined_statistics_bytes(plan.graph, stages["write"]) == 0
    workers = plan.memory.workers
    joined = joined_statistics_bytes(plan.graph, stages["gram_of_columns"])
    assert plan.memory.statistics_bytes == workers * joined
    rows = planned(tmp_path / "rows", "model_stock", (600, 1000), filter_wise=True)
    gram = stages_of(rows)["gram_of_rows"]
    assert joined_statistics_bytes(rows.graph, gram) == 0
    assert statistics_bytes(rows.graph, rows.tasks[0]) >= 2 * 3 * 8 * 600


def test_what_a_task_reads(tmp_path: Path) -> None:
    models = {name: {"w": torch.zeros(1000)} for name in ("base", "a", "b")}
    expected = {  # passes, bytes read
        "linear": (1, 3 * 4000),
        "passthrough": (1, 4000),
        "task_arithmetic": (1, 3 * 4000),
        "slerp": (2, 2 * 2 * 4000),
        "ties": (2, 2 * 3 * 4000),
        "della": (1, 3 * 4000),
        "arcee_fusion": (1 + 2 + 1, 4 * 2 * 4000),  # quartiles without a sample: a guess, and again
        "model_stock": (2, 2 * 3 * 4000),
        "sce": (4, 4 * 3 * 4000),
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
