"""Rounding and ulps against exact rational arithmetic and against every value of small formats."""

from __future__ import annotations

from fractions import Fraction
from math import inf, isinf, nan

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from .rounding import FORMATS, assert_within_ulps, distance_in_ulps, round_once, to_float64, ulp

SMALL = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16]
DTYPES = list(FORMATS)

LAYOUTS = {
    torch.float64: (11, 52),
    torch.float32: (8, 23),
    torch.float16: (5, 10),
    torch.bfloat16: (8, 7),
    torch.float8_e4m3fn: (4, 3),
    torch.float8_e5m2: (5, 2),
}
"""Bits of exponent and of stored significand, as the formats' specifications give them."""


def finite_values(dtype: torch.dtype) -> np.ndarray:
    """Every finite value ≥ 0 of a format of 8 or 16 bits, in order of its bits, decoded here."""
    exponent_bits, fraction_bits = LAYOUTS[dtype]
    bias = 2 ** (exponent_bits - 1) - 1
    bits = np.arange(2 ** (exponent_bits + fraction_bits))
    exponent, fraction = bits >> fraction_bits, bits & (2**fraction_bits - 1)
    normal = np.ldexp(1.0 + fraction / 2**fraction_bits, exponent - bias)
    subnormal = np.ldexp(fraction / 2**fraction_bits, np.full_like(bits, 1 - bias))
    values = np.where(exponent == 0, subnormal, normal)
    # The top exponent means inf and nan; in e4m3fn only its last pattern does, nan.
    count = bits.size - 1 if dtype == torch.float8_e4m3fn else bits.size - 2**fraction_bits
    return values[:count]


