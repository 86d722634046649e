"""The thresholds that exactly k elements reach, against a stable sort; every way the search can go.

`small` makes the search's constants so small that tensors of a few thousand elements take the
ways that real ones of 10⁸ take.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from lazymerge.graph.operation import Done
from lazymerge.graph.operations import selection
from lazymerge.graph.operations.selection import (
    LargestValues,
    Locate,
    MagnitudeThresholds,
    Search,
    Threshold,
    bracket_from_sample,
    most_passes,
    narrow,
)
from lazymerge.graph.vector import Counts, count_inside, drop_largest, keep_largest
from numpy.typing import NDArray
from reduction_driver import Reduced, drive

OPERATION = MagnitudeThresholds()
LARGEST = LargestValues()
BLOCK = 64
FLOATS = [np.float32, np.float64]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    set_small(monkeypatch)


def set_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "CANDIDATES", 128)
    monkeypatch.setattr(selection, "MIN_BLOCK_CANDIDATES", 4)
    monkeypatch.setattr(selection, "SAMPLE_RUNS", 8)
    monkeypatch.setattr(selection, "SAMPLE_RUN_ELEMENTS", 8)
    monkeypatch.setattr(selection, "NARROWING_SAMPLE", 32)


def expected_survivors(
    changes: NDArray[Any], keep: int, *, keeps_last: bool = False
) -> NDArray[np.bool_]:
    """The first `keep` by falling magnitude, ties by position (from the last, if those are kept);
    nan come last of all."""
    if keeps_last:
        return expected_survivors(changes[::-1], keep)[::-1]
    magnitude = np.where(np.isnan(changes), -1.0, np.abs(changes))
    survives = np.zeros(len(changes), bool)
    survives[np.argsort(-magnitude, kind="stable")[:keep]] = True
    return survives


def survivors(changes: NDArray[Any], threshold: Threshold) -> NDArray[np.bool_]:
    """As Threshold says; zeros, which are the same kept or not, never."""
    is_before = np.arange(len(changes)) < threshold.stop_index
    return np.abs(changes) > np.where(is_before, threshold.below, threshold.value)


def search(
    changes: NDArray[Any],
    *keeps: Any,
    base: NDArray[Any] | None = None,
    block: int = BLOCK,
    keeps_last: bool = False,
) -> Reduced:
    """The thresholds of one model's changes, for each of several counts."""
    origin = np.zeros_like(changes) if base is None else base
    tensors = [torch.from_numpy(origin)] + [torch.from_numpy(changes)] * len(keeps)
    parameters: dict[str, Any] = {"keep": keeps}
    if keeps_last:
        parameters["keeps_last"] = True
    return drive(OPERATION, tensors, parameters, block)


def check(
    changes: NDArray[Any], keep: int, block: int = BLOCK, *, keeps_last: bool = False
) -> Reduced:
    """Search, and hold every promise against a stable sort."""
    reduced = search(changes, keep, block=block, keeps_last=keeps_last)
    (threshold,) = reduced.result
    check_threshold(changes, keep, threshold, keeps_last=keeps_last)
    assert reduced.full_passes <= most_passes(changes.dtype.itemsize)
    assert len(reduced.passes) <= reduced.full_passes + 2
    return reduced


def check_threshold(
    changes: NDArray[Any], keep: int, threshold: Threshold, *, keeps_last: bool = False
) -> None:
    """That it is the one by which `keep` survive, and that vectors are cut by it exactly there."""
    number = changes.dtype.type
    numbers = ~np.isnan(changes)
    there = numbers & (changes != 0)
    kept = survivors(changes, threshold)
    expected = expected_survivors(changes, keep, keeps_last=keeps_last)
    np.testing.assert_array_equal(kept[there], expected[there])
    low, high = sorted([threshold.below, threshold.value])
    if keep <= numbers.sum() and high > 0:
        assert kept.sum() == keep
    assert low == float(np.nextafter(number(high), number(0)))
    if not keeps_last:
        assert threshold.value == high
        magnitude = np.abs(changes)
        ties = (magnitude == high) & (np.arange(len(changes)) < threshold.stop_index)
        np.testing.assert_array_equal(((magnitude > high) | ties)[there], kept[there])

    fields = (threshold.value, threshold.below, threshold.stop_index)
    largest, others = (torch.from_numpy(changes.copy()) for _ in range(2))
    keep_largest(largest, *fields, 0)
    drop_largest(others, *fields, 0, torch.empty_like(others))
    np.testing.assert_array_equal(largest.numpy(), np.where(kept | ~numbers, changes, 0))
    np.testing.assert_array_equal(others.numpy(), np.where(kept & numbers, 0, changes))


def by_hand(*values: float) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


# ------------------------------------------------------------------------------ by hand


