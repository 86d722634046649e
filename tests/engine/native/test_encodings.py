"""From the working dtype to the output's: exactly one rounding, at every place where it is hard.

The kernels are held against torch (float32 to anything, and float64 by way of float32), against
engine/rounding.py (float64 at once), and against exact rationals.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_driver import AWKWARD, CODES, WORKING, WRITTEN, assert_same, by_kernels, record
from lazymerge.engine.native.program import decoding
from lazymerge.engine.rounding import round_once
from processors import processor  # noqa: F401 (a fixture)

from conftest import needs_kernels
from reference.rounding import round_once as reference_round

pytestmark = [needs_kernels, pytest.mark.usefixtures("processor")]

NARROW = ["F16", "BF16"]
MILLION = 1 << 20


def encoded(
    values: torch.Tensor, working: str, output: str, *, rounds_once: bool = False
) -> torch.Tensor:
    return by_kernels(decoding(), [values], working, output, rounds_once=rounds_once)[0]


def rounded_once(values: torch.Tensor, output: str) -> torch.Tensor:
    """By engine/rounding.py."""
    out = torch.empty(len(values), dtype=CODES[output])
    scratch = [torch.empty(len(values), dtype=torch.float64) for _ in range(2)]
    round_once(values.clone(), out, *scratch)
    return out


def every_finite(output: str) -> np.ndarray:
    """All finite values of a 16-bit dtype that are not negative, ascending, and the next one that
    there would be if the largest were not the last; float64."""
    codes = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(CODES[output])
    values = codes[torch.isfinite(codes)].double().numpy()
    return np.append(values, 2 * values[-1] - values[-2])


def around_middles(output: str, kind: type[Any]) -> np.ndarray:
    """Every value, every middle between two neighbours, and the floats of `kind` on both sides of
    each: all there is to know about rounding to nearest even. Both signs."""
    values = every_finite(output)
    exact = np.concatenate([values, (values[1:] + values[:-1]) / 2])
    places = exact[exact <= np.finfo(kind).max].astype(kind)
    assert np.isin(places.astype(np.float64), exact).all()
    with np.errstate(over="ignore"):
        near = [np.nextafter(places, kind(-np.inf)), places, np.nextafter(places, kind(np.inf))]
    found = np.concatenate(near)
    return np.concatenate([found, -found])


def by_hand(values: np.ndarray, output: str) -> torch.Tensor:
    """Rounded to nearest even by searching among all values of the dtype."""
    table = every_finite(output)
    magnitude = np.abs(values)
    upper = np.clip(np.searchsorted(table, magnitude), 1, len(table) - 1)
    low, high = table[upper - 1], table[upper]
    middle = (low + high) / 2  # exact in float64
    odd = (upper - 1) % 2 == 1
    up = (magnitude > middle) | ((magnitude == middle) & odd)
    code = np.where(up, upper, upper - 1)
    # the place after the last finite value is infinity's code: beyond it, all are
    code = np.where(magnitude >= table[-1], len(table) - 1, code)
    code = code.astype(np.int32) | np.where(np.signbit(values), 0x8000, 0)
    return torch.from_numpy(code.astype(np.uint16).view(np.int16)).view(CODES[output])


@pytest.mark.parametrize("output", NARROW)
def test_every_tie_and_its_neighbours_from_float32(output: str) -> None:
    values = around_middles(output, np.float32)
    block = torch.from_numpy(values)
    actual = encoded(block, "F32", output)
    assert_same(actual, block.to(CODES[output]))
    assert_same(actual, by_hand(values.astype(np.float64), output))


@pytest.mark.parametrize("output", NARROW)
def test_every_tie_and_its_neighbours_from_float64(output: str) -> None:
    """The neighbours of a middle in float64 are nearer than float32 can tell."""
    values = around_middles(output, np.float64)
    block = torch.from_numpy(values)
    once = encoded(block, "F64", output, rounds_once=True)
    assert_same(once, by_hand(values, output))
    assert_same(once, rounded_once(block, output))
    twice = encoded(block, "F64", output)
    assert_same(twice, block.to(torch.float32).to(CODES[output]))
    assert not torch.equal(once.view(torch.int16), twice.view(torch.int16))


@pytest.mark.parametrize("output", NARROW)
@pytest.mark.parametrize("working", WORKING)
def test_specials(working: str, output: str) -> None:
    values = torch.tensor([*AWKWARD, 5e-324, -5e-324, 1e300, -1e300], dtype=torch.float64)
    block = values.to(WORKING[working])
    expected = block.to(CODES[output])
    assert_same(encoded(block, working, output), expected)
    assert_same(encoded(block, working, output, rounds_once=working == "F64"), expected)
    assert torch.signbit(encoded(block, working, output)[AWKWARD.index(0.0) + 1])


@pytest.mark.parametrize("output", WRITTEN)
def test_a_million_random_bit_patterns_of_float32(output: str, random: np.random.Generator) -> None:
    bits = random.integers(0, 2**32, MILLION, dtype=np.uint32)
    block = torch.from_numpy(bits.view(np.float32))
    assert_same(encoded(block, "F32", output), block.to(CODES[output]))


@pytest.mark.parametrize("output", WRITTEN)
def test_a_million_random_bit_patterns_of_float64(output: str, random: np.random.Generator) -> None:
    bits = random.integers(0, 2**64, MILLION, dtype=np.uint64)
    # half of them with exponents near those of the output, where something is left to round
    biased = (bits[::2] & np.uint64(0x800FFFFFFFFFFFFF)) | (
        random.integers(1023 - 160, 1023 + 135, MILLION // 2).astype(np.uint64) << np.uint64(52)
    )
    block = torch.from_numpy(np.concatenate([bits[1::2], biased]).view(np.float64))
    by_way = block.to(torch.float32).to(CODES[output]) if output in NARROW else None
    expected = block.to(CODES[output]) if by_way is None else by_way
    assert_same(encoded(block, "F64", output), expected)
    if output in NARROW:
        once = encoded(block, "F64", output, rounds_once=True)
        assert_same(once, rounded_once(block, output))
        number = ~torch.isnan(block)
        assert_same(once[number], by_hand(block[number].numpy(), output))


@pytest.mark.parametrize("output", NARROW)
@given(
    st.fractions(max_denominator=2**60) | st.floats(-7e4, 7e4).map(Fraction),
    st.integers(-60, 12),
    st.integers(-3, 3),
)
@settings(max_examples=200)
def test_against_exact_rationals(output: str, ratio: Fraction, scale: int, steps: int) -> None:
    """Not by any float: the nearest value of the dtype, chosen among rationals."""
    value = np.float64(float(ratio) * 2.0**scale)
    for _ in range(abs(steps)):
        value = np.nextafter(value, np.float64(np.sign(steps) * np.inf))
    exact = Fraction(float(value))
    (actual,) = encoded(torch.tensor([value]), "F64", output, rounds_once=True)
    table = every_finite(output)
    if not torch.isfinite(actual):
        assert abs(exact) >= (Fraction(table[-1]) + Fraction(table[-2])) / 2
        return
    error = abs(Fraction(float(actual)) - exact)
    code = int(actual.view(torch.int16)) & 0x7FFF
    for neighbour in (code - 1, code + 1):
        if not 0 <= neighbour < len(table):
            continue
        other = Fraction(table[neighbour]) * (-1 if value < 0 else 1)
        assert error < abs(other - exact) or (error == abs(other - exact) and code % 2 == 0)


@pytest.mark.parametrize("output", NARROW)
@given(st.lists(st.floats(), min_size=1, max_size=40))
def test_once_agrees_with_the_references_rounding(output: str, values: list[float]) -> None:
    block = torch.tensor(values, dtype=torch.float64)
    expected = reference_round(block.numpy(), CODES[output])
    assert_same(encoded(block, "F64", output, rounds_once=True), expected)


def test_float32_goes_to_float64_and_back_unchanged(random: np.random.Generator) -> None:
    bits = random.integers(0, 2**32, MILLION, dtype=np.uint32)
    block = torch.from_numpy(bits.view(np.float32))
    assert_same(encoded(block, "F64", "F32"), block)
    assert_same(encoded(block, "F32", "F64"), block.double())


@pytest.mark.parametrize("output", WRITTEN)
def test_loops_have_tails(output: str, random: np.random.Generator) -> None:
    values = torch.from_numpy(random.standard_normal(3000))
    for working, size in [(w, s) for w in WORKING for s in (1, 7, 8, 9, 31, 1023, 1025, 2999)]:
        block = values[:size].to(WORKING[working])
        assert_same(
            encoded(block, working, output),
            block.to(torch.float32).to(CODES[output])
            if output in NARROW
            else block.to(CODES[output]),
        )


def test_what_is_computed_is_encoded(random: np.random.Generator) -> None:
    """The output comes from register 0 after the last instruction, not from an input."""

    def run(vectors: Any, inputs: Any) -> None:
        inputs[0].read_into(vectors[1])
        inputs[0].read_into(vectors[0])
        vectors[0].add_(vectors[1]).abs_()

    block = torch.from_numpy(random.standard_normal(2000))
    actual, _ = by_kernels(record(run, 2, 1), [block], "F64", "BF16", rounds_once=True)
    assert_same(actual, rounded_once((block + block).abs(), "BF16"))