def exactly_rounded(value: float, dtype: torch.dtype) -> float:
    """The nearest value of a format, in integers: no float operation but the last conversion."""
    exponent_bits, fraction_bits = LAYOUTS[dtype]
    bias = 2 ** (exponent_bits - 1) - 1
    magnitude = abs(Fraction(value))
    # log2 lies above this difference less 1 and below it plus 1.
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    spacing = Fraction(2) ** (max(exponent, 1 - bias) - fraction_bits)
    whole, rest = divmod(magnitude / spacing, 1)
    if rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2):
        whole += 1
    rounded = whole * spacing
    if dtype == torch.float8_e4m3fn:
        rounded = min(rounded, Fraction(448))
    elif rounded >= Fraction(2) ** (bias + 1):
        return inf if value > 0 else -inf
    return float(rounded) if value > 0 else -float(rounded)


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_every_value_midpoint_and_neighbour_of_a_midpoint(dtype: torch.dtype) -> None:
    values = finite_values(dtype)
    lower, upper = values[:-1], values[1:]
    middle = (lower + upper) / 2  # exact in float64
    even = np.where(np.arange(lower.size) % 2 == 0, lower, upper)
    for sign in (1.0, -1.0):
        for given_values, expected in (
            (values, values),
            (middle, even),
            (np.nextafter(middle, -inf), lower),
            (np.nextafter(middle, inf), upper),
        ):
            rounded = round_once(sign * given_values, dtype)
            assert rounded.dtype == dtype
            result = to_float64(rounded)
            np.testing.assert_array_equal(result, sign * expected)
            assert (np.signbit(result) == (sign < 0)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formats_agree_with_torch(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    form = FORMATS[dtype]
    assert form.largest == info.max
    assert 2.0**form.min_exponent == info.smallest_normal
    assert 2.0 ** (1 - form.precision) == info.eps


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_bits_are_those_of_the_format(dtype: torch.dtype) -> None:
    values = finite_values(dtype)
    integer = torch.uint8 if dtype.itemsize == 1 else torch.int16
    bits = round_once(values, dtype).view(integer).numpy()
    np.testing.assert_array_equal(bits, np.arange(values.size))


anything = st.floats(allow_nan=False, allow_infinity=False)
moderate = st.floats(-70000, 70000)
subnormal = st.floats(-1e-37, 1e-37)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(value=anything | moderate | subnormal)
@settings(deadline=None, max_examples=100)
@example(value=1 + 2.0**-8 + 2.0**-40)  # rounds down through float32 and up directly (bfloat16)
@example(value=65520.0)  # half way between float16's largest and infinity
@example(value=65519.99999999999)
@example(value=61440.0)  # the same in float8_e5m2
@example(value=464.0)  # half way between float8_e4m3fn's largest and its nan
@example(value=3.4028235677973366e38)  # half way between float32's largest and infinity
@example(value=2.0**-25)  # half of float16's smallest
@example(value=2.0**-150)  # half of float32's smallest
@example(value=5e-324)
@example(value=1.7976931348623157e308)
@example(value=-1e-300)
def test_rounding_against_exact_arithmetic(dtype: torch.dtype, value: float) -> None:
    rounded = round_once(np.array([value]), dtype)
    assert rounded.to(torch.float64).item() == exactly_rounded(value, dtype)
    distance = distance_in_ulps(rounded, np.array([value]))
    assert distance[0] <= 0.5


def test_rounding_twice_would_be_wrong() -> None:
    value = np.array([1 + 2.0**-8 + 2.0**-40])
    twice = torch.from_numpy(value).to(torch.float32).to(torch.bfloat16)
    assert twice.item() == 1.0
    assert round_once(value, torch.bfloat16).item() == 1 + 2.0**-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype: torch.dtype) -> None:
    largest = FORMATS[dtype].largest
    limit = inf if FORMATS[dtype].has_infinity else largest
    values = np.array([inf, -inf, nan, 0.0, -0.0, largest, -largest])
    result = to_float64(round_once(values, dtype))
    np.testing.assert_array_equal(result, [limit, -limit, nan, 0, 0, largest, -largest])
    np.testing.assert_array_equal(np.signbit(result[3:5]), [False, True])


def test_rounding_keeps_shape_and_shares_no_memory() -> None:
    values = np.zeros((2, 3))
    rounded = round_once(values, torch.float64)
    rounded += 1
    assert rounded.shape == (2, 3)
    assert not values.any()
    assert round_once(0.5, torch.float16).shape == ()
    assert round_once(np.zeros((0, 2)), torch.float16).shape == (0, 2)


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_ulp_is_the_gap_to_the_next_value(dtype: torch.dtype) -> None:
    values = finite_values(dtype)
    gaps = np.diff(values)
    np.testing.assert_array_equal(ulp(values[:-1], dtype), gaps)
    np.testing.assert_array_equal(ulp(-values[:-1], dtype), gaps)
    np.testing.assert_array_equal(ulp((values[:-1] + values[1:]) / 2, dtype), gaps)
    beyond = np.array([values[-1], values[-1] * 4, inf, -inf])
    np.testing.assert_array_equal(ulp(beyond, dtype), [gaps[-1]] * 4)
    assert np.isnan(ulp(nan, dtype))


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"),
    [(torch.float32, np.float32), (torch.float64, np.float64), (torch.float16, np.float16)],
    ids=str,
)
@given(data=st.data())
@settings(deadline=None)
def test_ulp_is_numpys_spacing(
    dtype: torch.dtype, numpy_dtype: type[np.floating], data: st.DataObject
) -> None:
    width = np.dtype(numpy_dtype).itemsize * 8
    value = data.draw(st.floats(0, float(np.finfo(numpy_dtype).max), width=width))
    with np.errstate(over="ignore", invalid="ignore"):
        spacing = np.spacing(numpy_dtype(value))
    if np.isfinite(spacing):
        assert ulp(value, dtype) == float(spacing)