def test_by_hand() -> None:
    changes = by_hand(1, -3, 2, 0, 3, -2)
    for keep, value, stop in ((1, 3, 2), (2, 3, 6), (3, 2, 3), (4, 2, 6), (5, 1, 6), (6, 0, 6)):
        (threshold,) = search(changes, keep).result
        assert (threshold.value, threshold.stop_index) == (value, stop)


def test_the_change_is_the_difference_from_the_base() -> None:
    base, changes = by_hand(10, 10, 10), by_hand(10, 12, 7)
    (threshold,) = search(changes, 1, base=base).result
    assert threshold == Threshold(3.0, float(np.nextafter(np.float32(3), np.float32(0))), 3)


def test_models_are_searched_together_and_those_without_count_are_left_alone() -> None:
    tensors = [by_hand(0, 0, 0, 0), by_hand(1, 2, 3, 4), by_hand(9, 9, 9, 9), by_hand(4, 4, 1, 4)]
    reduced = drive(
        OPERATION, [torch.from_numpy(t) for t in tensors], {"keep": (2, None, 2)}, block_elements=2
    )
    first, second, third = reduced.result
    assert (first.value, second, third.value) == (3, None, 4)
    assert third.stop_index == 2
    assert reduced.full_passes == 1  # one pass serves all models
    assert [p.only_block for p in reduced.passes] == [None, 0]


def test_several_models_locate_their_ties_in_different_blocks() -> None:
    ones, late = np.ones(8, np.float32), by_hand(0, 0, 0, 0, 0, 0, 5, 5)
    tensors = [torch.from_numpy(t) for t in (np.zeros(8, np.float32), ones, late)]
    reduced = drive(OPERATION, tensors, {"keep": (3, 1)}, block_elements=2)
    assert [t.stop_index for t in reduced.result] == [3, 7]
    assert [p.only_block for p in reduced.passes] == [None, 1, 3]


def test_two_models_locate_their_ties_in_one_pass_where_the_block_is_the_same() -> None:
    ones = np.ones(8, np.float32)
    reduced = search(ones, 3, 4, 8, block=4)
    assert [t.stop_index for t in reduced.result] == [3, 4, 8]
    assert [p.only_block for p in reduced.passes] == [None, 0]


def test_numbers_survive_where_more_are_asked_for_than_are_not_nan() -> None:
    changes = by_hand(math.nan, 1, math.nan, 2)
    for keep in (3, 4):
        (threshold,) = search(changes, keep).result
        assert survivors(changes, threshold).tolist() == [False, True, False, True]
    (threshold,) = search(by_hand(math.nan, math.nan), 1).result
    assert threshold == Threshold(0.0, 0.0, 2)


def test_infinities_are_the_largest() -> None:
    changes = by_hand(1, -math.inf, math.inf, 2)
    (threshold,) = search(changes, 1).result
    assert threshold == Threshold(math.inf, float(np.finfo(np.float32).max), 2)
    assert search(changes, 3).result[0].value == 2


@pytest.mark.parametrize("kind", FLOATS)
def test_denormals_are_told_apart(kind: type[Any]) -> None:
    tiny = np.finfo(kind).smallest_subnormal
    changes = (np.array([3, 1, 2, 0, 1], dtype=kind) * tiny).astype(kind)
    assert [search(changes, k).result[0].value / tiny for k in (1, 2, 3, 4, 5)] == [3, 2, 1, 1, 0]
    assert search(changes, 3).result[0].stop_index == 2
    assert search(changes, 4).result[0].below == 0.0


# ----------------------------------------------------------------- the last of equal ones


def test_the_last_of_equal_ones_by_hand() -> None:
    """What two counts from below leave of ±1, by position."""
    changes = by_hand(1, -1, 3, 1, -1, 2)
    below = float(np.nextafter(np.float32(1), np.float32(0)))
    two, one = (float(np.nextafter(np.float32(v), np.float32(0))) for v in (2, 3))
    for keep, expected in (
        (1, Threshold(3.0, one, 6)),
        (2, Threshold(2.0, two, 6)),
        (3, Threshold(below, 1.0, 4)),  # of the ties at 0, 1, 3 and 4 the last
        (4, Threshold(below, 1.0, 2)),
        (5, Threshold(below, 1.0, 1)),
        (6, Threshold(1.0, below, 6)),
    ):
        assert search(changes, keep, keeps_last=True).result == (expected,)
    assert np.flatnonzero(survivors(changes, Threshold(below, 1.0, 2))).tolist() == [2, 3, 4, 5]


def test_which_of_equal_ones_survive_is_said_by_the_parameter_alone() -> None:
    changes = np.ones(200, np.float32)
    first = search(changes, 30).result[0]
    last = search(changes, 30, keeps_last=True).result[0]
    assert np.flatnonzero(survivors(changes, first)).tolist() == list(range(30))
    assert np.flatnonzero(survivors(changes, last)).tolist() == list(range(170, 200))
    said = drive(
        OPERATION,
        [torch.zeros(200), torch.from_numpy(changes)],
        {"keep": (30,), "keeps_last": False},
        BLOCK,
    )
    assert said.result == (first,)


