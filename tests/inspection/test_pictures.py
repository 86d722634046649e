"""Pictures of plans for Graphviz and Mermaid: what is in them, and that names cannot break them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lazymerge.engine.plan import Plan
from lazymerge.graph.drawing import Picture, PictureEdge, PictureNode, Role, to_dot, to_mermaid
from lazymerge.inspection.pictures import folded_picture, unfolded_picture
from plan_cases import TIES

from merging import plan_of

ROLES: tuple[Role, ...] = ("model", "read", "reduce", "apply", "write")

DOT_STRING = r'"(?:[^"\\\n]|\\.)*"'
DOT_VALUE = rf"(?:{DOT_STRING}|[a-z]+)"
DOT_NODE = re.compile(rf"  n\d+ \[label={DOT_STRING}, shape=\w+, fillcolor={DOT_STRING}\];")
DOT_EDGE = re.compile(rf"  n\d+ -> n\d+(?: \[\w+={DOT_VALUE}(?:, \w+={DOT_VALUE})*\])?;")

LABEL = r'"[^"<>\n]*(?:<br/>[^"<>\n]*)*"'
MERMAID_NODE = re.compile(rf"  n\d+[\[({{/]+{LABEL}[\])}}/]+:::\w+")
MERMAID_EDGE = re.compile(rf"  n\d+ -\.?->?(?:-?>)?(?:\|{LABEL}\|)? n\d+")


def check_dot(text: str) -> None:
    lines = text.splitlines()
    assert (lines[0], lines[-1]) == ("digraph lazymerge {", "}")
    for line in lines[4:-1]:
        assert DOT_NODE.fullmatch(line) or DOT_EDGE.fullmatch(line), line
    if shutil.which("dot"):
        done = subprocess.run(["dot", "-Tcanon"], input=text.encode(), capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")


def check_mermaid(text: str) -> None:
    lines = text.splitlines()
    assert lines[0].startswith("%% ")
    assert lines[1] == "flowchart LR"
    for line in lines[2:]:
        is_legal = MERMAID_NODE.fullmatch(line) or MERMAID_EDGE.fullmatch(line)
        assert is_legal or line.startswith("  classDef "), line


def picture_of(text: str) -> Picture:
    nodes = tuple(PictureNode(role, (text, "second")) for role in ROLES)
    edges = (PictureEdge(0, 1, text), PictureEdge(1, 2, "", True), PictureEdge(2, 3, text, True))
    return Picture(text, nodes, edges)


HOSTILE = [
    '"]; evil [label="',
    "\\",
    '\\"',
    "</script><script>alert(1)</script>",
    '"] --> x["',
    "%%{init: {}}%%",
    "a\nb\r\x1b[31m\u2028\u202e",
    "\ud800",
    "end",
    "#quot;",
    "x" * 100_000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names(text: str) -> None:
    dot, mermaid = to_dot(picture_of(text)), to_mermaid(picture_of(text))
    check_dot(dot)
    check_mermaid(mermaid)
    assert len(dot) + len(mermaid) < 20_000
    assert "<script" not in mermaid


@given(st.text(max_size=30))
def test_any_name(text: str) -> None:
    lines = to_dot(picture_of(text)).splitlines()
    assert len(lines) == 4 + len(ROLES) + 3 + 1
    assert all(DOT_NODE.fullmatch(line) for line in lines[4 : 4 + len(ROLES)])
    check_mermaid(to_mermaid(picture_of(text)))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    names = ["embed", *(f"model.layers.{n}.w" for n in range(40))]
    tensors = {name: torch.ones(4, 8) for name in names}
    models = [*(entry["model"] for entry in TIES["models"]), TIES["base_model"]]
    return plan_of(tmp_path, TIES, dict.fromkeys(models, tensors))


def test_layers_are_folded(plan: Plan) -> None:
    picture = folded_picture(plan)
    assert len(picture.nodes) < 10
    (write,) = [node for node in picture.nodes if node.role == "write"]
    assert "model.layers.0–39 (40)" in write.lines
    assert any("41 × " in line for line in write.lines)
    statistics = [edge for edge in picture.edges if edge.is_statistic]
    assert [picture.nodes[edge.source].role for edge in statistics] == ["reduce"]
    check_dot(to_dot(picture))
    check_mermaid(to_mermaid(picture))


def test_matching_tensors_are_drawn_operation_by_operation(plan: Plan) -> None:
    names = ["model.layers.3.w", "embed"]
    picture = unfolded_picture(plan, names)
    own = plan.graph.only([write.id for write in plan.graph.writes if write.name in names])
    assert len(picture.nodes) == len(own)
    lines = {line for node in picture.nodes if node.role == "write" for line in node.lines}
    assert lines >= set(names)
    check_dot(to_dot(picture))
    check_mermaid(to_mermaid(picture))
