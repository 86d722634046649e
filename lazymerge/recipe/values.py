"""A parameter's value: what YAML has as what the method takes."""

from __future__ import annotations

import math
import re

from .signature import Parameter, Scalar

LARGEST_NUMBER = 1e100
"""Of a parameter: sums of more, and products of two, would not be finite in float64."""

# Python's float() takes more than YAML's and JSON's numbers (nan, 1_0, other alphabets' digits).
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")

BOOLEAN_WORDS: dict[str, bool] = {
    spelling: value
    for word, value in (
        ("true", True),
        ("yes", True),
        ("on", True),
        ("false", False),
        ("no", False),
        ("off", False),
    )
    for spelling in (word, word.capitalize(), word.upper())
}
"""YAML's booleans, which are booleans in quotes too."""

TYPE_WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}


def convert(value: object, to: type[Scalar]) -> Scalar | None:
    """The value as a parameter's type, or None.

    As in mergekit, a quoted number is a number (YAML 1.1 reads 1e-4 as text) and 0 and 1 are
    booleans; unlike there, a boolean is not a number.
    """
    if to is str:
        return value if isinstance(value, str) else None
    if isinstance(value, str):
        if to is bool:
            return BOOLEAN_WORDS.get(value)
        text = value.strip()
        if len(text) > 400 or not _NUMBER.fullmatch(text):
            return None
        value = int(text) if text.lstrip("+-").isdigit() else float(text)
    if to is bool:
        if isinstance(value, (bool, int, float)) and value in (0, 1):
            return bool(value)
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    if not math.isfinite(number) or abs(number) > LARGEST_NUMBER:
        return None
    if to is float:
        return number
    return int(value) if number.is_integer() else None


def is_too_large(value: object) -> bool:
    """Whether it is a float, or the text of one, that is finite and larger than it may be."""
    if isinstance(value, str) and len(value) <= 400 and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    return isinstance(value, float) and LARGEST_NUMBER < abs(value) < math.inf


def in_range(value: int | float, parameter: Parameter) -> bool:
    return (parameter.minimum is None or value >= parameter.minimum) and (
        parameter.maximum is None or value <= parameter.maximum
    )


def range_text(parameter: Parameter) -> str:
    """A parameter's bounds in words: `from 0 to 1`, `at least 1`."""
    low, high = parameter.minimum, parameter.maximum
    if low is not None and high is not None:
        return f"from {low:g} to {high:g}"
    if low is not None:
        return f"at least {low:g}"
    return "of any size" if high is None else f"at most {high:g}"