@pytest.mark.parametrize("keeps_last", [False, True])
def test_the_block_that_is_read_again_is_the_one_in_which_ties_end(keeps_last: bool) -> None:
    """Equal ones in three of four blocks; whoever is kept, one block more is read, once."""
    changes = by_hand(0, 7, 7, 0, 0, 0, 7, 0, 7, 7, 0, 7)
    for keep in range(1, 7):
        reduced = search(changes, keep, block=3, keeps_last=keeps_last)
        check_threshold(changes, keep, reduced.result[0], keeps_last=keeps_last)
        places = np.flatnonzero(changes == 7)
        if keep == 6:
            assert [p.only_block for p in reduced.passes] == [None]
            continue
        border = places[len(places) - keep - 1] if keeps_last else places[keep - 1]
        assert [p.only_block for p in reduced.passes] == [None, border // 3]
        assert reduced.result[0].stop_index == border + 1


def test_the_last_are_the_first_of_a_tensor_turned_round(random: np.random.Generator) -> None:
    values = np.round(random.standard_normal(300) * 4).astype(np.float32)
    turned = values[::-1].copy()
    for keep in (1, 50, 150, 250):
        (first,) = search(values, keep).result
        (last,) = search(turned, keep, keeps_last=True).result
        assert (survivors(values, first) == survivors(turned, last)[::-1]).all()


def test_a_locate_of_the_last_counts_those_that_do_not_survive() -> None:
    """By hand: 2 of 5 ties survive; the third one, the second of block 1, is the last dropped."""
    search = Search(keep=3, low=2.0, high=2.0)
    blocks = counts((1, 1, []), (0, 3, []), (0, 1, []))
    first = narrow(search, blocks, 90)
    last = narrow(search, blocks, 90, keeps_last=True)
    below = float(np.nextafter(np.float32(2), np.float32(0)))
    assert first == Locate(2.0, below, block=1, rank=1)
    assert last == Locate(2.0, below, block=1, rank=2, keeps_last=True)
    assert isinstance(first, Locate)
    assert isinstance(last, Locate)
    assert first.settled(40) == Threshold(2.0, below, 41)
    assert last.settled(45) == Threshold(below, 2.0, 46)


# --------------------------------------------------------------- several thresholds per model


def test_several_counts_of_one_model() -> None:
    tensors = [by_hand(0, 0, 0, 0), by_hand(1, 2, 3, 4), by_hand(9, 9, 9, 9), by_hand(4, 4, 1, 4)]
    reduced = drive(
        OPERATION,
        [torch.from_numpy(t) for t in tensors],
        {"keep": ((1, 3), None, 2)},
        block_elements=2,
    )
    several, nothing, one = reduced.result
    assert [threshold.value for threshold in several] == [4, 2]
    assert nothing is None
    assert (one.value, one.stop_index) == (4, 2)
    assert reduced.full_passes == 1  # one pass serves all searches


def test_the_result_has_the_form_of_the_counts() -> None:
    """A tuple of one is a tuple, a tuple of none is one, and no count is no threshold."""
    changes = by_hand(1, 2, 3)
    ((first,), second, third, nothing) = search(changes, (2,), 2, (), None).result
    assert first == second
    assert isinstance(first, Threshold)
    assert (third, nothing) == ((), None)
    reduced = search(changes, None, (), None)
    assert reduced.result == (None, (), None)
    assert reduced.passes == ()  # nothing is read for nothing


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("keeps_last", [False, True])
@pytest.mark.parametrize("kind", FLOATS)
def test_searched_together_they_are_what_they_are_alone(
    kind: type[Any], keeps_last: bool, random: np.random.Generator
) -> None:
    for name, values in adversarial(kind, random).items():
        keeps = [int(k) for k in random.integers(1, SIZE + 1, 5)]
        shape = ((keeps[0], keeps[1]), None, keeps[2], (keeps[3], keeps[4], keeps[3]))
        reduced = search(values, *shape, keeps_last=keeps_last)
        pair, nothing, one, (third, fourth, again) = reduced.result
        assert nothing is None
        assert third == again, name
        for keep, threshold in zip(keeps, (*pair, one, third, fourth), strict=True):
            check_threshold(values, keep, threshold, keeps_last=keeps_last)
        assert reduced.passes[0].sample is not None, name
        assert reduced.full_passes <= most_passes(values.dtype.itemsize), name


def test_ties_of_several_counts_are_located_a_block_at_a_time() -> None:
    """Three searches of one model and one of another, whose ties end in three different blocks."""
    ones, late = np.ones(8, np.float32), by_hand(0, 0, 0, 0, 0, 0, 5, 5)
    tensors = [torch.from_numpy(t) for t in (np.zeros(8, np.float32), ones, late)]
    reduced = drive(OPERATION, tensors, {"keep": ((3, 8, 4, 1), 1)}, block_elements=2)
    several, one = reduced.result
    assert [t.stop_index for t in several] == [3, 8, 4, 1]
    assert one.stop_index == 7
    assert [p.only_block for p in reduced.passes] == [None, 1, 0, 3]


def test_a_column_is_loaded_only_while_it_is_searched() -> None:
    """Once a model's thresholds are known, its blocks are not read again for the others'."""
    reads: dict[int, int] = {1: 0, 2: 0}

    class Counting(Source):
        def __init__(self, number: int, block: torch.Tensor) -> None:
            super().__init__(block)
            self.number = number

        def read_into(self, out: torch.Tensor) -> None:
            super().read_into(out)
            if self.number:
                reads[self.number] += 1

    blocks = [torch.zeros(6), torch.arange(1.0, 7.0), torch.ones(6)]
    inputs: Any = [Counting(number, block) for number, block in enumerate(blocks)]
    parameters = {"keep": ((2, 3), (2, 3))}
    scratch = [torch.empty(6) for _ in range(3)]
    step: Any = OPERATION.first_pass(parameters, (), 6, 1)
    while not isinstance(step, Done):
        partial = OPERATION.run(inputs, parameters, step.state, scratch, 0)
        assert [len(found) for found in partial] == [2, 2]
        step = OPERATION.finish(parameters, 6, step.state, [partial])
    assert reads == {1: 1, 2: 2}  # the ties of the second are located in a pass of their own
    assert [t.stop_index for t in step.result[1]] == [2, 3]


def test_costs_and_room_grow_with_the_searches() -> None:
    one, three = {"keep": (5,)}, {"keep": ((5, 6), None, 7)}
    assert OPERATION.cost(2, one).stores == 1
    assert OPERATION.cost(4, three).stores == 3
    assert OPERATION.cost(2, one).scratch == OPERATION.cost(4, three).scratch == 3
    room, of_three = (OPERATION.statistics_bytes(4, p, 10_000_000, 39, 4) for p in (one, three))
    counts_bytes = 39 * selection.COUNTS_BYTES
    # a block's values twice, and what a second bracket is guessed from
    fixed = 4 * (20_000_000 // 39 + 6 * selection.NARROWING_SAMPLE)
    # the candidates of each search, and those of one of them joined
    assert (of_three - 3 * counts_bytes - fixed) / 4 == (room - counts_bytes - fixed) / 2 > 0
    assert OPERATION.expected_passes(three) == 1


@pytest.mark.usefixtures("small")
def test_many_searches_share_the_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "ALL_CANDIDATES", 256)
    values = np.arange(1, 1001, dtype=np.float64)
    keeps = tuple(range(100, 900, 100))
    (found,) = search(values, keeps).result
    assert [threshold.value for threshold in found] == [1001 - k for k in keeps]
    quota = [
        OPERATION.first_pass({"keep": (each,)}, (), 10_000, 4).state.quota  # type: ignore[union-attr]
        for each in ((1,), keeps, keeps * 8)
    ]
    assert quota == [128 // 4, 256 // 8 // 4, 4]  # no fewer than MIN_BLOCK_CANDIDATES


# ------------------------------------------------------------------------- the largest values


def largest(
    values: NDArray[Any], block: int = BLOCK, *, count: int | None = None, **parameters: Any
) -> Reduced:
    return drive(
        LARGEST,
        [torch.from_numpy(values)],
        {"is_sampled": True, **parameters},
        block,
        statistics=[] if count is None else [count],
    )


def test_largest_values_by_hand() -> None:
    values = by_hand(1, 3, 2, 0, 3, 2)
    reduced = largest(values, keep=(1, 2, 3, 6))
    assert [threshold.value for threshold in reduced.result] == [3, 3, 2, 0]
    # k of them is asked for, not which: no block is read again for that
    assert [p.only_block for p in reduced.passes] == [None]
    assert {threshold.stop_index for threshold in reduced.result} == {6}


def test_a_share_of_a_count() -> None:
    """k = ⌊share · count⌋, and of equal ones the first survive."""
    values = by_hand(1, 3, 2, 0, 3, 2)
    for share, count, keep in ((0.5, 5, 2), (0.99, 5, 4), (1.0, 5, 5), (0.2, 5, 1), (0.5, 2, 1)):
        threshold = largest(values, share=share, count=count).result
        check_threshold(values, keep, threshold)
    reduced = largest(values, share=0.5, count=2)
    assert reduced.result.stop_index == 2
    assert [p.only_block for p in reduced.passes] == [None, 0]


@pytest.mark.parametrize(("share", "count"), [(0.19, 5), (0.9, 1), (0.5, 0), (0.0, 10)])
def test_a_share_of_nothing_is_none(share: float, count: int) -> None:
    reduced = largest(by_hand(1, 2, 3, 4, 5, 6, 7, 8, 9, 10), share=share, count=count)
    assert reduced.result is None
    assert reduced.passes == ()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", FLOATS)
def test_adversarial_largest_values(kind: type[Any], random: np.random.Generator) -> None:
    for name, changes in adversarial(kind, random).items():
        values = np.abs(changes)
        numbers = np.sort(values[~np.isnan(values)])[::-1]
        keeps = sorted({int(k) for k in random.integers(1, SIZE + 1, 6)})
        for is_sampled in (True, False):
            reduced = largest(values, keep=tuple(keeps), is_sampled=is_sampled)
            assert (reduced.passes[0].sample is not None) == is_sampled, name
            assert all(p.only_block is None for p in reduced.passes), name
            for keep, threshold in zip(keeps, reduced.result, strict=True):
                expected = numbers[keep - 1] if keep <= len(numbers) else 0.0
                assert threshold.value == expected, (name, keep)
        share, count = float(random.random()), int(random.integers(1, SIZE + 1))
        reduced = largest(values, share=share, count=count)
        if int(share * count):
            check_threshold(values, int(share * count), reduced.result)
        else:
            assert reduced.result is None


@given(
    values=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, math.inf, math.nan]), min_size=1),
    share=st.floats(0, 1),
    block=st.sampled_from([1, 3, 64]),
)
def test_any_share_of_those_above_zero(values: list[float], share: float, block: int) -> None:
    """As sce asks: a share of the elements that are not 0 never reaches one that is."""
    array = by_hand(*values)
    count = int((array > 0).sum())
    threshold = largest(array, block, share=share, count=count).result
    if int(share * count) == 0:
        assert threshold is None
    else:
        check_threshold(array, int(share * count), threshold)
        assert threshold.value > 0


