"""Rounding from float64 once: against the correctly rounded values of tests/reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from lazymerge.engine.rounding import round_once

from reference.rounding import round_once as reference_round

DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


def rounded(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    value = torch.from_numpy(values.copy())
    out = torch.empty(len(values), dtype=dtype)
    scratch = [torch.full((len(values),), 7.0, dtype=torch.float64) for _ in range(2)]
    round_once(value, out, *scratch)
    return out


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    arrays.arrays(
        np.float64,
        st.integers(1, 40),
        elements=st.floats(-1e39, 1e39, allow_nan=False) | st.floats(-2.0, 2.0),
    ),
    st.sampled_from([0.0, 2.0**-40, -(2.0**-40), 2.0**-30]),
)
def test_equals_one_correct_rounding(dtype: torch.dtype, values: np.ndarray, nudge: float) -> None:
    # near the middle of two neighbours, where rounding twice goes wrong
    coarse = torch.from_numpy(values).to(dtype).double().numpy()
    step = np.where(np.isfinite(coarse), coarse, 0.0) * (1 + 2.0**-8) + nudge
    for case in (values, step):
        assert torch.equal(bits(rounded(case, dtype)), bits(reference_round(case, dtype)))


def test_the_case_that_rounding_twice_gets_wrong() -> None:
    value = np.array([1 + 2.0**-8 + 2.0**-40])
    assert float(torch.from_numpy(value).to(torch.bfloat16)) == 1.0
    assert float(rounded(value, torch.bfloat16)) == 1 + 2.0**-7


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_specials(dtype: torch.dtype) -> None:
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-320, -1e300])
    out = rounded(special, dtype)
    assert torch.isnan(out[0])
    assert out[1:].tolist() == [np.inf, -np.inf, 0.0, 0.0, 0.0, -np.inf]
    assert torch.signbit(out[4])
