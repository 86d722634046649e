"""A device's vectors against the processor's form of the same functions, on the same numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lazymerge.engine.device import vector as device_vector
from lazymerge.engine.device.host import HostDevice
from lazymerge.engine.device.rounding import round_once_on_device
from lazymerge.engine.device.vector import FOLDED_ELEMENTS, DeviceVector, Workspace
from lazymerge.engine.rounding import round_once
from lazymerge.graph import vector
from lazymerge.graph.vector import Reducing

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")

DTYPES = [torch.float32, torch.float64]
SPECIAL = [0.0, -0.0, 1.0, 1.5, 1e-40, 3e38, math.inf, math.nan]


def workspace(elements: int, dtype: torch.dtype, most: int) -> Workspace:
    """most: elements that are brought over at a time."""
    return Workspace(
        queue=HostDevice(0).queue(),
        spare=torch.full(((elements + 1) * dtype.itemsize,), 255, dtype=torch.uint8),
        ranks=torch.full((most,), math.nan, dtype=dtype),
        places=torch.full((most,), -1, dtype=torch.int32),
        found=torch.full((most,), math.nan, dtype=dtype),
        exchange=torch.full((8 * most,), 255, dtype=torch.uint8),
    )


def pair(values: torch.Tensor, most: int = 7) -> tuple[torch.Tensor, DeviceVector, DeviceVector]:
    """The numbers for the processor, for a device, and room there."""
    room = workspace(len(values), values.dtype, min(most, len(values)))
    empty = torch.full_like(values, math.nan)
    return values.clone(), DeviceVector(values.clone(), room), DeviceVector(empty, room)


@st.composite
def numbers(draw: st.DrawFn, most: int = 200) -> torch.Tensor:
    """A few values that repeat, or many that do not, with and without what is special."""
    length = draw(st.integers(1, most))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    repeats = draw(st.booleans())
    made = random.integers(-6, 7, length) / 4 if repeats else random.normal(size=length)
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=4)):
        made[random.integers(length)] = value
    return torch.from_numpy(np.array(made)).to(draw(st.sampled_from(DTYPES)))


def equal(one: Any, other: Any) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other), equal_nan=True)


def test_a_device_vector_reduces_itself_and_a_tensor_does_not() -> None:
    cpu, device, _ = pair(torch.ones(3))
    assert isinstance(device, Reducing)
    assert not isinstance(cpu, Reducing)


@settings(max_examples=300)
@given(numbers(), st.data())
def test_counts(values: torch.Tensor, data: st.DataObject) -> None:
    magnitudes = values.abs()
    finite = sorted({v for v in magnitudes.tolist() if not math.isnan(v)} | {0.0, math.inf})
    low, high = sorted([data.draw(st.sampled_from(finite)), data.draw(st.sampled_from(finite))])
    quota = data.draw(st.integers(1, 2 * len(values)))
    cpu, device, room = pair(magnitudes, data.draw(st.integers(1, 40)))
    expected = vector.count_inside(cpu, low, high, quota, torch.empty_like(cpu))
    actual = vector.count_inside(device, low, high, quota, room)
    assert (actual.above, actual.inside) == (expected.above, expected.inside)
    assert actual.values.dtype == expected.values.dtype
    assert equal(actual.values, expected.values)
    assert equal(device.tensor, cpu)  # looked at, not changed


@given(numbers(), st.data())
def test_the_place_of_an_equal_value(values: torch.Tensor, data: st.DataObject) -> None:
    known = [value for value in values.tolist() if not math.isnan(value)] or [1.0]
    value = data.draw(st.sampled_from(known))
    count = int((values == value).sum())
    cpu, device, _ = pair(values)
    for rank in range(1, count + 1):
        expected = vector.find_equal(cpu, value, rank, 1000)
        assert vector.find_equal(device, value, rank, 1000) == expected
    with pytest.raises(IndexError):
        vector.find_equal(device, value, count + 1, 1000)


def same_bits(device: DeviceVector, cpu: torch.Tensor) -> bool:
    """Signs of zeros included."""
    return equal(device.tensor, cpu) and equal(device.tensor.signbit(), cpu.signbit())


@given(numbers(), st.data())
def test_what_is_kept_and_what_is_dropped(values: torch.Tensor, data: st.DataObject) -> None:
    value = data.draw(st.sampled_from([0.0, 0.25, 1.0, 1.5, 1e-40, math.inf]))
    number = np.dtype(str(values.dtype).removeprefix("torch.")).type
    below = float(np.nextafter(number(value), number(0)))
    if data.draw(st.booleans()):  # the last of equal ones survive
        value, below = below, value
    stop = data.draw(st.integers(0, 1300))
    cpu, device, room = pair(values)
    vector.keep_largest(cpu, value, below, stop, 1000)
    vector.keep_largest(device, value, below, stop, 1000)
    assert equal(device.tensor, cpu)
    cpu, device, room = pair(values)
    vector.drop_largest(cpu, value, below, stop, 1000, torch.empty_like(cpu))
    vector.drop_largest(device, value, below, stop, 1000, room)
    assert same_bits(device, cpu)


BOUNDS = [0.0, -0.0, 0.25, -1.5, 0.1, 1e-46, math.inf, -math.inf, math.nan]


@settings(max_examples=300)
@given(numbers(), st.data())
def test_what_is_zeroed_by_another_vector(values: torch.Tensor, data: st.DataObject) -> None:
    """By a number, by a vector, by itself; the others stay as they are."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    special = torch.from_numpy(random.choice([*SPECIAL, -1.0, 0.25], len(values)))
    others = [special.to(values.dtype), values.roll(1)]
    cpu, device, room = pair(values)
    rooms = room.workspace
    theirs = [DeviceVector(other.clone(), rooms) for other in others]
    on_cpu, on_device = [cpu, *others], [device, *theirs]
    mask = torch.empty_like(cpu)
    which = data.draw(st.integers(0, 2))
    bound = data.draw(st.sampled_from(BOUNDS) | st.integers(0, 2))
    if isinstance(bound, float):
        for function in (vector.zero_up_to, vector.zero_from):
            function(cpu, on_cpu[which], bound, mask)
            function(device, on_device[which], bound, room)
            assert same_bits(device, cpu)
    else:
        vector.zero_from(cpu, on_cpu[which], on_cpu[bound], mask)
        vector.zero_from(device, on_device[which], on_device[bound], room)
    assert same_bits(device, cpu)
    for other, before in zip(theirs, others, strict=True):
        assert same_bits(other, before)