def test_what_largest_values_cost() -> None:
    counts_of_three = {"keep": (1, 2, 3), "is_sampled": False}
    a_share = {"share": 0.5, "is_sampled": True}
    assert LARGEST.cost(1, counts_of_three).stores == 3
    assert LARGEST.cost(1, a_share).stores == 1
    assert LARGEST.cost(1, a_share).scratch == 2  # the values and room: nothing to subtract
    assert LARGEST.expected_passes(counts_of_three) == 2  # without a sample one is a guess
    assert LARGEST.expected_passes(a_share) == 1
    assert LARGEST.statistics_bytes(1, a_share, 10**6, 4, 8) > 0
    # in a walk that computes nothing there is no count, and a pass all the same
    for statistics in ((), (None,)):
        step = LARGEST.first_pass(a_share, statistics, 100, 2)
        assert isinstance(step.state.entries[0][0], Search)  # type: ignore[union-attr]


# ----------------------------------------------------------------- against a stable sort

SIZE = 1024
AWKWARD = [0.0, 1.0, -1.0, 1.5, 2.0**-149, -(2.0**-126), 3e38, math.inf, -math.inf, math.nan]


@given(data=st.data(), kind=st.sampled_from(FLOATS))
@settings(max_examples=150)
def test_any_values(data: st.DataObject, kind: type[Any]) -> None:
    width = 32 if kind is np.float32 else 64
    elements = st.sampled_from(AWKWARD) | st.floats(width=width)
    values = data.draw(arrays(kind, st.integers(1, 60), elements=elements))
    keep = data.draw(st.integers(1, len(values)))
    block = data.draw(st.sampled_from([1, 7, 8, 64]))
    check(values, keep, block, keeps_last=data.draw(st.booleans()))


