"""Random numbers that are a function of a key and an index: the authors' known answers, the same
numbers whoever asks for them and how, and what one expects of random numbers.

Philox is written out here once more, with Python's integers, for all 128 bits of the counter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lazymerge.engine.device import vector as device_vector
from lazymerge.engine.device.vector import LEAST_COUNTERS, fill_uniform_on_device
from lazymerge.graph import random_bits
from lazymerge.graph.random_bits import (
    CHUNK_COUNTERS,
    ROOM_WORDS,
    UNIT,
    fill_uniform,
    philox,
    stream_key,
)
from lazymerge.graph.vector import draw
from numpy.typing import NDArray

ONES = 0xFFFFFFFF

KNOWN_ANSWERS = [  # Random123, tests/kat_vectors: philox4x32 with 10 rounds
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def plain_philox(counter: Sequence[int], key: Sequence[int]) -> tuple[int, ...]:
    """Philox4x32-10 as its authors define it: counter and key in words of 32 bits, lowest first."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high_0, low_0 = divmod(0xD2511F53 * c0, 1 << 32)
        high_1, low_1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return (c0, c1, c2, c3)


def plain_uniform(key: int, element: int) -> float:
    """The number of one element: the upper 24 bits of its word."""
    number, lane = divmod(element, 4)
    counter = (number & ONES, number >> 32, 0, 0)
    word = plain_philox(counter, (key & ONES, (key >> 32) & ONES))[lane]
    return (word >> 8) / (1 << 24)


def words_of(key: int, counters: Sequence[int]) -> NDArray[np.uint64]:
    numbers = np.array(counters, dtype=np.uint64)
    return philox(key, numbers, np.full((ROOM_WORDS, len(numbers)), ONES, np.uint64)).copy()


keys = st.integers(-(2**63), 2**63 - 1)


# ------------------------------------------------------------------------- known answers


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_the_authors_known_answers(
    counter: Sequence[int], key: Sequence[int], expected: Sequence[int]
) -> None:
    assert plain_philox(counter, key) == expected


def test_the_known_answer_that_needs_no_more_than_64_bits_of_counter() -> None:
    _, _, expected = KNOWN_ANSWERS[0]
    assert words_of(0, [0])[:, 0].tolist() == list(expected)


@given(keys, st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8))
def test_the_words_of_any_counter(key: int, counters: list[int]) -> None:
    found = words_of(key, counters)
    for counter, words in zip(counters, found.T.tolist(), strict=True):
        expected = plain_philox(
            (counter & ONES, counter >> 32, 0, 0), (key & ONES, (key >> 32) & ONES)
        )
        assert tuple(words) == expected


def test_keys_are_signed_or_not_as_one_likes() -> None:
    """The kernels take 64 bits with a sign; the bits are the same."""
    assert words_of(-1, [5]).tolist() == words_of(2**64 - 1, [5]).tolist()
    assert plain_uniform(-1, 3) == plain_uniform(2**64 - 1, 3)


# -------------------------------------------------------------- whoever asks, and how

Fill = Callable[[int, int, int, type[Any]], NDArray[Any]]
"""fill(key, start, length, kind): that many numbers from an element on."""


def on_host(key: int, start: int, length: int, kind: type[Any]) -> NDArray[Any]:
    out, room = np.full(length, np.nan, kind), np.full(length, np.nan, kind)
    fill_uniform(out, key, start, room)
    return out


def on_device(key: int, start: int, length: int, kind: type[Any]) -> NDArray[Any]:
    out, room = (torch.from_numpy(np.full(length, np.nan, kind)) for _ in range(2))
    fill_uniform_on_device(out, key, start, room)
    return out.numpy()


def by_vectors(key: int, start: int, length: int, kind: type[Any]) -> NDArray[Any]:
    vector, room = (torch.from_numpy(np.full(length, np.nan, kind)) for _ in range(2))
    draw(vector, key, start, room)
    return vector.numpy()


FILLS: dict[str, Fill] = {"host": on_host, "device": on_device, "vectors": by_vectors}
every_fill = pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
every_kind = pytest.mark.parametrize("kind", [np.float32, np.float64])


@every_fill
@every_kind
def test_numbers_are_those_of_the_definition(fill: Fill, kind: type[Any]) -> None:
    key = stream_key(1, 0, "w")
    for start in (0, 1, 2, 3, 4, 2**33 + 1, 2**34 - 7, 2**40 + 3):  # 2^34: the counter's 2^32
        found = fill(key, start, 37, kind)
        assert found.dtype == kind
        assert found.tolist() == [plain_uniform(key, start + i) for i in range(37)]


