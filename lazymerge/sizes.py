"""Sizes and durations as people write and read them."""

from __future__ import annotations

import re
from math import isfinite

from .errors import InputError

_UNITS: dict[str, int] = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{prefix: 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}

_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes from `512MiB`, `2GB`, `1.5 GiB`, `4e9` or a plain number.

    kB, MB, GB are powers of 1000; KiB, MiB, GiB of 1024. Case does not matter.

    Raises:
        InputError: it is not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is not None and match[2].lower() in _UNITS:
        size = float(match[1]) * _UNITS[match[2].lower()]
        if isfinite(size):  # a float made of too many digits is infinite
            return round(size)
    raise InputError(f"{text!r} is not a size; write for example 512MiB, 2GB or 4e9")


def format_bytes(count: float) -> str:
    """`1.5 GB`: powers of 1000, three significant digits; for data on disk."""
    return _format(count, 1000, ("B", "kB", "MB", "GB", "TB", "PB"))


def format_memory(count: float) -> str:
    """`1.5 GiB`: powers of 1024, three significant digits; for memory."""
    return _format(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def _format(count: float, base: int, units: tuple[str, ...]) -> str:
    value = float(count)
    for unit in units:
        if value < base * 0.9995 or unit == units[-1]:
            break
        value /= base
    if unit == units[0]:
        return f"{value:.0f} {unit}"
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f} {unit}"


def format_count(count: int) -> str:
    """`1.10B`: three significant digits of a number of parameters."""
    return _format(count, 1000, ("", "k", "M", "B", "T", "Q")).replace(" ", "")


def format_seconds(seconds: float) -> str:
    """`850 ms`, `4.2 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def counted(count: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
