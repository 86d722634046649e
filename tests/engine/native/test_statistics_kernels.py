"""The kernels of statistics against the same operation in numpy: equal to the bit."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_driver import by_kernels
from lazymerge.engine.native.program import record_reduce
from lazymerge.graph.operations.statistics import MergeStatistics, gathered

from conftest import needs_kernels


@needs_kernels
@settings(max_examples=60)
@given(
    count=st.one_of(st.integers(1, 40), st.integers(1000, 1100)),
    vectors=st.integers(3, 6),
    is_wide=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_kernels_and_torch_agree_to_the_bit(
    count: int, vectors: int, is_wide: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-38, 1e30, math.inf, -math.inf, math.nan, 1.0])
    tensors = []
    for _ in range(vectors):
        values = torch.randn(count, generator=generator)
        chosen = torch.randint(len(special), (count,), generator=generator)
        is_special = torch.rand(count, generator=generator) < 0.3
        values = torch.where(is_special, special[chosen], values)
        tensors.append(values.double() if is_wide else values)
    operation = MergeStatistics()
    parameters = {"is_merge": True}
    program = record_reduce(operation, list(range(vectors)), vectors, parameters, None)
    _, found = by_kernels(program, tensors, "F64" if is_wide else "F32")
    reference, *changes = [tensor.clone() for tensor in tensors]
    for change in changes:
        change.sub_(reference)
    expected = gathered(reference, changes, is_merge=True)
    assert np.array_equal(found, expected, equal_nan=True)
