"""Rows of what is held, block by block, wherever blocks begin and end."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from lazymerge.graph.operations.placed_rows import PlacedRows
from lazymerge.graph.rows import RowTable


class _Unread:
    def read_into(self, out: Any) -> None:
        raise AssertionError("the input is not looked at")


@given(
    st.integers(1, 9),
    st.integers(1, 5),
    st.lists(st.integers(-1, 1 << 20), min_size=1, max_size=12),
    st.data(),
)
def test_blocks_are_those_of_the_whole(
    rows: int, width: int, wanted: list[int], data: st.DataObject
) -> None:
    table = [min(row, row % rows) for row in wanted]
    matrix = np.arange(1.0, rows * width + 1).reshape(rows, width)
    expected = [matrix[row] if row >= 0 else np.zeros(width) for row in table]
    whole = np.concatenate(expected)
    operation = PlacedRows()
    parameters = {
        "row_elements": width,
        "rows": len(table),
        "table": RowTable.of(table).to_text(),
    }
    prepared = operation.prepare(parameters, [matrix])
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    out = torch.full((stop - start,), torch.nan, dtype=torch.float64)
    operation.run(out, [_Unread()], prepared, [], start)
    assert out.tolist() == whole[start:stop].tolist()
    assert not np.signbit(out.numpy()).any()
