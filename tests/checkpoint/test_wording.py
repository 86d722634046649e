"""Words for messages: short whatever a file holds, and on one line."""

from __future__ import annotations

import pytest
from lazymerge.checkpoint.wording import NAME_LIMIT, SHOWN_LIMIT, kind, listed, quoted, shown


def test_names() -> None:
    assert quoted("model.norm.weight") == "'model.norm.weight'"
    assert quoted("a\n\u202e\x1b\ud800") == r"'a\n\u202e\x1b\ud800'"
    exactly = "n" * NAME_LIMIT
    assert quoted(exactly) == f"'{exactly}'"
    assert quoted(exactly + "n") == f"'{exactly[:-3]}...'"


def test_lists_of_names() -> None:
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed(list("abcdef")) == "'a', 'b', 'c', 'd', 'e' and 1 more"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([2, 3], "[2, 3]"),
        ("F32", '"F32"'),
        (None, "null"),
        ({"a": [1.5, True]}, '{"a": [1.5, true]}'),
    ],
)
def test_values(value: object, text: str) -> None:
    assert shown(value) == text
    assert shown(10**5000) == "a number"  # Python refuses to print it


def test_long_values() -> None:
    for value in ("x" * 10**6, [2**63] * 10**6, ["x" * 10**6], {"x" * 10**6: 1}):
        text = shown(value)
        assert len(text) == SHOWN_LIMIT
        assert text.endswith("...")


def test_kinds() -> None:
    values = ({}, [], "", True, 1, 1.5, None)
    words = "a mapping,a list,a string,true or false,a number,a number,null"
    assert [kind(value) for value in values] == words.split(",")