def tensor(*values: float, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def test_the_distance_is_measured_from_the_unrounded_reference() -> None:
    # bfloat16's spacing is 2⁻⁷ from 1 and 2⁻⁸ below.
    reference = np.array([1 + 2.0**-8, 1 + 2.0**-8, 1.0, 1 - 2.0**-9])
    actual = tensor(1, 1 + 2.0**-7, 1 + 2.0**-6, 1)
    np.testing.assert_array_equal(distance_in_ulps(actual, reference), [0.5, 0.5, 2, 0.5])
    assert_within_ulps(actual[:2], reference[:2], torch.bfloat16, ulps=0.5)
    assert_within_ulps(actual, reference, torch.bfloat16, ulps=2)


def test_the_worst_element_is_shown() -> None:
    actual = tensor(1, 1 + 2.0**-6, 1.5, 1).reshape(2, 2)
    with pytest.raises(AssertionError) as caught:
        assert_within_ulps(actual, np.ones((2, 2)), torch.bfloat16)
    message = str(caught.value)
    assert "2 of 4 elements" in message
    assert "index (1, 0): actual 1.5, expected 1.0 (rounds to 1.0), 64 ulps" in message


def test_dtype_and_shape_must_agree() -> None:
    with pytest.raises(AssertionError, match=r"dtype is torch\.bfloat16"):
        assert_within_ulps(tensor(1), np.ones(1), torch.float16)
    with pytest.raises(AssertionError, match=r"shape is \(1,\)"):
        assert_within_ulps(tensor(1), np.ones((1, 1)), torch.bfloat16)
    with pytest.raises(AssertionError, match="not float64"):
        assert_within_ulps(tensor(1), np.ones(1, np.float32), torch.bfloat16)
    assert_within_ulps(tensor(), np.ones(0), torch.bfloat16)
    assert_within_ulps(tensor(1).reshape(()), np.array(1.0), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinities(dtype: torch.dtype) -> None:
    assert_within_ulps(tensor(nan, dtype=dtype), np.array([nan]), dtype, ulps=0)
    assert_within_ulps(tensor(-0.0, dtype=dtype), np.array([0.0]), dtype, ulps=0)
    infinite = round_once(np.array([inf]), dtype)
    assert_within_ulps(infinite, np.array([inf]), dtype, ulps=0)
    for actual, expected in (
        (nan, 1.0),
        (1.0, nan),
        (1.0, inf),
        (inf, -inf),
        (inf, 1.0),
        (nan, inf),
    ):
        with pytest.raises(AssertionError):
            assert_within_ulps(tensor(actual, dtype=dtype), np.array([expected]), dtype, ulps=10)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if FORMATS[d].has_infinity], ids=str)
def test_overflow(dtype: torch.dtype) -> None:
    largest = FORMATS[dtype].largest
    spacing = float(ulp(largest, dtype))
    infinite, negative, finite = (tensor(x, dtype=dtype) for x in (inf, -inf, largest))
    # Infinity stands one spacing beyond the largest value.
    assert distance_in_ulps(infinite, np.array([largest])) == 1
    assert distance_in_ulps(negative, np.array([-largest])) == 1
    assert distance_in_ulps(infinite, np.array([largest - spacing])) == 2
    assert distance_in_ulps(infinite, np.array([-largest]))[0] > 1
    if dtype == torch.float64:
        return
    beyond = np.array([largest + 3 * spacing])
    assert distance_in_ulps(infinite, beyond) == 0
    assert distance_in_ulps(negative, beyond)[0] > 1
    assert distance_in_ulps(finite, beyond) == 3


def test_a_format_without_infinity_saturates() -> None:
    dtype = torch.float8_e4m3fn
    for value in (465.0, 1e6, inf):
        assert_within_ulps(tensor(448, dtype=dtype), np.array([value]), dtype, ulps=0)
        with pytest.raises(AssertionError):
            assert_within_ulps(tensor(nan, dtype=dtype), np.array([value]), dtype)
    assert distance_in_ulps(tensor(416, dtype=dtype), np.array([1e6])) == 1


def test_slack_is_absolute_and_may_differ_per_element() -> None:
    # 1 and 2 ulps (2⁻⁷ each) off.
    actual, reference = tensor(1 + 2.0**-7, 1 + 2.0**-6), np.ones(2)
    distance = distance_in_ulps(actual, reference, np.array([0, 2.0**-7]))
    np.testing.assert_array_equal(distance, [1, 1])
    assert_within_ulps(actual, reference, torch.bfloat16, slack=2.0**-7)
    with pytest.raises(AssertionError):
        assert_within_ulps(actual, reference, torch.bfloat16, slack=2.0**-8)


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(allow_nan=False, allow_infinity=False),
)
@settings(deadline=None)
def test_float64_distances_do_not_overflow_wrongly(actual: float, reference: float) -> None:
    distance = distance_in_ulps(tensor(actual, dtype=torch.float64), np.array([reference]))[0]
    spacing = Fraction(float(ulp(reference, torch.float64)))
    exact = abs(Fraction(actual) - Fraction(reference)) / spacing
    if exact > Fraction(np.finfo(np.float64).max):
        assert isinf(distance) or distance > 1e308
    else:
        assert distance == pytest.approx(float(exact), rel=1e-12, abs=0)