@every_fill
@every_kind
@settings(max_examples=60)
@given(
    key=keys,
    start=st.integers(0, 3000) | st.integers(2**40, 2**40 + 9),
    length=st.integers(1, 3000),
)
def test_any_start_and_length_are_part_of_one_long_draw(
    fill: Fill, kind: type[Any], key: int, start: int, length: int
) -> None:
    """Blocks may be cut anywhere, in whatever room there is."""
    origin = start // 2000 * 2000
    whole = on_host(key, origin, start - origin + length, np.float64)
    assert fill(key, start, length, kind).tolist() == whole[start - origin :].tolist()


@every_kind
def test_what_is_done_at_a_time_does_not_show(
    kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several chunks of counters, and lengths around theirs."""
    length = 4 * CHUNK_COUNTERS * 3
    whole = on_host(7, 0, length + 50, kind)
    for end in (length - 1, length, length + 1, length + 50):
        for start in (0, 1, 3):
            assert on_host(7, start, end - start, kind).tolist() == whole[start:end].tolist()
    monkeypatch.setattr(random_bits, "CHUNK_COUNTERS", 100)
    assert on_host(7, 0, length + 50, kind).tolist() == whole.tolist()


@pytest.mark.parametrize("length", [1, 100, 4 * LEAST_COUNTERS * (ROOM_WORDS + 1), 50_001])
@every_kind
def test_host_and_device_draw_the_same(length: int, kind: type[Any]) -> None:
    for start in (0, 2**18 + 3, 2**33 + 2):
        key = stream_key(3, 1, f"{start}")
        host, device = (fill(key, start, length, kind) for fill in (on_host, on_device))
        assert host.tobytes() == device.tobytes()


def test_room_of_any_place_in_memory_will_do() -> None:
    """float32 vectors lie at multiples of 4 bytes, the words want 8."""
    expected = on_host(5, 11, 2000, np.float32)
    memory = np.zeros(2008, np.float32)
    for offset in range(4):
        out = np.zeros(2000, np.float32)
        fill_uniform(out, 5, 11, memory[offset : offset + 2000])
        assert out.tobytes() == expected.tobytes()
    assert (memory[2003:] == 0).all()  # nothing is written beyond the room


@every_fill
@every_kind
def test_numbers_are_in_0_1_and_multiples_of_the_unit(fill: Fill, kind: type[Any]) -> None:
    found = fill(99, 0, 20_000, kind)
    assert (found >= 0).all()
    assert (found < 1).all()
    assert (found.astype(np.float64) / UNIT == np.floor(found.astype(np.float64) / UNIT)).all()


@every_kind
def test_the_largest_number_is_below_1(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """2²⁴ − 1 units have 24 bits, so float32 does not round them up to 1."""

    def ones(key: int, counters: NDArray[Any], room: NDArray[Any]) -> NDArray[Any]:
        room[:4] = ONES
        return room[:4]

    def ones_on_device(key: int, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        return [row.fill_(ONES) for row in rows[:4]]

    monkeypatch.setattr(random_bits, "philox", ones)
    monkeypatch.setattr(device_vector, "_philox", ones_on_device)
    for fill in FILLS.values():
        assert fill(0, 3, 30, kind).tolist() == [1 - 2.0**-24] * 30


# ------------------------------------------------------------------------------- keys


def test_keys_are_what_they_were() -> None:
    """Pinned: other keys would be other merges from the same recipe."""
    assert stream_key(0, 0, "model.norm.weight") == -6530113909322795296
    text = "-42/1/ünïcode/名".encode()
    expected = int.from_bytes(blake2b(text, digest_size=8).digest(), "little", signed=True)
    assert stream_key(-42, 1, "ünïcode/名") == expected


def test_keys_differ_by_seed_model_and_tensor() -> None:
    made = {
        stream_key(seed, model, tensor)
        for seed in (-1, 0, 1, 10, 11, 2**70)
        for model in (0, 1, 11, 110)
        for tensor in ("w", "1/w", "0/w", "w ", "", "\ud800")  # the last is no text: bytes were not
    }
    assert len(made) == 6 * 4 * 6
    assert all(-(2**63) <= key < 2**63 for key in made)


# -------------------------------------------------------------------------- statistics

# At fixed seeds, so that they hold or do not: numbers that were not random would miss by far.

COUNT = 1 << 20


@pytest.fixture(scope="module", params=[(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")])
def sample(request: pytest.FixtureRequest) -> NDArray[np.float64]:
    return on_host(stream_key(*request.param), 0, COUNT, np.float64)


def deviates(value: float, expected: float, deviation: float) -> float:
    """By how many standard deviations."""
    return abs(value - expected) / deviation


def chi_square(counts: NDArray[Any], expected: float) -> float:
    """In standard deviations of a normal deviate (Wilson and Hilferty 1931)."""
    degrees = counts.size - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    scale = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - (1 - scale)) / math.sqrt(scale)


def test_mean_and_variance(sample: NDArray[np.float64]) -> None:
    assert deviates(sample.mean(), 0.5, math.sqrt(1 / 12 / COUNT)) < 4
    assert deviates(sample.var(), 1 / 12, math.sqrt(1 / 180 / COUNT)) < 4


def test_the_share_below_a_probability(sample: NDArray[np.float64]) -> None:
    """What dare and della ask."""
    for probability in (0.001, 0.1, 0.5, 0.9, 0.999):
        deviation = math.sqrt(COUNT * probability * (1 - probability))
        assert deviates((sample < probability).sum(), COUNT * probability, deviation) < 4


@pytest.mark.parametrize("byte", [0, 1, 2])
def test_every_byte_of_the_24_bits(sample: NDArray[np.float64], byte: int) -> None:
    numbers = (sample / UNIT).astype(np.int64)
    counts = np.bincount((numbers >> (8 * byte)) & 0xFF, minlength=256)
    assert abs(chi_square(counts, COUNT / 256)) < 4


@pytest.mark.parametrize("lane", range(4))
def test_every_word_of_a_counter(sample: NDArray[np.float64], lane: int) -> None:
    part = sample[lane::4]
    counts = np.bincount((part * 1000).astype(np.int64), minlength=1000)
    assert abs(chi_square(counts, len(part) / 1000)) < 4


def test_pairs_of_neighbours(sample: NDArray[np.float64]) -> None:
    coarse = (sample * 32).astype(np.int64)
    counts = np.bincount(coarse[::2] * 32 + coarse[1::2], minlength=1024)
    assert abs(chi_square(counts, COUNT / 2 / 1024)) < 4


def correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """In standard deviations of what independent numbers have."""
    return float(((one - 0.5) * (other - 0.5)).sum()) * 12 / math.sqrt(len(one))


def test_lags(sample: NDArray[np.float64]) -> None:
    found = [correlation(sample[:-lag], sample[lag:]) for lag in range(1, 65)]
    assert max(map(abs, found)) < 4.5
    assert sum(abs(deviation) > 2 for deviation in found) < 12  # of 64; 3 are expected


RELATED = [
    ((0, 0, "model.layers.0.w"), (0, 1, "model.layers.0.w")),  # models
    ((0, 2, "model.layers.0.w"), (0, 3, "model.layers.0.w")),
    ((0, 0, "model.layers.0.w"), (0, 0, "model.layers.1.w")),  # tensors
    ((0, 0, "a"), (0, 0, "b")),
    ((0, 0, "model.layers.0.w"), (1, 0, "model.layers.0.w")),  # seeds
    ((7, 0, "a"), (8, 0, "a")),
    ((1, 0, "a"), (0, 1, "a")),  # both
]


@pytest.mark.parametrize(("one", "other"), RELATED)
def test_no_correlation_between_keys(one: Any, other: Any) -> None:
    first, second = (on_host(stream_key(*key), 0, COUNT, np.float64) for key in (one, other))
    assert abs(correlation(first, second)) < 4
    for lag in (1, 2, 3, 4, 8, 64, 4096):
        assert abs(correlation(first[lag:], second[:-lag])) < 4.5
        assert abs(correlation(first[:-lag], second[lag:])) < 4.5
    both = (first < 0.3) & (second < 0.3)  # masks are as independent as their numbers
    assert deviates(both.sum(), 0.09 * COUNT, math.sqrt(COUNT * 0.09 * 0.91)) < 4


def test_neighbouring_keys_are_unrelated_too() -> None:
    """Keys are hashes; that Philox itself does not relate neighbours is the second fence."""
    base = 2**62 + 12345
    first = on_host(base, 0, COUNT, np.float64)
    for change in (1, 2**8, 2**31, 2**32, 2**40, 2**60):
        second = on_host(base ^ change, 0, COUNT, np.float64)
        assert abs(correlation(first, second)) < 4
        differing = (first / UNIT).astype(np.int64) ^ (second / UNIT).astype(np.int64)
        flipped = sum(((differing >> bit) & 1).sum() for bit in range(24))
        assert deviates(flipped, 12 * COUNT, math.sqrt(6 * COUNT)) < 4.5
