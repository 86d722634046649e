"""Rounding from float64 to each output dtype, and distances in units in the last place.

A binary floating point format has p bits of precision and exponents e_min … e_max. Its values
in the binade [2^e, 2^(e+1)) are 2^(e−p+1) apart, and below 2^e_min (subnormals, zero) they are as
far apart as in the lowest binade. Scaling by a power of two is exact in float64, so rounding a
float64 directly to a format is: scale by the spacing, round to an integer (halves to even), scale
back. Going through float32 instead rounds twice, and wrongly near the middle of two values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Tensor = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A binary floating point format.

    precision: bits of the significand, the implicit one included.
    min_exponent, max_exponent: of the smallest normal and of the largest binade.
    largest: the largest finite value.
    has_infinity: without it, values beyond the largest (infinities included) become the largest,
        as torch converts to float8_e4m3fn (older torch gave nan).
    """

    precision: int
    min_exponent: int
    max_exponent: int
    largest: float
    has_infinity: bool = True


FORMATS: dict[torch.dtype, FloatFormat] = {
    torch.float64: FloatFormat(53, -1022, 1023, float(np.finfo(np.float64).max)),
    torch.float32: FloatFormat(24, -126, 127, (2 - 2.0**-23) * 2.0**127),
    torch.float16: FloatFormat(11, -14, 15, 65504.0),
    torch.bfloat16: FloatFormat(8, -126, 127, (2 - 2.0**-7) * 2.0**127),
    torch.float8_e4m3fn: FloatFormat(4, -6, 8, 448.0, has_infinity=False),
    torch.float8_e5m2: FloatFormat(3, -14, 15, 57344.0),
}


def to_float64(tensor: torch.Tensor) -> Tensor:
    """A tensor of any float dtype as a float64 array; exact, and never a view."""
    return np.array(tensor.detach().cpu().to(torch.float64).numpy(), dtype=np.float64)


def _spacing_exponent(values: Tensor, form: FloatFormat) -> NDArray[Any]:
    """log2 of the spacing of a format at each value (finite)."""
    binade = np.frexp(values)[1] - 1  # frexp: |x| = m·2^e with 1/2 ≤ m < 1
    binade = np.where(values == 0, form.min_exponent, binade)
    return np.clip(binade, form.min_exponent, form.max_exponent) - (form.precision - 1)


def ulp(reference: NDArray[Any] | float, dtype: torch.dtype) -> Tensor:
    """The spacing of dtype's values in the binade of the reference.

    At zero and in the subnormal range it is the smallest subnormal; beyond the largest finite
    value, and for infinities, that of the largest binade. nan for nan.
    """
    form = FORMATS[dtype]
    values = np.asarray(reference, dtype=np.float64)
    finite = np.where(np.isfinite(values), values, form.largest)
    spacing = np.ldexp(1.0, _spacing_exponent(finite, form))
    return np.where(np.isnan(values), np.nan, spacing)


def round_once(values: NDArray[Any] | float, dtype: torch.dtype) -> torch.Tensor:
    """A float64 array rounded once, to nearest with ties to even, to a tensor of dtype.

    What rounds beyond the largest finite value becomes an infinity of its sign, or the largest
    value where the format has no infinity. Zeros keep their sign, nan stays nan.
    """
    form = FORMATS[dtype]
    exact = np.array(values, dtype=np.float64)
    finite = np.isfinite(exact)
    inside = np.where(finite, exact, 0.0)
    exponent = _spacing_exponent(inside, form)
    rounded = np.ldexp(np.rint(np.ldexp(inside, -exponent)), exponent)
    beyond = (np.abs(rounded) > form.largest) | np.isinf(exact)
    limit = np.inf if form.has_infinity else form.largest
    rounded = np.where(beyond, np.copysign(limit, exact), rounded)
    rounded = np.where(np.isnan(exact), np.nan, rounded)
    # Every value is now one of dtype's, so that torch's conversion only changes the encoding.
    return torch.from_numpy(np.array(rounded, dtype=np.float64)).to(dtype)