@given(data=st.data(), kind=st.sampled_from(FLOATS))
@settings(max_examples=80)
def test_any_values_by_way_of_a_sample(data: st.DataObject, kind: type[Any]) -> None:
    """Repeated patterns of awkward values, long enough for the sample path."""
    width = 32 if kind is np.float32 else 64
    elements = st.sampled_from(AWKWARD) | st.floats(width=width)
    pattern = data.draw(arrays(kind, st.integers(1, 40), elements=elements))
    length = data.draw(st.integers(130, 500))
    values = np.resize(pattern, length)
    if data.draw(st.booleans()):
        values = values[np.argsort(np.abs(values), kind="stable")]
    keep = data.draw(st.integers(1, length))
    with pytest.MonkeyPatch.context() as patch:
        set_small(patch)
        reduced = check(values, keep, keeps_last=data.draw(st.booleans()))
    assert reduced.passes[0].sample is not None


def adversarial(kind: type[Any], random: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Tensors of SIZE elements that are hard on a search by samples."""
    size = SIZE
    normal = random.standard_normal(size)
    place = np.arange(size)
    tiny = float(np.finfo(kind).smallest_subnormal)
    rows = normal.reshape(32, -1) * 10.0 ** random.uniform(-30, 30, (32, 1))
    sprinkled = normal.copy()
    sprinkled[::7] = np.nan
    sprinkled[::11] = np.inf
    named = {
        "normal": normal,
        "all equal": np.full(size, 1.5),
        "all zero": np.zeros(size),
        "all nan": np.full(size, np.nan),
        "two values": np.where(normal > 0.3, 1.0, -2.0),
        "two values, neighbours": np.where(normal > 0, 1.0, np.nextafter(kind(1), kind(2))),
        "coarse": np.round(normal * 4) / 4,
        "sorted": np.sort(np.abs(normal)),
        "sorted down": np.sort(np.abs(normal))[::-1],
        "sorted within blocks": np.sort(np.abs(normal).reshape(-1, BLOCK), axis=1).reshape(-1),
        "saw": 1 + (place % BLOCK) / 1024,
        "rows of other scales": rows.reshape(-1),
        "one block of giants": np.where(place // BLOCK == 9, 1e30, 1) * normal,
        "sample sees nothing": np.where(place % 128 < 16, 0, normal),
        "nan and inf": sprinkled,
        "mostly nan": np.where(place % 50 == 3, normal, np.nan),
        "mostly inf": np.where(place % 50 == 3, normal, np.inf),
        "denormals": tiny * (place * 7919 % 5000),
        "few denormals": tiny * (place * 7919 % 3),
        "every scale": 10.0 ** random.uniform(-37, 37, size),
    }
    return {name: np.ascontiguousarray(values.astype(kind)) for name, values in named.items()}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("keeps_last", [False, True])
@pytest.mark.parametrize("kind", FLOATS)
def test_adversarial_tensors(
    kind: type[Any], keeps_last: bool, random: np.random.Generator
) -> None:
    for name, values in adversarial(kind, random).items():
        for keep in [1, SIZE - 1, SIZE, *(int(k) for k in random.integers(2, SIZE, 4))]:
            try:
                reduced = check(values, keep, keeps_last=keeps_last)
            except AssertionError as error:
                raise AssertionError(f"{name}, keep {keep}") from error
            assert reduced.passes[0].sample is not None, name


@pytest.mark.usefixtures("small")
def test_ragged_last_blocks_and_single_elements(random: np.random.Generator) -> None:
    for size in (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 128, 129, 1000):
        values = np.round(random.standard_normal(size) * 8).astype(np.float32)
        for keep in {1, max(1, size // 3), size}:
            reduced = check(values, keep)
            assert (reduced.passes[0].sample is not None) == (size > 128)


def test_one_real_sized_tensor_takes_one_pass(random: np.random.Generator) -> None:
    """Nothing made small: 3·10⁶ elements, more than the candidates, in blocks of 2¹⁸."""
    values = random.standard_normal(3_000_000, dtype=np.float32)
    reduced = search(values, 300_000, 1_500_000, 2_999_000, block=1 << 18)
    assert reduced.passes[0].sample is not None
    assert reduced.full_passes <= 2  # a missed bracket, one in 10,000, costs one more
    for keep, threshold in zip((300_000, 1_500_000, 2_999_000), reduced.result, strict=True):
        assert survivors(values, threshold).sum() == keep


# -------------------------------------------------------------- each way was really taken


class Ways:
    """Which ways the search went: names of what happened, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[str] = []
        real = selection.narrow

        def spy(search: Search, counts: list[Counts], elements: int, **options: bool) -> Any:
            above = sum(c.above for c in counts)
            inside = sum(c.inside for c in counts)
            result = real(search, counts, elements, **options)
            if search.keep <= above:
                way = "missed, higher"
            elif search.keep > above + inside:
                way = "only nan below" if isinstance(result, Threshold) else "missed, lower"
            elif isinstance(result, Search):
                way = "overflow, halved" if search.passes + 1 >= selection.GUESSES else "overflow"
            else:
                way = "single value" if search.low == search.high else "among candidates"
                way += ", located" if isinstance(result, Locate) else ""
            self.taken.append(way)
            return result

        monkeypatch.setattr(selection, "narrow", spy)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch, small: None) -> Ways:
    return Ways(monkeypatch)


