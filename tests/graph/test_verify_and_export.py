"""Every rule of a legal graph has a graph that breaks it; every legal graph survives JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from lazymerge import methods
from lazymerge.checkpoint import TensorInfo
from lazymerge.graph.export import graph_from_json, graph_to_json
from lazymerge.graph.graph import Graph
from lazymerge.graph.node import Apply, Node, Read, Reduce, Write, as_parameters
from lazymerge.graph.verify import IllegalGraphError, verify_graph

assert methods.METHODS  # registers all operations by being imported


def read(folder: str, dtype: str = "F32", shape: tuple[int, ...] = (2, 3)) -> Read:
    widths = {"F32": 4, "F64": 8, "BF16": 2, "I32": 4}
    size = widths[dtype] * shape[0] * shape[1]
    return Read(folder, TensorInfo("w", dtype, shape, "model.safetensors", 80, 80 + size))


A, B = read("/a"), read("/b")
GRAM = Reduce("gram", (), (A.id, B.id), (), (2, 3), "F64")
SLERP = Apply("slerp", as_parameters({"t": 0.5}), (A.id, B.id), (GRAM.id,), (2, 3), "F64")
WRITE = Write("w", "BF16", (2, 3), SLERP.id)


def graph_of(*nodes: Node) -> Graph:
    graph = Graph()
    for node in nodes:
        graph.add(node)
    return graph


def refused(rule: str, problem: str, *nodes: Node) -> None:
    with pytest.raises(IllegalGraphError, match=f"^{rule}.*: .*{problem}"):
        verify_graph(graph_of(*nodes))


def with_source(source: Apply | Read, *before: Node, **changes: Any) -> tuple[Node, ...]:
    fields = {"name": "w", "dtype": "BF16", "shape": source.shape, "source": source.id, **changes}
    return (*before, source, Write(**fields))


def linear(*inputs: Node, dtype: str = "F64", shape: tuple[int, ...] = (2, 3)) -> Apply:
    parameters = as_parameters({"coefficients": (1.0,) * len(inputs)})
    ids = tuple(node.id for node in inputs)
    return Apply("linear_combination", parameters, ids, (), shape, dtype)


def test_a_legal_graph_is_accepted() -> None:
    verify_graph(graph_of(A, B, GRAM, SLERP, WRITE))
    verify_graph(graph_of(A, replace(WRITE, source=A.id)))  # decoded and rounded
    verify_graph(Graph())


def test_r1_inputs_of_another_shape() -> None:
    narrow = read("/c", shape=(3, 2))
    refused("R1", r"input of shape \(3, 2\)", A, narrow, *with_source(linear(A, narrow)))
    refused("R1", "input of shape", A, *with_source(linear(A, shape=(6, 1))))
    gram = replace(GRAM, shape=(6,))
    refused("R1", "input of shape", A, B, gram, *with_source(replace(SLERP, statistics=(gram.id,))))


def test_r2_unknown_operations() -> None:
    refused(
        "R2",
        "nonsense is not a registered",
        A,
        *with_source(replace(linear(A), operation="nonsense")),
    )
    # a reduction's name is not an apply operation's
    refused("R2", "gram is not a registered", A, *with_source(replace(linear(A), operation="gram")))


def test_r2_working_dtypes() -> None:
    refused("R2", "computes in BF16", A, *with_source(linear(A, dtype="BF16")))
    integers = read("/c", "I32")
    refused("R2", "computes with integers", integers, *with_source(linear(integers)))
    wide = read("/c", "F64")
    refused("R2", "would narrow a float64", wide, *with_source(linear(wide, dtype="F32")))
    inner = linear(A)
    refused("R2", "would narrow a float64", A, inner, *with_source(linear(inner, dtype="F32")))


def test_r3_statistics_and_blocks_are_not_to_be_swapped() -> None:
    swapped = replace(SLERP, inputs=(A.id, GRAM.id))
    refused("R3", "an input yields no blocks", A, B, GRAM, *with_source(swapped))
    swapped = replace(SLERP, statistics=(A.id,))
    refused("R3", "a statistic is no Reduce", A, B, *with_source(swapped))


def test_r3_an_output_of_a_statistic() -> None:
    with pytest.raises((IllegalGraphError, TypeError), match=r"does not yield blocks|R3"):
        verify_graph(graph_of(A, B, GRAM, replace(WRITE, source=GRAM.id)))


def test_r4_outputs() -> None:
    refused("R4", "shape differs from its source", A, *with_source(linear(A), shape=(3, 2)))
    both = (A, B, replace(WRITE, source=A.id), replace(WRITE, source=B.id))
    refused("R4", "two outputs have one name", *both)


def test_r5_bytes_and_dtypes() -> None:
    integers, floats = read("/c", "I32"), read("/d", "F32")
    refused("R5", "I32 cannot become F32", *with_source(integers, dtype="F32"))
    refused("R5", "F32 cannot become I32", *with_source(floats, dtype="I32"))
    same = Apply("identical", (), (integers.id,), (), (2, 3), "I32")
    verify_graph(graph_of(integers, *with_source(same, dtype="I32")))
    mixed = replace(same, inputs=(integers.id, floats.id))
    refused("R5", "raw inputs of mixed dtypes", integers, floats, *with_source(mixed, dtype="I32"))
    raw_floats = Apply("identical", (), (floats.id,), (), (2, 3), "F32")
    refused("R5", "F32 cannot become BF16", floats, *with_source(raw_floats, dtype="BF16"))


def test_r6_byte_ranges() -> None:
    for stop in (79, 80, 103, 105):
        cut = Read("/a", replace(A.tensor, stop_exclusive=stop))
        refused("R6", "byte range and shape differ", *with_source(cut, dtype="F32"))


def test_r7_idle_nodes() -> None:
    refused("R7", "lead to no output", A, B, replace(WRITE, source=A.id))
    refused("R7", "lead to no output", A, B, GRAM, SLERP)


# ------------------------------------------------------------------------------- export


def everything() -> Graph:
    integers = read("/c", "I32")
    same = Apply(
        "identical",
        as_parameters({"tensor": "i", "models": ("a", "b")}),
        (integers.id,),
        (),
        (2, 3),
        "I32",
    )
    thresholds = Reduce(
        "magnitude_thresholds", as_parameters({"keep": (3, None)}), (A.id, B.id), (), (2, 3), "F32"
    )
    norms = Reduce("surviving_norms", (), (A.id, B.id), (thresholds.id,), (2, 3), "F32")
    scaled = replace(
        SLERP,
        operation="linear_combination",
        statistics=(norms.id,),
        parameters=as_parameters({"coefficients": (0.1, -0.0, 1e-300, 3.0), "flag": True}),
        inputs=(SLERP.id, A.id),
    )
    return graph_of(
        A,
        B,
        GRAM,
        SLERP,
        WRITE,
        integers,
        same,
        Write("i", "I32", (2, 3), same.id),
        thresholds,
        norms,
        scaled,
        Write("ünïcode/名", "F16", (2, 3), scaled.id),
    )


def test_json_brings_back_every_node() -> None:
    graph = everything()
    again = graph_from_json(json.loads(json.dumps(graph_to_json(graph))))
    assert list(again) == list(graph)
    assert [node.id for node in again] == [node.id for node in graph]
    assert again.writes == graph.writes
    assert set(again.digraph.edges) == set(graph.digraph.edges)


def test_the_text_is_canonical() -> None:
    text = json.dumps(graph_to_json(everything()))
    assert json.dumps(graph_to_json(graph_from_json(json.loads(text)))) == text


def test_ids_are_recomputed() -> None:
    """A file that was tampered with gives another graph, not a graph under a false id."""
    graph = everything()
    exported = json.loads(json.dumps(graph_to_json(graph)))
    exported[3]["parameters"]["t"] = 0.75
    again = graph_from_json(exported)
    changed = {node.id for node in graph} - {node.id for node in again}
    assert SLERP.id in changed
    assert WRITE.id in changed
    assert A.id not in changed


@pytest.mark.parametrize("damage", ["kind", "shape", "inputs"])
def test_damage_is_noticed(damage: str) -> None:
    exported = graph_to_json(everything())
    del exported[2][damage]
    with pytest.raises((KeyError, TypeError, IndexError)):
        graph_from_json(exported)


def test_references_to_what_comes_later_are_noticed() -> None:
    exported = graph_to_json(everything())
    exported[2]["inputs"] = [0, 7]
    with pytest.raises(IndexError):
        graph_from_json(exported)


@pytest.mark.parametrize("place", [1.5, "1", None, 99])
def test_references_that_are_no_places_are_noticed(place: Any) -> None:
    exported = graph_to_json(everything())
    exported[4]["source"] = place
    with pytest.raises((KeyError, TypeError, IndexError)):
        graph_from_json(exported)
