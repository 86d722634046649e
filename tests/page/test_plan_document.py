"""What the page of a plan is told, against the plan; and that nothing in it can become HTML."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from lazymerge.graph.node import Read
from lazymerge.page.columns import sums, unpack_names
from lazymerge.page.html import VENDORED, assemble, json_for_html
from lazymerge.page.measured import measured_timeline
from lazymerge.page.plan_document import plan_documents
from lazymerge.page.plan_page import plan_page

from conftest import write_checkpoint
from page_plans import small_plan, tensors

VENDOR = Path(__file__).parents[2] / "lazymerge" / "page" / "vendor"


def test_every_tensors_way(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    document, packed = plan_documents(plan)
    packed = json.loads(json.dumps(packed))
    names = unpack_names(packed["names"])
    forms = sums(packed["form"])
    columns = {name: sums(packed[name]) for name in ("read_file", "read_start", "read_name")}
    placed = {
        tensor.name: (number, tensor)
        for number, shard in enumerate(plan.shards)
        for tensor in shard.tensors
    }
    slot = 0
    for number, task in enumerate(plan.tasks):
        assert names[number] == task.write.name
        form = packed["forms"][forms[number]]
        kinds = [operation["kind"] for operation in form]
        assert kinds == ["Read", "Read", "Read", "Reduce", "Apply", "Write"]
        reads = {read.folder: read for read in plan.graph.reads_of(task.write.id)}
        for operation in form[:3]:
            _, folder, file = packed["files"][columns["read_file"][slot]]
            read = reads[folder]
            assert (file, columns["read_start"][slot]) == (read.tensor.file, read.tensor.start)
            assert operation["bytes"] == read.size_bytes
            assert names[columns["read_name"][slot] + number] == read.tensor.name
            slot += 1
        shard, place = placed[task.write.name]
        assert sums(packed["shard"])[number] == shard
        assert sums(packed["start"])[number] == place.start
        method, _, by_model = packed["settings"][sums(packed["setting"])[number]]
        assert method == "ties"
        expected = plan.tensors[number].by_model
        assert [own for _, own in by_model] == [dict(values) for values in expected.values()]
    assert slot == len(columns["read_file"])
    assert sum(isinstance(node, Read) for node in plan.graph) == slot
    assert document["tensors"] == len(plan.tensors)
    assert document["timeline"]["projected"] == plan.memory.projected_bytes
    assert sum(model["read"] for model in document["models"]) == plan.bytes_read
    assert sum(shard["bytes"] for shard in document["shards"]) == plan.bytes_written


HOSTILE = "</script><script>alert(1)</script><!--\u202e\x1b[31m&amp;"


def hostile_plan(folder: Path) -> Any:
    """A plan whose tensors are called so that they would be HTML, if they were taken for it."""
    for name in ("base", "one", "two"):
        write_checkpoint(folder / name, {**tensors(), HOSTILE: torch.ones(3)})
    recipe = {
        "merge_method": "linear",
        "base_model": "base",
        "models": [{"model": m, "parameters": {"weight": 1}} for m in ("one", "two")],
    }
    from lazymerge.engine.planning import make_plan
    from lazymerge.engine.resources import Resources

    from merging import recipe_of

    return make_plan(recipe_of(folder, recipe), Resources(4 << 30, workers=1))


def test_hostile_names_are_data(tmp_path: Path) -> None:
    plan = hostile_plan(tmp_path)
    page = plan_page(plan, facts=[(HOSTILE, HOSTILE)])
    assert "alert(1)</script>" not in page
    assert "\x1b" not in page
    ours = len(VENDORED) + 1
    assert len(re.findall(r"<script[ >]", page)) == ours + 3
    assert page.count("</script>") == ours + 3
    found = re.search(r'<script type="application/json" id="document">(.*?)</script>', page)
    assert found is not None
    assert [HOSTILE, HOSTILE] in json.loads(found[1])["facts"]


def test_the_title_and_json_are_escaped() -> None:
    page = assemble(HOSTILE, {"a": HOSTILE}, {}, libraries=(), scripts=())
    assert "&lt;/script&gt;" in page
    assert json.loads(json_for_html({"a": HOSTILE})) == {"a": HOSTILE}
    assert not set(json_for_html({"a": HOSTILE})) & set("<>&")
    with pytest.raises(ValueError, match="JSON compliant"):
        json_for_html(float("nan"))


def test_nothing_may_be_fetched_and_only_known_scripts_run(tmp_path: Path) -> None:
    page = plan_page(small_plan(tmp_path))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy[1]
    assert not re.search(r"""(src|href|action)\s*=\s*["']?(https?:)?//""", page)
    assert "sourceMappingURL" not in page
    assert "@import" not in page


def test_vendored_files_are_what_their_list_says() -> None:
    text = (VENDOR / "README.md").read_text()
    listed = dict(re.findall(r"\| `([^`]+)` \|.*\| `([0-9a-f]{64})` \|", text))
    present = {path.name for path in VENDOR.iterdir() if path.suffix in (".js", ".css")}
    assert listed.keys() == present
    for name, digest in listed.items():
        assert sha256((VENDOR / name).read_bytes()).hexdigest() == digest
    assert {licence for _, licence in VENDORED.values()} == {
        path.name for path in VENDOR.iterdir() if path.name.endswith("LICENSE.txt")
    }


ROWS = [[0.5, 10, 0, 100], [1.0, 20, 5, 120]]
COLUMNS = ["seconds", "bytes_read", "bytes_written", "resident_bytes"]


def test_measured_timeline() -> None:
    manifest = {"timeline": {"columns": COLUMNS, "rows": ROWS}}
    assert measured_timeline(manifest) == {
        "seconds": [0.5, 1.0],
        "bytes_read": [10, 20],
        "bytes_written": [0, 5],
        "resident_bytes": [100, 120],
    }


@pytest.mark.parametrize(
    "timeline",
    [
        None,
        [],
        {"columns": COLUMNS, "rows": []},
        {"columns": COLUMNS[1:], "rows": [row[1:] for row in ROWS]},
        {"columns": COLUMNS, "rows": [[0, 1, 2, "3"]]},
        {"columns": COLUMNS, "rows": [[0, 1, 2, float("inf")]]},
        {"columns": COLUMNS, "rows": [[0, 1, 2, -1]]},
        {"columns": [[]], "rows": [[{}]]},
        {"columns": COLUMNS, "rows": "rows"},
    ],
)
def test_what_is_no_timeline_is_not_drawn(timeline: object) -> None:
    assert measured_timeline({"timeline": timeline}) is None
