"""Merges of tensor cases from recipe to file, and their comparison with the references."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from lazymerge.engine import blocks
from lazymerge.engine.execution import Kernels
from lazymerge.engine.native import library
from lazymerge.engine.resources import Resources
from lazymerge.errors import InputError
from lazymerge.graph.operations import selection
from tensor_cases import BLOCK, DTYPE_NAMES, DTYPES, Family

from merging import Tensors, bits, plan_of, run
from reference import assert_within_ulps, to_float64

ALL_KERNELS: list[Kernels] = ["native", "torch"] if library.is_available() else ["torch"]

WEIGHTS = st.sampled_from([0.0, 1.0, -1.0, 0.3, 0.7, -0.25, 2.5, 1e-3])
EIGHTHS = st.integers(-8, 16).map(lambda eighths: eighths / 8)
OUT_DTYPES = st.sampled_from([None, *DTYPES])


@contextmanager
def small_blocks(block: int = BLOCK) -> Iterator[Path]:
    """A fresh folder, and blocks, samples and candidates small enough for small tensors."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_ELEMENTS", block)
        patch.setattr(selection, "CANDIDATES", 2 * block)
        patch.setattr(selection, "MIN_BLOCK_CANDIDATES", 4)
        patch.setattr(selection, "SAMPLE_RUNS", 8)
        patch.setattr(selection, "SAMPLE_RUN_ELEMENTS", 8)
        yield Path(folder)


def merge(
    folder: Path, recipe: Mapping[str, Any], models: Mapping[str, Tensors], **options: Any
) -> dict[str, torch.Tensor]:
    """What a merge gives, by whoever computes: the native kernels, if built, and torch agree.

    options: of make_plan.
    """
    plan = plan_of(folder, recipe, models, **options)
    outputs = [
        run(plan.with_resources(Resources(4 << 30, 2, kernels=kernels)), folder / kernels)
        for kernels in ALL_KERNELS
    ]
    for output in outputs[1:]:
        for name, tensor in outputs[0].items():
            assert bits(without_nan(output[name])) == bits(without_nan(tensor)), name
    return outputs[0]


def without_nan(tensor: torch.Tensor) -> torch.Tensor:
    """All nan as one: what they carry is nobody's promise."""
    if not tensor.is_floating_point():
        return tensor
    same = torch.where(torch.isnan(tensor.double()), torch.nan, tensor.double())
    return same.to(tensor.dtype)


def recipe_for(
    method: str,
    names: Sequence[str],
    own: Sequence[Mapping[str, Any]] | None = None,
    parameters: Mapping[str, Any] | None = None,
    base: str | None = None,
    out: torch.dtype | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """A recipe; own: parameters of each model. keys: other keys of the top level."""
    entries = own or [{} for _ in names]
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {"model": name, "parameters": dict(values)} if values else {"model": name}
            for name, values in zip(names, entries, strict=True)
        ],
        **keys,
    }
    if parameters:
        recipe["parameters"] = dict(parameters)
    if base is not None:
        recipe["base_model"] = base
    if out is not None:
        recipe["out_dtype"] = DTYPE_NAMES[out]
    return recipe


def refused(
    folder: Path,
    recipe: Mapping[str, Any],
    models: Mapping[str, Tensors],
    message: str,
    error: type[InputError] = InputError,
) -> None:
    """Asserts that a merge is refused when it is planned, in one line that matches the message."""
    with pytest.raises(error, match=message) as caught:
        plan_of(folder, recipe, models)
    assert len(str(caught.value).splitlines()) == 1


def noise(terms: Sequence[np.ndarray], relative: float = 2.0**-50) -> np.ndarray:
    """What float64 may round off a sum of these terms."""
    return relative * np.sum([np.abs(term) for term in terms], axis=0)


def arithmetic_of(tensors: Sequence[torch.Tensor]) -> type[np.floating[Any]]:
    """What methods that do not sum in float64 anyway compute in: float32, or float64 if any of
    their inputs is."""
    has_float64 = any(tensor.dtype is torch.float64 for tensor in tensors)
    return np.float64 if has_float64 else np.float32


def float_slack(
    dtype: type[np.floating[Any]],
    base: np.ndarray,
    terms: Sequence[np.ndarray],
    expected: np.ndarray,
    own: Sequence[Mapping[str, Any]],
    parameters: Mapping[str, Any],
) -> np.ndarray:
    """What some operations of dtype may round off x₀ + λ Σ terms, whatever it is divided by.

    terms: the weighted changes. A sign consensus divides by the weights that agree, which is at
    most their change in size; without one it is by all of them.
    """
    divisor = abs(sum(entry["weight"] for entry in own))
    factor = abs(parameters.get("lambda", 1.0))
    if parameters.get("normalize") and divisor >= 1e-8:
        factor *= max(1.0, 1 / divisor)
    size = np.abs(base) + np.abs(expected - base) + factor * np.sum(np.abs(terms), axis=0)
    epsilon = float(np.finfo(dtype).eps) / 2
    tiniest = float(np.finfo(dtype).smallest_subnormal)
    return np.asarray(16 * epsilon * size + 4 * tiniest * (1 + factor))


def undecided(terms: Sequence[np.ndarray]) -> np.ndarray:
    """Where weighted changes cancel but for rounding, so that the elected sign is anybody's guess.

    (Where all of them are zero, there is nothing to elect.)
    """
    largest = np.max(np.abs(terms), axis=0)
    return np.asarray((np.abs(np.sum(terms, axis=0)) < 1e-5 * largest) & (largest > 0))


def finite(tensors: Sequence[torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor.double()).all()) for tensor in tensors)


def finite_everywhere(tensors: Sequence[torch.Tensor]) -> np.ndarray:
    """Per element, whether it is finite in all of the tensors."""
    return np.asarray(np.all([np.isfinite(to_float64(tensor)) for tensor in tensors], axis=0))


def check(
    actual: torch.Tensor,
    expected: np.ndarray,
    family: Family,
    out: torch.dtype | None,
    slack: np.ndarray | float = 0.0,
    *,
    good: np.ndarray | None = None,
    bad: np.ndarray | None = None,
    ulps: float = 1.0,
) -> None:
    """To one ulp where all inputs are finite; elsewhere the output must not be finite either.

    good: which elements are compared, in place of those that are finite in all inputs.
    bad: which elements must not be finite, in place of all others.

    (inf or nan? (1 − w)·∞ + w·x is ∞ and ∞ + w·(x − ∞) is nan; no formula is promised that far.)
    """
    dtype = out or family.dtypes[0]
    if good is None:
        good = finite_everywhere(family.tensors())
    good = np.asarray(good)
    bad = np.asarray(~good if bad is None else bad)
    assert actual.dtype == dtype
    assert tuple(actual.shape) == family.shape
    where = torch.from_numpy(good)
    assert_within_ulps(
        actual[where], expected[good], dtype, ulps, slack=np.broadcast_to(slack, good.shape)[good]
    )
    if dtype is not torch.float8_e4m3fn:  # has no infinity, and saturates
        assert not torch.isfinite(actual[torch.from_numpy(bad)].double()).any()
