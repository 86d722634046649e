"""One contract for all executors: null, reference, and the block engine in both read modes with
native kernels and with torch.

Each executor's class inherits the tests; `outputs` is all that it has to say of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lazymerge.checkpoint import DTYPES
from lazymerge.engine import blocks
from lazymerge.engine.execution import Execution
from lazymerge.engine.null import IllegalPlanError, layout_slots, verify_layout, walk_plan
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import make_plan
from lazymerge.engine.reference import run_reference
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.engine.stages import (
    NativeLayout,
    NodeSlots,
    RawLayout,
    Slot,
    StageLayout,
    TorchLayout,
    stage_layout,
)
from lazymerge.errors import InputError
from lazymerge.graph.graph import Graph
from lazymerge.graph.node import Apply, Read, Reduce, Write, as_parameters
from lazymerge.graph.operation import (
    ApplyOperation,
    BlockInput,
    Cost,
    Done,
    Parameters,
    Pass,
    ReduceOperation,
    Sample,
    register,
)
from lazymerge.graph.operations import selection
from lazymerge.graph.vector import Vector, copy_of
from lazymerge.output.layout import OutputTensor, lay_out

from conftest import needs_kernels, write_checkpoint
from merging import bits, plan_of, run
from reference import assert_within_ulps, to_float64

BLOCK = 64
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {
        "merge_method": "linear",
        "models": [
            {"model": "base", "parameters": {"weight": 0.25}},
            {"model": "a", "parameters": {"weight": 0.5}},
            {"model": "b", "parameters": {"weight": 1.0}},
        ],
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "out_dtype": "float32",
        "models": [
            {"model": "a", "parameters": {"weight": 0.5}},
            {"model": "b", "parameters": {"weight": -0.25}},
        ],
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "base",
        "models": [{"model": "base"}, {"model": "a"}],
        "parameters": {"t": [0.25, 0.75]},
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.5, "density": 0.5}},
            {"model": "b", "parameters": {"weight": 0.25, "density": 0.3}},
        ],
    },
    "ties of some": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.5, "density": 0.0}},
            {"model": "b", "parameters": {"weight": 0.25}},
        ],
    },
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.5, "density": 0.5, "gamma": 0.1}},
            {"model": "b", "parameters": {"weight": 0.25, "density": 0.4}},
        ],
    },
    "dare_ties": {
        "merge_method": "dare_ties",
        "base_model": "base",
        "seed": 5,
        "models": [
            {"model": "a", "parameters": {"weight": 0.5, "density": 0.5}},
            {"model": "b", "parameters": {"weight": 0.25, "density": 0.3}},
        ],
    },
    "dare_linear": {
        "merge_method": "dare_linear",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.5, "density": 0.5}},
            {"model": "b", "parameters": {"weight": 0.25, "density": 0.3}},
        ],
    },
    "della": {
        "merge_method": "della",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.5, "density": 0.5}},
            {"model": "b", "parameters": {"weight": 0.25, "density": 0.3, "epsilon": 0.2}},
        ],
    },
    "sce": {
        "merge_method": "sce",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"select_topk": 0.4},
    },
    "arcee_fusion": {
        "merge_method": "arcee_fusion",
        "base_model": "base",
        "models": [{"model": "a"}],
    },
    "nuslerp of columns": {
        "merge_method": "nuslerp",
        "models": [{"model": m, "parameters": {"weight": w}} for m, w in (("a", 1), ("base", 2))],
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "model_stock of rows": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"filter_wise": True},
    },
    "passthrough": {"merge_method": "passthrough", "models": [{"model": "a"}]},
    "passthrough, rounded": {
        "merge_method": "passthrough",
        "out_dtype": "float16",
        "models": [{"model": "a", "parameters": {"scale": 0.5}}],
    },
}


def models() -> dict[str, dict[str, torch.Tensor]]:
    """Three models on a coarse grid: layers, a scalar, an empty tensor, integers, an optional."""
    random = np.random.default_rng(11)

    def grid(*shape: int) -> torch.Tensor:
        return torch.from_numpy(np.array(random.integers(-15, 16, shape) / 4))

    made: dict[str, dict[str, torch.Tensor]] = {}
    for name, dtype in (
        ("base", torch.bfloat16),
        ("a", torch.float32),
        ("b", torch.float8_e4m3fn),
    ):
        made[name] = {
            "model.layers.0.w.weight": grid(7, 33).to(dtype),
            "model.layers.1.w.weight": grid(5, 64).to(dtype),
            "model.norm.weight": grid(64).to(torch.float64),
            "scalar": grid().to(dtype),
            "empty": grid(0, 4).to(dtype),
            "steps": torch.arange(200),
            "flags": torch.tensor([True, False, True]),
            "lm_head.weight": grid(9, 11).to(dtype),
        }
    del made["b"]["lm_head.weight"]
    return made


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", BLOCK)
    monkeypatch.setattr(selection, "CANDIDATES", 2 * BLOCK)
    monkeypatch.setattr(selection, "MIN_BLOCK_CANDIDATES", 4)
    monkeypatch.setattr(selection, "SAMPLE_RUNS", 8)
    monkeypatch.setattr(selection, "SAMPLE_RUN_ELEMENTS", 8)


@pytest.fixture(params=RECIPES)
def plan(request: pytest.FixtureRequest, tmp_path: Path) -> Plan:
    return plan_of(tmp_path, RECIPES[request.param], models())


@register
class LargestElement(ReduceOperation[float, float]):
    """Of a sample first (parameter is_sampled), then of all; of each block no more is kept."""

    name = "test_largest_element"
    is_recordable = True

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=1, stores=1)

    def statistics_bytes(self, *_: Any) -> int:
        return 1000

    def expected_passes(self, parameters: Parameters) -> int:
        return 1

    def sample(self, parameters: Parameters, element_count: int) -> Sample | None:
        return Sample(3, 10) if parameters["is_sampled"] else None

    def first_pass(self, parameters: Parameters, *_: Any) -> Pass:
        sample = self.sample(parameters, 0)
        return Pass("all" if sample is None else "some", sample=sample)

    def run(
        self,
        inputs: Sequence[BlockInput],
        parameters: Parameters,
        state: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> Any:
        inputs[0].read_into(scratch[0])
        return copy_of(scratch[0])

    def summary(self, partial: Any, parameters: Parameters) -> float:
        return float(partial.max())

    def finish(
        self, parameters: Parameters, element_count: int, state: str, partials: Sequence[float]
    ) -> Pass | Done[float]:
        assert all(type(partial) is float for partial in partials)
        return Pass("all") if state == "some" else Done(max(partials))


@register
class TimesStatistic(ApplyOperation):
    """x times its statistic."""

    name = "test_times_statistic"
    is_recordable = True

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=0)

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Any:
        return statistics[0]

    def run(
        self,
        out: Vector,
        inputs: Sequence[BlockInput],
        prepared: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> None:
        inputs[0].read_into(out)
        out.mul_(prepared)


class ExecutorContract:
    """What holds of every executor, whether it computes or not."""

    def outputs(self, plan: Plan, folder: Path) -> dict[str, int]:
        """Element count of every output tensor."""
        raise NotImplementedError

    def test_yields_every_output_whole(self, plan: Plan, tmp_path: Path) -> None:
        expected = {write.name: write.element_count for write in plan.graph.writes}
        assert expected
        assert self.outputs(plan, tmp_path / "out") == expected


class ComputingContract(ExecutorContract):
    """What holds of executors that yield values."""

    rounds_at_the_end = True

    def execute(self, plan: Plan, folder: Path) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def outputs(self, plan: Plan, folder: Path) -> dict[str, int]:
        return {name: tensor.numel() for name, tensor in self.execute(plan, folder).items()}

    def test_shapes_and_dtypes(self, plan: Plan, tmp_path: Path) -> None:
        outputs = self.execute(plan, tmp_path / "out")
        for write in plan.graph.writes:
            dtype = DTYPES[write.dtype]
            unrounded = dtype.is_float and not self.rounds_at_the_end
            expected = torch.float64 if unrounded else getattr(torch, dtype.torch_name)
            assert outputs[write.name].dtype == expected
            assert tuple(outputs[write.name].shape) == write.shape

    def test_integers_are_the_inputs(self, plan: Plan, tmp_path: Path) -> None:
        outputs = self.execute(plan, tmp_path / "out")
        for name in ("steps", "flags"):
            assert bits(outputs[name]) == bits(models()["base"][name])

    def test_within_an_ulp_of_the_reference(self, plan: Plan, tmp_path: Path) -> None:
        outputs = self.execute(plan, tmp_path / "out")
        expected = run_reference(plan.graph)
        slack = 2.0**-20 if plan.recipe.merge_method == "ties" else 2.0**-45
        for write in plan.graph.writes:
            if DTYPES[write.dtype].is_float:
                actual = outputs[write.name]
                assert_within_ulps(
                    actual, to_float64(expected[write.name]), actual.dtype, slack=slack
                )

    def test_the_order_of_tensors_in_files_does_not_matter(
        self, tmp_path: Path, plan: Plan
    ) -> None:
        first = self.execute(plan, tmp_path / "first")
        for number, (name, tensors) in enumerate(models().items()):
            for file in (tmp_path / name).iterdir():
                file.unlink()
            write_checkpoint(tmp_path / name, dict(reversed(tensors.items())), shards=number + 2)
        again = plan_of_same_folders(plan)
        second = self.execute(again, tmp_path / "second")
        assert {name: bits(t) for name, t in first.items()} == {
            name: bits(t) for name, t in second.items()
        }

    def test_nothing_is_left_of_another_run(self, plan: Plan, tmp_path: Path) -> None:
        first = self.execute(plan, tmp_path / "first")
        second = self.execute(plan, tmp_path / "second")
        assert all(bits(first[name]) == bits(second[name]) for name in first)

    def test_unequal_integers_are_refused(self, tmp_path: Path) -> None:
        unequal = models()
        unequal["b"]["steps"][150] += 1
        plan = plan_of(tmp_path, RECIPES["linear"], unequal)
        with pytest.raises(InputError, match=r"tensor steps .* differs between .*base and .*b;"):
            self.execute(plan, tmp_path / "out")

    @pytest.mark.parametrize("consensus", ["F32", "F64"])
    def test_nested_operations(self, tmp_path: Path, consensus: str) -> None:
        """Apply of Apply, Reduce of Apply, float32 results in float64 sums; or all in float64."""
        plan = nested_plan(tmp_path, consensus)
        outputs = self.execute(plan, tmp_path / "out")
        base, a, b = (
            to_float64(models()[m]["model.layers.1.w.weight"]) for m in ("base", "a", "b")
        )
        expected = 0.5 * base + 0.5 * a - base + b  # ties of λ = 0 is the base, slerp of t = 0 a
        actual = outputs["model.layers.1.w.weight"].float()
        assert_within_ulps(actual, expected, torch.float32, slack=1e-14)

    @pytest.mark.parametrize("is_sampled", [False, True])
    def test_of_what_blocks_return_the_summary_is_kept(
        self, tmp_path: Path, is_sampled: bool
    ) -> None:
        plan = plan_of(tmp_path, RECIPES["linear"] | {"out_dtype": "float32"}, models())
        name = "model.layers.0.w.weight"
        (checkpoint, *_) = plan.checkpoints.values()
        graph = Graph()
        read = graph.add(Read(checkpoint.folder, checkpoint.tensors[name]))
        shape = checkpoint.tensors[name].shape
        parameters = as_parameters({"is_sampled": is_sampled})
        largest = graph.add(Reduce("test_largest_element", parameters, (read,), (), shape, "F32"))
        times = Apply("test_times_statistic", (), (read,), (largest,), shape, "F32")
        graph.add(Write(name, "F32", shape, graph.add(times)))
        shards = lay_out([OutputTensor(name, "F32", shape)], 1 << 30)
        changed = replace(plan, graph=graph, shards=shards)
        outputs = self.execute(
            changed.with_resources(Resources(4 << 30, workers=2)), tmp_path / "out"
        )
        values = models()["base"][name].double()
        assert torch.equal(outputs[name].double(), values * values.max())


def plan_of_same_folders(plan: Plan) -> Plan:
    return make_plan(plan.recipe, Resources(4 << 30, workers=2))


def nested_plan(folder: Path, consensus_dtype: str = "F32") -> Plan:
    """(½ base + ½ a) − ties(base, a, b; λ = 0) + b, over one tensor; and a slerp, for a Reduce.

    consensus_dtype: what ties computes in; all else is float64.
    """
    name = "model.layers.1.w.weight"
    plan = plan_of(folder, {**RECIPES["linear"], "out_dtype": "float32"}, models())
    reads = [
        Read(checkpoint.folder, checkpoint.tensors[name])
        for checkpoint in plan.checkpoints.values()
    ]
    graph = Graph()
    base, a, b = (graph.add(read) for read in reads)
    shape = reads[0].shape

    def apply(
        operation: str,
        dtype: str,
        inputs: list[str],
        statistics: tuple[str, ...] = (),
        **values: Any,
    ) -> str:
        return graph.add(
            Apply(operation, as_parameters(values), tuple(inputs), statistics, shape, dtype)
        )

    half = apply("linear_combination", "F64", [base, a], coefficients=(0.5, 0.5))
    consensus = apply(
        "sign_consensus",
        consensus_dtype,
        [base, a, b],
        weights=(1.0, 1.0),
        kinds=("keep", "keep"),
        is_rescaled=False,
        normalize=True,
        **{"lambda": 0.0},
    )
    gram = graph.add(Reduce("gram", (), (half, consensus), (), shape, "F64"))
    none_of_it = apply("slerp", "F64", [half, consensus], (gram,), t=0.0)
    result = apply(
        "linear_combination",
        "F64",
        [none_of_it, consensus, b],
        coefficients=(1.0, -1.0, 1.0),
    )
    graph.add(Write(name, "F32", shape, result))
    return replace(
        plan, graph=graph, shards=lay_out([OutputTensor(name, "F32", shape)], 1 << 30)
    ).with_resources(Resources(4 << 30, workers=2))


class TestReference(ComputingContract):
    rounds_at_the_end = False

    def execute(self, plan: Plan, folder: Path) -> dict[str, torch.Tensor]:
        return run_reference(plan.graph)


class BlocksContract(ComputingContract):
    resources = Resources(4 << 30, workers=2)
    layout_of_nested: type[StageLayout] = TorchLayout

    def execute(self, plan: Plan, folder: Path) -> dict[str, torch.Tensor]:
        return run(plan.with_resources(self.resources), folder)

    def test_same_bytes_as_one_worker(self, plan: Plan, tmp_path: Path) -> None:
        single = plan.with_resources(Resources(4 << 30, 1, "pread", "torch"))
        expected = run(single, tmp_path / "single")
        actual = self.execute(plan, tmp_path / "out")
        assert all(bits(expected[name]) == bits(actual[name]) for name in expected)

    @pytest.mark.parametrize("consensus", ["F32", "F64"])
    def test_same_bytes_of_nested_operations(self, tmp_path: Path, consensus: str) -> None:
        plan = nested_plan(tmp_path, consensus)
        expected = run(
            plan.with_resources(Resources(4 << 30, 1, "pread", "torch")), tmp_path / "single"
        )
        actual = self.execute(plan, tmp_path / "out")
        assert all(bits(expected[name]) == bits(actual[name]) for name in expected)

    def test_who_computes_nested_operations(self, tmp_path: Path) -> None:
        """The native kernels, where there is one working dtype."""
        for consensus, expected in (("F32", TorchLayout), ("F64", self.layout_of_nested)):
            plan = nested_plan(tmp_path / consensus, consensus).with_resources(self.resources)
            for stage in plan.tasks[0].stages:
                assert type(stage_layout(plan.graph, stage, plan.execution)) is expected


class TestBlocksByPread(BlocksContract):
    resources = Resources(4 << 30, workers=3, read_mode="pread", kernels="torch")


class TestBlocksMapped(BlocksContract):
    resources = Resources(4 << 30, workers=3, read_mode="mmap", kernels="torch")


@needs_kernels
class TestNativeByPread(BlocksContract):
    resources = Resources(4 << 30, workers=3, read_mode="pread", kernels="native")
    layout_of_nested = NativeLayout


@needs_kernels
class TestNativeMapped(BlocksContract):
    resources = Resources(4 << 30, workers=3, read_mode="mmap", kernels="native")
    layout_of_nested = NativeLayout


class TestNull(ExecutorContract):
    def outputs(self, plan: Plan, folder: Path) -> dict[str, int]:
        widths = {write.name: DTYPES[write.dtype].item_bytes for write in plan.graph.writes}
        written = walk_plan(plan).bytes_written
        return {name: size // widths[name] for name, size in written.items()}

    def test_reads_nothing(self, plan: Plan, tmp_path: Path) -> None:
        for file in tmp_path.glob("*/*"):
            file.unlink()
        assert walk_plan(plan).jobs

    def test_bytes_are_those_of_the_plan(self, plan: Plan) -> None:
        walk = walk_plan(plan)
        assert sum(walk.bytes_read.values()) == plan.bytes_read
        assert walk.arena_bytes == plan.memory.arena_bytes
        headers = sum(shard.header_bytes for shard in plan.shards)
        assert sum(walk.bytes_written.values()) + headers == plan.bytes_written

    def test_bytes_are_those_of_a_run(self, plan: Plan, tmp_path: Path) -> None:
        report = run_plan(plan, tmp_path / "out", fsync=False)
        walk = walk_plan(plan)
        full, samples = (sum(read.values()) for read in (walk.bytes_read, walk.sample_bytes_read))
        searches = [
            stage
            for task in plan.tasks
            for stage in task.reductions
            if stage.operation in ("magnitude_thresholds", "largest_values")
        ]
        if searches:  # may need further passes; where there is no sample, one is less than expected
            once_less = sum(
                read.tensor.size_bytes
                for stage in searches
                if not dict(stage.parameters).get("is_sampled", True)
                for read in plan.graph.reads_of(stage.id)
            )
            assert full - once_less + samples <= report.bytes_read
        else:
            assert full == report.bytes_read
        assert sum(walk.bytes_written.values()) == report.bytes_written

    def test_jobs_of_ties(self, tmp_path: Path) -> None:
        """A sample, one full pass, then the write; for every tensor that is merged."""
        walk = walk_plan(plan_of(tmp_path, RECIPES["ties"], models()))
        name = "model.layers.0.w.weight"
        jobs = [job for job in walk.jobs if job.tensor == name]
        assert [(job.operation, job.is_sample, job.blocks, job.elements) for job in jobs] == [
            ("magnitude_thresholds", True, 1, 64),
            ("magnitude_thresholds", False, 4, 231),
            ("write", False, 4, 231),
        ]
        assert walk.bytes_read[name] == 2 * 231 * (2 + 4 + 1)
        assert walk.sample_bytes_read[name] == 64 * (2 + 4 + 1)

    def test_spans_of_consecutive_blocks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tensors = {"t": torch.zeros(40 * BLOCK + 1)}
        recipe = {"merge_method": "passthrough", "models": [{"model": "a"}]}
        walk = walk_plan(plan_of(tmp_path, recipe, {"a": tensors}))
        assert [(job.first, job.blocks) for job in walk.jobs] == [(0, 16), (16, 16), (32, 9)]
        assert sum(job.elements for job in walk.jobs) == 40 * BLOCK + 1

    def test_an_arena_that_is_too_small_shows(self, plan: Plan) -> None:
        short = replace(plan, memory=replace(plan.memory, arena_bytes=plan.memory.arena_bytes - 64))
        with pytest.raises(IllegalPlanError, match="leaves the arena"):
            walk_plan(short)

    def test_a_sample_that_does_not_fit_shows(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = plan_of(tmp_path, RECIPES["ties"], models())
        monkeypatch.setattr(selection, "SAMPLE_RUNS", 9)
        with pytest.raises(IllegalPlanError, match="a block of 72 elements"):
            walk_plan(plan)

    def test_a_tensor_without_a_place_shows(self, plan: Plan) -> None:
        shard = plan.shards[0]
        with pytest.raises((IllegalPlanError, KeyError)):
            walk_plan(replace(plan, shards=(replace(shard, tensors=shard.tensors[1:]),)))


# ---------------------------------------------------------------------------- layouts


Layout = Callable[..., TorchLayout | NativeLayout | RawLayout]


def torch_layout(*slots: Slot, size_bytes: int = 1 << 20) -> TorchLayout:
    return TorchLayout((slots[0],), None, None, (), {"n": NodeSlots(None, slots[1:])}, size_bytes)


def native_layout(*slots: Slot, size_bytes: int = 1 << 20) -> NativeLayout:
    """Of the slots one after the other: registers, input, list, ranking, store, output."""
    registers, raw, lists, spare, stores, output = (
        (slots[place],) if place < len(slots) else () for place in range(6)
    )
    return NativeLayout(
        raw=raw,
        registers=registers[0],
        register_count=1,
        stores=stores,
        lists=lists,
        spare=spare[0] if spare else None,
        block_elements=BLOCK,
        output=output[0] if output else None,
        blocks_at_once=1,
        rounds_once=False,
        size_bytes=size_bytes,
    )


def raw_layout(*slots: Slot, size_bytes: int = 1 << 20) -> RawLayout:
    return RawLayout(slots, size_bytes)


layouts = pytest.mark.parametrize("layout_of", [torch_layout, native_layout, raw_layout])


@layouts
def test_a_sound_layout_is_accepted(layout_of: Layout) -> None:
    verify_layout(layout_of(Slot(0, "U8", 64), Slot(64, "F32", 16), Slot(128, "F64", 8)), 192)


@layouts
@pytest.mark.parametrize(
    ("slots", "problem"),
    [
        ([Slot(0, "U8", 65), Slot(64, "F32", 16)], "overlaps"),
        ([Slot(0, "F32", 16), Slot(0, "F32", 16)], "overlaps"),
        ([Slot(0, "U8", 64), Slot(68, "F32", 1)], "not aligned"),
        ([Slot(0, "U8", 64), Slot(64, "F64", 9)], "leaves the arena"),
        ([Slot(0, "U8", 64), Slot(64, "U8", 1), Slot(64, "F64", 1)], "overlaps"),
    ],
)
def test_unsound_layouts_are_refused(layout_of: Layout, slots: list[Slot], problem: str) -> None:
    with pytest.raises(IllegalPlanError, match=problem):
        verify_layout(layout_of(*slots), 128)


@pytest.mark.parametrize("place", range(6))
def test_every_buffer_of_the_native_kernels_is_looked_at(place: int) -> None:
    slots = [Slot(64 * number, "U8", 64) for number in range(6)]
    verify_layout(native_layout(*slots), 64 * 6)
    slots[place] = replace(slots[place], offset=slots[place].offset + 8)
    with pytest.raises(IllegalPlanError, match="not aligned"):
        verify_layout(native_layout(*slots), 64 * 7)


def test_every_buffer_of_a_layout_is_looked_at(tmp_path: Path) -> None:
    plans = (
        nested_plan(tmp_path / "nested"),
        nested_plan(tmp_path / "native", "F64"),
        plan_of(tmp_path / "ties", RECIPES["ties"], models()),
        plan_of(tmp_path / "della", RECIPES["della"], models()),
        plan_of(tmp_path / "fusion", RECIPES["arcee_fusion"], models()),
        plan_of(tmp_path / "columns", RECIPES["nuslerp of columns"], models()),
    )
    seen = set()
    for plan, kernels, mode in product(plans, ("native", "torch"), ("pread", "mmap")):
        execution = Execution(mode, kernels)
        for task in plan.tasks:
            for stage in task.stages:
                layout = stage_layout(plan.graph, stage, execution)
                total = sum(
                    -(-slot.elements * DTYPES[slot.dtype].item_bytes // 64) * 64
                    for slot in layout_slots(layout)
                )
                assert total == layout.size_bytes
                seen.add((type(layout), kernels))
    assert (NativeLayout, "native") in seen
    assert (NativeLayout, "torch") not in seen
    assert {(TorchLayout, "torch"), (RawLayout, "native"), (TorchLayout, "native")} <= seen


def test_a_result_shared_by_users_of_both_dtypes_has_a_buffer_of_its_own(tmp_path: Path) -> None:
    plan = nested_plan(tmp_path)
    graph = Graph()
    nodes = list(plan.graph)
    reads = [graph.add(node) for node in nodes if isinstance(node, Read)]
    consensus = next(n for n in nodes if isinstance(n, Apply) and n.operation == "sign_consensus")
    graph.add(consensus)
    first_user = replace(consensus, inputs=(consensus.id, *reads[1:]))
    graph.add(first_user)
    last = Apply(
        "linear_combination",
        as_parameters({"coefficients": (1.0, 1.0)}),
        (first_user.id, consensus.id),
        (),
        consensus.shape,
        "F64",
    )
    write = Write("t", "F32", last.shape, graph.add(last))
    graph.add(write)
    layout = stage_layout(graph, write, Execution())  # two dtypes: torch, whatever is built
    assert isinstance(layout, TorchLayout)
    assert layout.nodes[consensus.id].out is not None


def test_reference_is_unrounded(tmp_path: Path) -> None:
    third = {"t": torch.tensor([1.0], dtype=torch.bfloat16)}
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": "a", "parameters": {"scale": 1 / 3}}],
    }
    plan = plan_of(tmp_path, recipe, {"a": third})
    assert run_reference(plan.graph)["t"].tolist() == [1 / 3]
