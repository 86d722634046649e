"""What the tests of devices share: small blocks, models of several, runs on the host device."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lazymerge.engine import blocks
from lazymerge.engine.device.host import HostDevice
from lazymerge.engine.device.interface import Device
from lazymerge.engine.null import walk_plan
from lazymerge.engine.plan import Plan
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import RunReport, run_plan
from lazymerge.graph.graph import Graph
from lazymerge.graph.node import Apply, Read, Reduce, Write, as_parameters
from lazymerge.graph.operations import selection
from lazymerge.output.layout import OutputTensor, lay_out
from safetensors.torch import load_file

from merging import plan_of

BLOCK = 64
DEVICE_BLOCK = 96
"""Not the processor's, so that a block of the wrong class shows."""

MEMORY = 8 << 30
VRAM = 1 << 30

INCOMING, COMPUTING, OUTGOING = range(3)
LATE: list[tuple[int, ...]] = list(
    chain.from_iterable(combinations((INCOMING, COMPUTING, OUTGOING), n) for n in range(4))
)
"""Every choice of queues that do nothing until somebody waits for them."""


def use_small_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(blocks, "BLOCK_ELEMENTS", BLOCK)
    patch.setattr(blocks, "DEVICE_BLOCK_ELEMENTS", DEVICE_BLOCK)
    patch.setattr(selection, "CANDIDATES", 2 * BLOCK)
    patch.setattr(selection, "MIN_BLOCK_CANDIDATES", 4)
    patch.setattr(selection, "SAMPLE_RUNS", 8)
    patch.setattr(selection, "SAMPLE_RUN_ELEMENTS", 8)


def models() -> dict[str, dict[str, torch.Tensor]]:
    """Three models of different dtypes: blocks with ragged tails, one element, none, integers."""
    random = np.random.default_rng(5)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.from_numpy(np.array(random.normal(size=shape)))

    made: dict[str, dict[str, torch.Tensor]] = {}
    for name, dtype in (
        ("base", torch.bfloat16),
        ("a", torch.float32),
        ("b", torch.float8_e5m2),
    ):
        made[name] = {
            "model.layers.0.w.weight": numbers(7, 5 * DEVICE_BLOCK // 7 + 1).to(dtype),
            "model.layers.1.w.weight": numbers(4, DEVICE_BLOCK).to(dtype),
            "model.layers.2.w.weight": numbers(DEVICE_BLOCK + 1).to(dtype),
            "model.norm.weight": numbers(301).to(torch.float64),
            "scalar": numbers().to(dtype),
            "empty": numbers(0, 4).to(dtype),
            "steps": torch.arange(200),
            "flags": torch.tensor([True, False, True]),
        }
    return made


RECIPES: dict[str, dict[str, Any]] = {
    "linear": {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 0.3}} for m in ("base", "a", "b")],
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "out_dtype": "float32",
        "models": [
            {"model": "a", "parameters": {"weight": 0.6}},
            {"model": "b", "parameters": {"weight": -0.25}},
        ],
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "base",
        "models": [{"model": "base"}, {"model": "a"}],
        "parameters": {"t": 0.4},
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.6, "density": 0.37}},
            {"model": "b", "parameters": {"weight": 0.25, "density": 0.5}},
        ],
    },
    "ties, rescaled": {
        "merge_method": "ties",
        "base_model": "base",
        "out_dtype": "float16",
        "models": [
            {"model": "a", "parameters": {"weight": 0.6, "density": 0.2}},
            {"model": "b", "parameters": {"weight": 0.25}},
        ],
        "parameters": {"rescale": True, "lambda": 0.9},
    },
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.6, "density": 0.4, "gamma": 0.1}},
            {"model": "b", "parameters": {"weight": 0.25, "density": 0.5}},
        ],
    },
    "dare_ties": {
        "merge_method": "dare_ties",
        "base_model": "base",
        "seed": 3,
        "models": [
            {"model": "a", "parameters": {"weight": 0.6, "density": 0.4}},
            {"model": "b", "parameters": {"weight": 0.25, "density": 0.5}},
        ],
    },
    "dare_linear": {
        "merge_method": "dare_linear",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.6, "density": 0.4}},
            {"model": "b", "parameters": {"weight": 0.25}},
        ],
    },
    "sce": {
        "merge_method": "sce",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"select_topk": 0.3},
    },
    "nearswap": {
        "merge_method": "nearswap",
        "base_model": "base",
        "models": [{"model": "a"}],
        "parameters": {"t": 0.5},
    },
    # partly or wholly left to the processor
    "della": {
        "merge_method": "della",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.6, "density": 0.4}},
            {"model": "b", "parameters": {"weight": 0.25, "density": 0.5}},
        ],
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
    "passthrough": {"merge_method": "passthrough", "models": [{"model": "a"}]},
    "passthrough, rounded": {
        "merge_method": "passthrough",
        "out_dtype": "float16",
        "models": [{"model": "a"}],
    },
    "passthrough, widened": {
        "merge_method": "passthrough",
        "out_dtype": "float64",
        "models": [{"model": "b", "parameters": {"scale": 0.5}}],
    },
}