def test_without_a_sample_where_all_values_are_candidates(ways: Ways) -> None:
    reduced = check(np.arange(128, dtype=np.float32), 40)
    assert reduced.passes[0].sample is None
    assert ways.taken == ["among candidates"]


def test_by_sample_into_the_bracket(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "CANDIDATES", 2048)
    reduced = check((np.arange(4096) * 2531 % 4096).astype(np.float32), 20)
    assert reduced.passes[0].sample is not None
    assert ways.taken == ["among candidates"]


@pytest.mark.parametrize(
    ("sampled", "first_way"), [(0.0, "missed, higher"), (1e6, "missed, lower")]
)
def test_bracket_missed(
    ways: Ways, monkeypatch: pytest.MonkeyPatch, sampled: float, first_way: str
) -> None:
    """The one run of the sample sees nothing like the rest of the tensor."""
    monkeypatch.setattr(selection, "SAMPLE_RUNS", 1)
    monkeypatch.setattr(selection, "MARGIN_DEVIATIONS", 0.0)
    values = 100 + np.arange(4096, dtype=np.float32)
    values[:8] = sampled + np.arange(8)
    check(values, 2048)
    assert ways.taken[0] == first_way
    assert ways.taken[-1] == "among candidates"


def test_overflow_narrows(ways: Ways, random: np.random.Generator) -> None:
    check(random.permutation(4096).astype(np.float32), 2000)
    assert "overflow" in ways.taken
    assert ways.taken[-1] == "among candidates"


