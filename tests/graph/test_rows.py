"""Tables of rows, and the reads that use them."""

from __future__ import annotations

import base64
import zlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lazymerge.checkpoint.tensor import TensorInfo
from lazymerge.graph.export import graph_from_json, graph_to_json
from lazymerge.graph.graph import Graph
from lazymerge.graph.node import Read, Write
from lazymerge.graph.rows import RowTable
from lazymerge.graph.verify import IllegalGraphError, verify_graph

INFO = TensorInfo("embed", "BF16", (5, 3), "f.safetensors", 100, 130)

rows = st.lists(st.integers(-1, (1 << 24) - 1), max_size=300)


@given(rows)
def test_tables_survive_being_saved(numbers: list[int]) -> None:
    table = RowTable.of(numbers)
    again = RowTable.from_text(table.to_text(), len(numbers))
    assert list(again) == numbers
    assert again == table
    assert again.digest == table.digest
    assert again.present == sum(number >= 0 for number in numbers)


@given(rows)
def test_what_is_leading(numbers: list[int]) -> None:
    assert RowTable.of(numbers).is_leading == (numbers == list(range(len(numbers))))


def test_a_vocabulary_of_runs_is_a_short_text() -> None:
    table = RowTable.of([*range(200_000), *[-1] * 50_000, *range(200_000, 262_144)])
    assert len(table.to_text()) < 3_000


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("?", "."),
        ("AAAA", "damaged"),
        (base64.b64encode(zlib.compress(bytes(8))).decode(), "has not 3"),
        (base64.b64encode(zlib.compress(bytes(16))).decode(), "has not 3"),
        (base64.b64encode(zlib.compress(b"\xfe\xff\xff\xff" * 3)).decode(), "holds -2"),
        (base64.b64encode(zlib.compress(b"\xff\xff\xff\x7f" * 3)).decode(), "holds 4294967294"),
    ],
)
def test_texts_that_are_no_tables(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        RowTable.from_text(text, 3)


def test_a_bomb_is_not_unpacked() -> None:
    bomb = base64.b64encode(zlib.compress(bytes(1 << 28), 9)).decode()
    with pytest.raises(ValueError, match="has not 3"):
        RowTable.from_text(bomb, 3)


def test_a_read_of_rows() -> None:
    read = Read("/m", INFO, RowTable.of([4, -1, 0, 1]))
    assert read.shape == (4, 3)
    assert read.element_count == 12
    assert read.size_bytes == 3 * 3 * 2
    plain = Read("/m", INFO)
    assert len({read.id, plain.id, Read("/m", INFO, RowTable.of([4, -1, 1, 0])).id}) == 3
    assert Read("/m", INFO, RowTable.of([4, -1, 0, 1])).id == read.id


def graph_of(*reads: Read) -> Graph:
    graph = Graph()
    for number, read in enumerate(reads):
        graph.add(Write(f"t{number}", read.dtype, read.shape, graph.add(read)))
    return graph


def test_graphs_are_saved_with_their_tables() -> None:
    table = RowTable.of([4, -1, 0, 1])
    graph = graph_of(Read("/m", INFO, table), Read("/n", INFO, table), Read("/n", INFO))
    verify_graph(graph)
    again = graph_from_json(graph_to_json(graph))
    assert [node.id for node in again] == [node.id for node in graph]
    first, second, plain = (node for node in again if isinstance(node, Read))
    assert first.rows is second.rows
    assert plain.rows is None


@pytest.mark.parametrize("numbers", [[5], [-2], [0, 1 << 30]])
def test_rows_that_are_not_there(numbers: list[int]) -> None:
    with pytest.raises(IllegalGraphError, match="R8"):
        verify_graph(graph_of(Read("/m", INFO, RowTable.of(numbers))))
    scalar = replace(INFO, shape=(), stop_exclusive=102)
    with pytest.raises(IllegalGraphError, match="R8"):
        verify_graph(graph_of(Read("/m", scalar, RowTable.of([0]))))


@pytest.mark.parametrize("count", [-1, 1 << 40, "3", True])
def test_counts_that_are_none(count: object) -> None:
    (entry, write) = graph_to_json(graph_of(Read("/m", INFO, RowTable.of([0]))))
    with pytest.raises(ValueError, match="rows"):
        graph_from_json([{**entry, "row_count": count}, write])