@given(
    st.integers(1, 3000),
    st.integers(0, 3000) | st.just(2**34 - 5),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from(DTYPES),
)
def test_random_numbers(length: int, start: int, key: int, dtype: torch.dtype) -> None:
    cpu, device, room = pair(torch.zeros(length, dtype=dtype))
    vector.draw(cpu, key, start, torch.empty_like(cpu))
    vector.draw(device, key, start, room)
    assert equal(device.tensor, cpu)


def test_masks_lie_in_the_room() -> None:
    """A byte for each element, of the four or eight that there are."""
    for dtype in DTYPES:
        _, _, room = pair(torch.ones(5, dtype=dtype))
        mask = room.mask()
        assert (mask.dtype, mask.shape) == (torch.bool, (5,))
        assert mask.data_ptr() == room.tensor.data_ptr()
        part = room[1:4].mask()
        assert (part.shape, part.data_ptr()) == ((3,), room.tensor[1:].data_ptr())


def test_vectors_of_apply_stages_zero_and_draw_without_a_workspace() -> None:
    """They reduce nothing."""
    values, other, room = (DeviceVector(torch.ones(8), None) for _ in range(3))
    vector.draw(other, 3, 0, room)
    vector.zero_from(values, other, 0.5, room)
    vector.zero_up_to(values, other, 0.1, room)
    vector.drop_largest(values, 2.0, 1.5, 4, 0, room)
    kept = [0.1 < number < 0.5 for number in other.tensor.tolist()]
    assert values.tensor.tolist() == [float(is_kept) for is_kept in kept]
    with pytest.raises(AssertionError, match="reduces nothing"):
        vector.total(values)


@given(numbers())
def test_copies(values: torch.Tensor) -> None:
    cpu, device, _ = pair(values)
    copy = vector.copy_of(device)
    assert copy.dtype == vector.copy_of(cpu).dtype
    assert equal(copy, vector.copy_of(cpu))
    device.tensor.zero_()
    assert equal(copy, vector.copy_of(cpu))  # an array of its own