def test_heavy_ties_are_counted_and_located(ways: Ways) -> None:
    values = np.ones(4096, np.float32)
    reduced = check(values, 1000)
    assert ways.taken[-1] == "single value, located"
    assert reduced.passes[-1].only_block == 999 // BLOCK
    assert reduced.result[0].stop_index == 1000


@pytest.mark.parametrize("keep", [1000, 4095])
def test_heavy_ties_are_counted_and_located_from_the_last(ways: Ways, keep: int) -> None:
    values = np.ones(4096, np.float32)
    reduced = check(values, keep, keeps_last=True)
    assert ways.taken[-1] == "single value, located"
    last_dropped = 4095 - keep
    assert reduced.passes[-1].only_block == last_dropped // BLOCK
    assert reduced.result[0].stop_index == last_dropped + 1


def test_ties_among_candidates_are_located(
    ways: Ways, monkeypatch: pytest.MonkeyPatch, random: np.random.Generator
) -> None:
    monkeypatch.setattr(selection, "CANDIDATES", 2048)
    values = random.random(4096, dtype=np.float32)
    values[::512] = 3
    values[100] = 4
    reduced = check(values, 4)
    assert ways.taken == ["among candidates, located"]
    assert reduced.result[0].stop_index == 1025


def test_only_nan_below(ways: Ways) -> None:
    values = np.full(4096, np.nan, np.float32)
    values[::100] = 1
    check(values, 4000)
    assert ways.taken[-1] == "only nan below"


def hostile_narrowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses that are as bad as they can be: each takes one float off the range."""
    monkeypatch.setattr(selection, "_bracket", lambda known, *_: (known.known_low, known.known_low))


@pytest.mark.parametrize("kind", FLOATS)
def test_bad_luck_ends_within_the_bound(
    ways: Ways, monkeypatch: pytest.MonkeyPatch, random: np.random.Generator, kind: type[Any]
) -> None:
    hostile_narrowing(monkeypatch)
    worst = 0
    for values in adversarial(kind, random).values():
        for keep in (100, SIZE // 2):
            worst = max(worst, check(values, keep).full_passes)
    assert "overflow, halved" in ways.taken
    assert selection.GUESSES < worst <= most_passes(np.dtype(kind).itemsize)


def test_the_bound_is_reached_but_for_a_pass_or_two(ways: Ways) -> None:
    """Guessing switched off, no room for candidates: halving alone, down to one float."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "GUESSES", 0)
        patch.setattr(selection, "MIN_BLOCK_CANDIDATES", 1)
        patch.setattr(selection, "CANDIDATES", 1)
        values = np.full(4096, 1.5, np.float32)
        reduced = drive(
            OPERATION,
            [torch.zeros(4096), torch.from_numpy(values)],
            {"keep": (7,)},
            BLOCK,
            most_passes=40,
        )
        assert reduced.result[0].stop_index == 7
        assert reduced.full_passes <= most_passes(4) == 32


