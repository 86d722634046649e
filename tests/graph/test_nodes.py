"""Nodes are identified by what they compute: nothing less, nothing more."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from lazymerge.checkpoint import TensorInfo
from lazymerge.graph.graph import Graph, node_inputs
from lazymerge.graph.node import Apply, Node, Read, Reduce, Write, as_parameters

INFO = TensorInfo("w", "BF16", (2, 3), "model.safetensors", 100, 112)
READ = Read("/models/a", INFO)
REDUCE = Reduce("gram", as_parameters({"a": 1}), (READ.id,), (), (2, 3), "F64")
APPLY = Apply("slerp", as_parameters({"t": 0.5}), (READ.id,), (REDUCE.id,), (2, 3), "F64")
WRITE = Write("w", "BF16", (2, 3), APPLY.id)

CHANGES: list[tuple[Node, str, Any]] = [
    (READ, "folder", "/models/b"),
    (READ, "tensor", replace(INFO, file="other.safetensors")),
    (READ, "tensor", replace(INFO, dtype="F16")),
    (READ, "tensor", replace(INFO, shape=(3, 2))),
    (READ, "tensor", replace(INFO, start=88, stop_exclusive=100)),
    (READ, "tensor", replace(INFO, stop_exclusive=106, shape=(1, 3))),
    *[
        (node, field, value)
        for node in (REDUCE, APPLY)
        for field, value in (
            ("operation", "other"),
            ("parameters", as_parameters({"t": 0.25})),
            ("parameters", ()),
            ("inputs", (READ.id, READ.id)),
            ("inputs", ("0" * 32,)),
            ("statistics", ("0" * 32,)),
            ("shape", (3, 2)),
            ("working_dtype", "F32"),
        )
    ],
    (WRITE, "name", "v"),
    (WRITE, "dtype", "F32"),
    (WRITE, "shape", (6,)),
    (WRITE, "source", READ.id),
]


@pytest.mark.parametrize(("node", "field", "value"), CHANGES)
def test_every_field_is_part_of_the_id(node: Any, field: str, value: Any) -> None:
    changed = replace(node, **{field: value})
    assert changed.id != node.id
    assert replace(changed, **{field: getattr(node, field)}).id == node.id


def test_the_kind_is_part_of_the_id() -> None:
    fields = ("x", (), (READ.id,), (), (2, 3), "F64")
    assert Reduce(*fields).id != Apply(*fields).id


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 1.0), (1, True), (0.0, -0.0), ("1", 1), (None, "null"), ((1.0,), 1.0), ((), None)],
)
def test_parameters_that_python_or_json_may_confuse_are_told_apart(one: Any, other: Any) -> None:
    first, second = (replace(APPLY, parameters=as_parameters({"t": v})) for v in (one, other))
    assert first.id != second.id


def test_parameters_have_one_order() -> None:
    assert as_parameters({"b": 1, "a": 2}) == as_parameters({"a": 2, "b": 1})


def test_what_a_read_is_called_does_not_matter() -> None:
    """Two names for the same bytes are one read."""
    assert Read("/models/a", replace(INFO, name="tied")).id == READ.id


def test_folders_whose_names_are_no_text_have_an_id() -> None:
    """Linux paths are bytes; Python shows what is not UTF-8 as lone surrogates."""
    assert (
        Read(os.fsdecode(b"/models/\xff"), INFO).id != Read(os.fsdecode(b"/models/\xfe"), INFO).id
    )


def test_ids_do_not_depend_on_the_process() -> None:
    """Pinned: a change of these ids makes every saved plan and journal void."""
    script = (
        "from lazymerge.checkpoint import TensorInfo\n"
        "from lazymerge.graph.node import *\n"
        "r = Read('/models/a', TensorInfo('w', 'BF16', (2, 3), 'model.safetensors', 100, 112))\n"
        "g = Reduce('gram', as_parameters({'a': 1}), (r.id,), (), (2, 3), 'F64')\n"
        "a = Apply('slerp', as_parameters({'t': 0.5}), (r.id,), (g.id,), (2, 3), 'F64')\n"
        "print(r.id, g.id, a.id, Write('w', 'BF16', (2, 3), a.id).id)\n"
    )
    expected = " ".join(node.id for node in (READ, REDUCE, APPLY, WRITE))
    for hash_seed in ("0", "12345"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == expected, done.stderr


def test_nodes_are_values() -> None:
    assert replace(APPLY) == APPLY
    assert hash(replace(APPLY)) == hash(APPLY)
    with pytest.raises(AttributeError):
        APPLY.operation = "other"  # type: ignore[misc]


# ---------------------------------------------------------------------------- the graph


def graph_of(*nodes: Node) -> Graph:
    graph = Graph()
    for node in nodes:
        graph.add(node)
    return graph


def test_adding_what_is_there_shares_it() -> None:
    graph = graph_of(READ, REDUCE, APPLY, WRITE)
    size = len(graph)
    for node in (READ, REDUCE, APPLY, WRITE):
        assert graph.add(replace(node)) == node.id
    assert len(graph) == size == 4
    assert graph.writes == (WRITE,)


def test_inputs_must_be_there_first() -> None:
    with pytest.raises(KeyError, match=f"Write {WRITE.id} uses unknown node {APPLY.id}"):
        graph_of(WRITE)


def test_lookups() -> None:
    graph = graph_of(READ, REDUCE, APPLY, WRITE)
    assert APPLY.id in graph
    assert "nothing" not in graph
    assert graph[APPLY.id] is APPLY
    assert list(graph) == [READ, REDUCE, APPLY, WRITE]
    assert graph.block_node(APPLY.id) is APPLY
    assert graph.reduce(REDUCE.id) is REDUCE
    with pytest.raises(TypeError, match=r"Reduce .* does not yield blocks"):
        graph.block_node(REDUCE.id)
    with pytest.raises(TypeError, match=r"Apply .* is not a Reduce"):
        graph.reduce(APPLY.id)
    assert graph.count_by_kind() == {"Read": 1, "Reduce gram": 1, "Apply slerp": 1, "Write": 1}


def test_inputs_of_every_kind() -> None:
    assert [node_inputs(node) for node in (READ, REDUCE, APPLY, WRITE)] == [
        (),
        (READ.id,),
        (READ.id, REDUCE.id),
        (APPLY.id,),
    ]


def test_reductions_come_inputs_first_and_once() -> None:
    """A diamond: two reductions of one input, a third of both, and a last that uses all."""
    first = replace(REDUCE, operation="first")
    second = replace(REDUCE, operation="second", statistics=(first.id,))
    inner = replace(APPLY, statistics=(second.id,))
    third = replace(REDUCE, operation="third", inputs=(inner.id,), statistics=(first.id,))
    last = replace(APPLY, inputs=(inner.id, READ.id), statistics=(third.id, first.id))
    write = replace(WRITE, source=last.id)
    graph = graph_of(READ, first, second, inner, third, last, write)
    assert graph.reductions_of(write.id) == (first, second, third)
    assert graph.reductions_of(second.id) == (first, second)


def test_reads_of_one_pass_leave_out_those_of_statistics() -> None:
    other = Read("/models/b", INFO)
    gram = replace(REDUCE, inputs=(other.id,))
    inner = replace(APPLY, inputs=(READ.id, READ.id), statistics=(gram.id,))
    outer = replace(APPLY, inputs=(inner.id, READ.id), statistics=())
    graph = graph_of(READ, other, gram, inner, outer, replace(WRITE, source=outer.id))
    assert graph.reads_of(outer.id) == (READ,)
    assert graph.reads_of(gram.id) == (other,)
    assert graph.reads_of(graph.writes[0].id) == (READ,)


def test_without_unused() -> None:
    unused = Read("/models/b", INFO)
    idle = replace(REDUCE, inputs=(unused.id,))
    graph = graph_of(unused, READ, REDUCE, idle, APPLY, WRITE)
    kept = graph.without_unused()
    assert list(kept) == [READ, REDUCE, APPLY, WRITE]
    assert kept.writes == graph.writes
    assert len(graph) == 6