@pytest.mark.parametrize("length", [1, 2, 3, 5, 100, 4095, 4096, 4097, 12_289, 100_003])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums(length: int, dtype: torch.dtype) -> None:
    """Right to a few roundings of float64, whatever the length."""
    random = np.random.default_rng(length)
    values = torch.from_numpy(random.normal(size=length)).to(dtype)
    cpu, device, _ = pair(values, most=1000)
    exact = math.fsum(values.tolist())
    size = math.fsum(abs(v) for v in values.tolist())
    assert abs(vector.total(device) - exact) <= 1e-15 * size
    assert equal(device.tensor, cpu)
    other = torch.from_numpy(random.normal(size=length))
    one, left, room = pair(values.double(), most=1000)
    right = DeviceVector(other.clone(), left.workspace)
    products = [a * b for a, b in zip(one.tolist(), other.tolist(), strict=True)]
    error = abs(vector.dot(left, right, room) - math.fsum(products))
    assert error <= 2e-15 * math.fsum(map(abs, products))
    assert equal(left.tensor, one)
    assert equal(right.tensor, other)


def test_the_order_of_sums_is_a_function_of_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves are added to halves; written out here once more, with Python's floats."""
    monkeypatch.setattr(device_vector, "FOLDED_ELEMENTS", 8)
    values = torch.from_numpy(np.random.default_rng(1).normal(size=1001) * 10.0**8)
    _, device, _ = pair(values)
    folded = values.tolist()
    while len(folded) > 8 or len(folded) == len(values):
        half = (len(folded) + 1) // 2
        upper = folded[half:] + [None] * (2 * half - len(folded))
        folded = [a if b is None else a + b for a, b in zip(folded, upper, strict=False)]
    assert vector.total(device) == sum(folded)
    assert vector.total(device) != math.fsum(values.tolist())  # the order shows
    assert FOLDED_ELEMENTS == 4096  # part of what a merge on a device is


@given(numbers(50), st.data())
def test_element_by_element(values: torch.Tensor, data: st.DataObject) -> None:
    """Every operation of the protocol is torch's own, and returns its vector."""
    cpu, device, other = pair(values)
    operand = torch.linspace(-2, 2, len(values), dtype=values.dtype)
    other.tensor.copy_(operand)
    for name in ("add_", "sub_", "mul_"):
        number = data.draw(st.sampled_from([0.5, -3.0, 1 / 3]))
        assert getattr(device, name)(number) is device
        assert getattr(device, name)(other) is device
        getattr(getattr(cpu, name)(number), name)(operand)
        assert equal(device.tensor, cpu)
    assert device.div_(other).abs_().clamp_min_(0.5).clamp_max_(3.0) is device
    assert equal(device.tensor, cpu.div_(operand).abs_().clamp_min_(0.5).clamp_max_(3.0))
    for name in ("ge_", "gt_", "eq_"):
        one = device.tensor.clone()
        assert getattr(device, name)(0.5) is device
        assert equal(device.tensor, getattr(cpu, name)(0.5))
        device.tensor.copy_(one)
        cpu.copy_(one)
    assert equal(device.copy_(other).tensor, operand)


@settings(max_examples=200)
@given(
    st.lists(st.floats() | st.floats(width=32), min_size=1, max_size=60),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]),
)
@example([1 + 2**-8 + 2**-40, 1 + 2**-8, 1 + 2**-8 - 2**-40, math.inf, -math.nan], torch.bfloat16)
@example([65519.999999999, 65520.0, 2**-25, 2**-25 + 2**-60, 5e-324], torch.float16)
def test_rounding_once(values: list[float], dtype: torch.dtype) -> None:
    expected, actual = (torch.empty(len(values), dtype=dtype) for _ in range(2))
    for function, out in ((round_once, expected), (round_once_on_device, actual)):
        exact = torch.tensor(values, dtype=torch.float64)
        scratch = [torch.full_like(exact, math.nan) for _ in range(2)]
        function(exact, out, *scratch)
    assert expected.view(torch.uint8).tolist() == actual.view(torch.uint8).tolist()