LEFT_TO_THE_PROCESSOR = ("della", "arcee_fusion")
"""Of these a device computes nothing, or a scalar."""

DRAWING = ("dare_ties", "dare_linear", "della")
"""These draw random numbers."""


def on_device(plan: Plan, workers: int = 2, vram: int | None = VRAM, **options: Any) -> Plan:
    """The same merge, planned for a GPU."""
    resources = Resources(MEMORY, workers, device="cuda", vram_limit_bytes=vram, **options)
    return plan.with_resources(resources)


def run_on(device: Device, plan: Plan, output: Path) -> tuple[RunReport, dict[str, torch.Tensor]]:
    """Walk a plan, run it on a device, and load what it has written."""
    walk_plan(plan)
    report = run_plan(plan, output, fsync=False, overwrite=True, device=device)
    merged: dict[str, torch.Tensor] = {}
    for file in sorted(output.glob("*.safetensors")):
        merged.update(load_file(file))
    return report, merged


def run_on_host(plan: Plan, output: Path, late: Collection[int] = ()) -> dict[str, torch.Tensor]:
    return run_on(HostDevice(2 * VRAM, late), plan, output)[1]


def nested_plan(folder: Path) -> Plan:
    """slerp(½ base + ½ a, ties(base, a, b)) − ties(base, a, b) + b, in float32: Apply of Apply of
    the other working dtype, one Apply used twice, a Reduce of both."""
    name = "model.layers.0.w.weight"
    plan = plan_of(folder, {**RECIPES["linear"], "out_dtype": "float32"}, models())
    graph = Graph()
    base, a, b = (
        graph.add(Read(checkpoint.folder, checkpoint.tensors[name]))
        for checkpoint in plan.checkpoints.values()
    )
    shape = graph.block_node(base).shape

    def apply(operation: str, dtype: str, inputs: list[str], *uses: str, **values: Any) -> str:
        parameters = as_parameters(values)
        return graph.add(Apply(operation, parameters, tuple(inputs), uses, shape, dtype))

    half = apply("linear_combination", "F64", [base, a], coefficients=(0.5, 0.5))
    flags = {"kinds": ("keep",) * 2, "is_rescaled": False, "normalize": True, "lambda": 0.5}
    consensus = apply("sign_consensus", "F32", [base, a, b], weights=(1.0, 0.7), **flags)
    gram = graph.add(Reduce("gram", (), (half, consensus), (), shape, "F64"))
    between = apply("slerp", "F64", [half, consensus], gram, t=0.3)
    parts = [between, consensus, b]
    result = apply("linear_combination", "F64", parts, coefficients=(1.0, -1.0, 1.0))
    graph.add(Write(name, "F32", shape, result))
    shards = lay_out([OutputTensor(name, "F32", shape)], 1 << 30)
    return replace(plan, graph=graph, shards=shards).with_resources(Resources(MEMORY, 2))
