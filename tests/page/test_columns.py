"""Names and numbers come back as they were, and take little room."""

from __future__ import annotations

import json
import zlib
from base64 import b64decode

from hypothesis import given
from hypothesis import strategies as st
from lazymerge.page.columns import differences, pack_names, packed_text, sums, unpack_names

NUMBERED = st.from_regex(r"(m\.[0-9]{1,9}\.|w|\.0[0-9]|\u0663){0,5}", fullmatch=True)


@given(st.lists(st.one_of(NUMBERED, st.text(max_size=20))))
def test_names_come_back(names: list[str]) -> None:
    packed = json.loads(json.dumps(pack_names(names)))
    assert unpack_names(packed) == names


@given(st.lists(st.integers(-(2**52), 2**52)))
def test_columns_come_back(column: list[int]) -> None:
    assert sums(differences(column)) == column


def test_experts_take_little_room() -> None:
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer in range(58)
        for expert in range(512)
        for part in ("gate", "up", "down")
    ]
    assert len(packed_text(pack_names(names))) < 20_000  # the names themselves are 4 MB


def test_packed_text_is_deflate_of_json() -> None:
    document = {"text": "</script>\ud800é", "numbers": [1, 2.5, None]}
    text = packed_text(document)
    assert text.isascii()
    assert "<" not in text
    data = zlib.decompress(b64decode(text), -zlib.MAX_WBITS)
    assert json.loads(data) == document