@pytest.mark.usefixtures("small")
def test_sorted_tensors_need_no_halving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates are spread over each block and weighed by it. When they were the first of each
    block, and all weighed the same, these took from 45 to 167 passes."""
    monkeypatch.setattr(selection, "CANDIDATES", 4096)
    monkeypatch.setattr(selection, "NARROWING_SAMPLE", 4096)
    for values in (np.arange(65536), np.arange(65536)[::-1], np.arange(65536) % 4096):
        changes = np.ascontiguousarray(values.astype(np.float32))
        for keep in (66, 32768, 60000):
            assert check(changes, keep, block=1024).full_passes <= selection.GUESSES


# ------------------------------------------------------------------------ the single steps


def counts(*blocks: tuple[int, int, list[float]]) -> list[Counts]:
    return [Counts(above, inside, by_hand(*values)) for above, inside, values in blocks]


def test_narrow_never_loses_the_threshold() -> None:
    """Whatever a pass finds, what is known afterwards contains the threshold, and is smaller."""
    search = Search(keep=5, low=1.0, high=2.0)
    higher = narrow(search, counts((6, 0, [])), 100)
    assert isinstance(higher, Search)
    assert (higher.known_low, higher.known_high) == (
        float(np.nextafter(np.float32(2), np.float32(3))),
        math.inf,
    )
    lower = narrow(search, counts((1, 2, [1.0, 1.5])), 100)
    assert isinstance(lower, Search)
    assert (lower.known_low, lower.known_high) == (
        0.0,
        float(np.nextafter(np.float32(1), np.float32(0))),
    )
    # to the element: the 5th of 5 above is above, of 4 above and 1 inside is inside
    at_the_edge = narrow(search, counts((5, 0, [])), 100)
    assert isinstance(at_the_edge, Search)
    assert at_the_edge.known_low > 2
    assert isinstance(narrow(search, counts((5, 3, [1.0, 1.5, 2.0])), 100), Search)
    assert narrow(search, counts((4, 1, [1.5])), 100) == Threshold(
        1.5, float(np.nextafter(np.float32(1.5), np.float32(0))), 100
    )
    inside = narrow(search, counts((1, 9, [1.0, 1.5])), 100)
    assert isinstance(inside, Search)
    assert (inside.known_low, inside.known_high) == (1.0, 2.0)
    assert 1.0 <= inside.low <= inside.high <= 2.0
    assert (inside.low, inside.high) != (1.0, 2.0)


@given(
    sample=arrays(np.float32, 64, elements=st.sampled_from(AWKWARD) | st.floats(width=32)),
    share=st.floats(0.001, 1.0),
)
def test_a_first_bracket_is_one(sample: NDArray[np.float32], share: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        set_small(patch)
        keep = max(1, int(share * 10_000))
        bracket = bracket_from_sample(Search(keep), np.abs(sample), 10_000)
    assert 0 <= bracket.low <= bracket.high
    assert (bracket.known_low, bracket.known_high) == (0.0, math.inf)


def test_candidates_are_spread_evenly_over_a_block() -> None:
    values = np.arange(100, dtype=np.float32)
    vector, room = torch.from_numpy(values), torch.empty(100)
    counted = count_inside(vector, 10.0, 89.0, 8, room)
    assert (counted.above, counted.inside) == (10, 80)
    assert counted.values.tolist() == [10, 20, 30, 40, 50, 60, 70, 80]


def test_the_sample_fits_a_block() -> None:
    """The engine reads a sample into buffers of one block."""
    from lazymerge.engine.blocks import BLOCK_ELEMENTS

    run = selection.SAMPLE_RUN_ELEMENTS
    assert selection.SAMPLE_RUNS_LARGE * run <= BLOCK_ELEMENTS
    assert selection.SAMPLE_RUNS * run <= selection.CANDIDATES


def test_partial_results_stay_within_the_room_that_is_planned(small: None) -> None:
    """What the passes hold at once, against statistics_bytes."""
    values = np.arange(4096, dtype=np.float64)
    parameters = {"keep": (2000,)}
    held = 0
    step: Any = OPERATION.first_pass(parameters, (), 4096, 64)
    while not isinstance(step, Done):
        if step.sample is None and step.only_block is None:
            scratch = [torch.empty(BLOCK, dtype=torch.float64) for _ in range(3)]
            partials = []
            for start in range(0, 4096, BLOCK):
                block = torch.from_numpy(values[start : start + BLOCK])
                source, origin = Source(block), Source(torch.zeros_like(block))
                partials.append(
                    OPERATION.run([origin, source], parameters, step.state, scratch, start)
                )
            held = max(held, sum(counted.values.nbytes for ((counted,),) in partials))
            step = OPERATION.finish(parameters, 4096, step.state, partials)
        else:
            sample = torch.from_numpy(values[:64])
            scratch = [torch.empty(64, dtype=torch.float64) for _ in range(3)]
            partial = OPERATION.run(
                [Source(torch.zeros_like(sample)), Source(sample)],
                parameters,
                step.state,
                scratch,
                0,
            )
            step = OPERATION.finish(parameters, 4096, step.state, [partial])
    assert 0 < held * 3 <= OPERATION.statistics_bytes(2, parameters, 4096, 64, item_bytes=8)


class Source:
    def __init__(self, block: torch.Tensor) -> None:
        self.block = block

    def read_into(self, out: torch.Tensor) -> None:
        out.copy_(self.block)

    def raw(self, slot: int = 0) -> torch.Tensor:
        raise NotImplementedError