def distance_in_ulps(
    actual: torch.Tensor, reference: NDArray[Any] | float, slack: NDArray[Any] | float = 0.0
) -> Tensor:
    """How far each element is from the reference, in ulps of actual's dtype at the reference.

    slack: absolute distance that does not count.

    Two nan are 0 apart, as are two infinities of one sign; nan and an infinite reference are
    infinitely far from all else. An actual infinity where the reference is finite counts as the
    first power of two beyond the largest value, or as the reference if that lies further out.
    In a format without infinity a reference beyond the largest value counts as the largest.
    """
    form = FORMATS[actual.dtype]
    measured = to_float64(actual)
    expected = np.broadcast_to(np.asarray(reference, dtype=np.float64), measured.shape)
    if not form.has_infinity:
        expected = np.clip(expected, -form.largest, form.largest)
    same = (measured == expected) | (np.isnan(measured) & np.isnan(expected))
    comparable = np.isfinite(expected) & ~np.isnan(measured)
    goal = np.where(comparable, expected, 0.0)
    # In units of the spacing, by powers of two: exact, where the difference of two float64 of
    # unlike sign, half a subnormal or 2^1024 are not.
    exponent = _spacing_exponent(goal, form)
    with np.errstate(over="ignore"):
        goal_units = np.ldexp(goal, -exponent)
        measured_units = np.ldexp(np.where(comparable, measured, 0.0), -exponent)
        slack_units = np.ldexp(np.asarray(slack, dtype=np.float64), -exponent)
        overflow_units = np.ldexp(1.0, form.max_exponent + 1 - exponent)
        infinite = np.isinf(measured) & comparable
        sign = np.where(np.signbit(measured), -1.0, 1.0)
        measured_units = np.where(infinite, sign * overflow_units, measured_units)
        distance = np.abs(measured_units - goal_units)
        reached = infinite & (sign * goal_units >= overflow_units)
        free = reached | np.isinf(slack_units)
        distance = np.maximum(distance - np.where(free, 0.0, slack_units), 0.0)
        distance = np.where(free, 0.0, distance)
    distance = np.where(comparable, distance, np.inf)
    return np.where(same, 0.0, distance)


def assert_within_ulps(
    actual: torch.Tensor,
    reference: NDArray[Any] | float,
    dtype: torch.dtype,
    ulps: float = 1.0,
    *,
    slack: NDArray[Any] | float = 0.0,
) -> None:
    """Assert that a tensor has this dtype and the reference's shape, and lies within ulps of it.

    reference: float64, unrounded: a correctly rounded result is within 0.5.
    slack: absolute error, per element or for all, that is allowed besides: where terms cancel,
        float32 arithmetic leaves an error in proportion to the terms and not to their sum.

    Raises AssertionError that shows the worst element.
    """
    __tracebackhide__ = True
    expected = np.asarray(reference)
    assert expected.dtype == np.float64, f"the reference is {expected.dtype}, not float64"
    assert actual.dtype == dtype, f"the dtype is {actual.dtype}, expected {dtype}"
    shape = tuple(actual.shape)
    assert shape == expected.shape, f"the shape is {shape}, expected {expected.shape}"
    distance = distance_in_ulps(actual, expected, slack)
    wrong = int(np.count_nonzero(distance > ulps))
    if not wrong:
        return
    worst = np.unravel_index(int(np.argmax(distance)), distance.shape)
    index = tuple(int(position) for position in worst)
    rounded = float(round_once(expected[index], dtype).to(torch.float64))
    raise AssertionError(
        f"{wrong} of {distance.size} elements are more than {ulps:g} ulps of {dtype} off; the "
        f"worst, at index {index}: actual {float(actual[index].to(torch.float64))!r}, "
        f"expected {float(expected[index])!r} (rounds to {rounded!r}), "
        f"{float(distance[index]):.6g} ulps"
    )
