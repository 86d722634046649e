"""The threshold that exactly k elements reach, against a stable sort; every way the search can go.

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
    Locate,
    MagnitudeThresholds,
    Search,
    Threshold,
    bracket_from_sample,
    most_passes,
    narrow,
)
from lazymerge.graph.vector import Counts, count_inside
from numpy.typing import NDArray
from reduction_driver import Reduced, drive

OPERATION = MagnitudeThresholds()
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


def expected_survivors(changes: NDArray[Any], keep: int) -> NDArray[np.bool_]:
    """The first `keep` by falling magnitude, ties by position; nan come last of all."""
    magnitude = np.where(np.isnan(changes), -1.0, np.abs(changes))
    survives = np.zeros(len(changes), bool)
    survives[np.argsort(-magnitude, kind="stable")[:keep]] = True
    return survives


def survivors(changes: NDArray[Any], threshold: Threshold) -> NDArray[np.bool_]:
    magnitude = np.abs(changes)
    ties = (magnitude == threshold.value) & (np.arange(len(changes)) < threshold.stop_index)
    return (magnitude > threshold.value) | ties


def search(
    changes: NDArray[Any], *keeps: int | None, base: NDArray[Any] | None = None, block: int = BLOCK
) -> Reduced:
    """The thresholds of one model's changes, for each of several counts."""
    origin = np.zeros_like(changes) if base is None else base
    tensors = [torch.from_numpy(origin)] + [torch.from_numpy(changes)] * len(keeps)
    return drive(OPERATION, tensors, {"keep": keeps}, block)


def check(changes: NDArray[Any], keep: int, block: int = BLOCK) -> Reduced:
    """Search, and hold every promise against a stable sort."""
    reduced = search(changes, keep, block=block)
    (threshold,) = reduced.result
    number = changes.dtype.type
    numbers = ~np.isnan(changes)
    kept = survivors(changes, threshold)
    np.testing.assert_array_equal(kept[numbers], expected_survivors(changes, keep)[numbers])
    if keep <= numbers.sum() and threshold.value > 0:
        assert kept.sum() == keep
    assert threshold.below == float(np.nextafter(number(threshold.value), number(0)))
    assert reduced.full_passes <= most_passes(changes.dtype.itemsize)
    assert len(reduced.passes) <= reduced.full_passes + 2
    return reduced


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
    check(values, keep, block=data.draw(st.sampled_from([1, 7, 8, 64])))


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
        reduced = check(values, keep)
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
@pytest.mark.parametrize("kind", FLOATS)
def test_adversarial_tensors(kind: type[Any], random: np.random.Generator) -> None:
    for name, values in adversarial(kind, random).items():
        for keep in [1, SIZE - 1, SIZE, *(int(k) for k in random.integers(2, SIZE, 4))]:
            try:
                reduced = check(values, keep)
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

        def spy(search: Search, counts: list[Counts], elements: int) -> Any:
            above = sum(c.above for c in counts)
            inside = sum(c.inside for c in counts)
            result = real(search, counts, elements)
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
            held = max(held, sum(p[0].values.nbytes for p in partials))
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
