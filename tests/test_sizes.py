"""Sizes and durations: what people write is read exactly, what is shown can be read back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lazymerge.errors import InputError
from lazymerge.sizes import (
    format_bytes,
    format_count,
    format_memory,
    format_seconds,
    parse_size,
)

POWERS = {
    "": 1,
    "B": 1,
    "k": 10**3,
    "kB": 10**3,
    "M": 10**6,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}

SPACES = st.sampled_from(["", " ", "  ", "\t"])

COUNTS = st.integers(0, 10**17)


@given(
    # float64 holds the products exactly: below 2^53
    number=st.integers(0, 8000),
    unit=st.sampled_from(sorted(POWERS)),
    spaces=st.tuples(SPACES, SPACES, SPACES),
    case=st.sampled_from([str, str.lower, str.upper]),
)
def test_a_number_and_a_unit_in_any_case_and_spacing(
    number: int, unit: str, spaces: tuple[str, str, str], case: type[str]
) -> None:
    before, between, after = spaces
    assert parse_size(f"{before}{number}{between}{case(unit)}{after}") == number * POWERS[unit]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 536_870_912),
        ("2GB", 2_000_000_000),
        ("1.5 GiB", 1_610_612_736),
        ("4e9", 4_000_000_000),
        ("4E9", 4_000_000_000),
        ("1.e3 kB", 1_000_000),
        ("0.5", 0),
        ("1.6", 2),
    ],
)
def test_sizes_by_hand(text: str, size: int) -> None:
    assert parse_size(text) == size


NO_SIZES = [
    "",
    " ",
    "GB",
    "-1",
    "+1",
    "1,5GB",
    "1.2.3",
    "1 2",
    "2 XB",
    "2GBs",
    "0x10",
    "inf",
    "nan",
]
NO_SIZES += [".5", "1e-3", "2GiB\n3", "1_000", "1e400", "9" * 400, "1e308 TiB"]


@pytest.mark.parametrize("text", NO_SIZES)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)
    assert "512MiB" in str(caught.value)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_an_input_error(text: str) -> None:
    try:
        size = parse_size(text)
    except InputError:
        return
    assert isinstance(size, int)
    assert size >= 0


@given(COUNTS)
def test_what_is_shown_reads_back_within_its_three_digits(count: int) -> None:
    for shown in (format_bytes(count), format_memory(count)):
        if shown.endswith(("PB", "PiB")):
            continue  # shown, but not a unit that people need to write
        # half a unit of the third digit, of the least leading digits 1.00
        assert abs(parse_size(shown) - count) <= 0.005 * count + 0.5, shown


@given(COUNTS, COUNTS)
def test_a_larger_size_is_never_shown_smaller(one: int, other: int) -> None:
    low, high = sorted((one, other))
    for shown in (format_bytes, format_memory):
        texts = [shown(low), shown(high)]
        if not any(text.endswith(("PB", "PiB")) for text in texts):
            assert parse_size(texts[0]) <= parse_size(texts[1])


@given(COUNTS)
def test_shown_sizes_are_short(count: int) -> None:
    assert len(format_bytes(count).split(" ")[0]) <= 4
    assert len(format_memory(count).split(" ")[0]) <= 4
    assert len(format_count(count)) <= 5


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9994, "9.99 kB"),
        (9995, "10.0 kB"),
        (99_949, "99.9 kB"),
        (99_950, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (26_031_728_640, "26.0 GB"),
    ],
)
def test_bytes_by_hand(count: int, shown: str) -> None:
    assert format_bytes(count) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(1023, "1023 B"), (1024, "1.00 KiB"), (512 << 20, "512 MiB"), (2 << 30, "2.00 GiB")],
)
def test_memory_by_hand(count: int, shown: str) -> None:
    assert format_memory(count) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0"),
        (999, "999"),
        (32_000, "32.0k"),
        (1_100_048_384, "1.10B"),
        (13_015_864_320, "13.0B"),
    ],
)
def test_counts_by_hand(count: int, shown: str) -> None:
    assert format_count(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 ms"),
        (0.85, "850 ms"),
        (0.9996, "1.0 s"),
        (4.24, "4.2 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_seconds_by_hand(seconds: float, shown: str) -> None:
    assert format_seconds(seconds) == shown


@given(st.floats(0, 1e7), st.floats(0, 1e7))
def test_longer_is_never_shown_shorter(one: float, other: float) -> None:
    def shown_seconds(seconds: float) -> float:
        parts = format_seconds(seconds).split(" ")
        units = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}
        return sum(
            float(number) * units[unit]
            for number, unit in zip(parts[::2], parts[1::2], strict=True)
        )

    low, high = sorted((one, other))
    assert shown_seconds(low) <= shown_seconds(high)
