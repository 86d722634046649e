"""What a run shows while it proceeds: the display, and the log for machines."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from command_line import TASK_ARITHMETIC, Command, write_recipe
from lazymerge.cli.log_json import JsonLog
from lazymerge.cli.progress import MOST_SLOWEST, PHASES, Progress
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import plan_recipe_file
from lazymerge.output.manifest import MANIFEST_NAME
from lazymerge.output.writer import ShardWriter
from lazymerge.sizes import format_memory
from rich.console import Console

pytest_plugins = ["command_fixtures"]


@pytest.fixture
def plan(place: Path) -> Plan:
    write_recipe(place, TASK_ARITHMETIC)
    return plan_recipe_file("recipe.yml")


def shown(progress: Progress, width: int) -> list[str]:
    """The display's lines."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(progress)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 140])
def test_the_display(plan: Plan, width: int) -> None:
    progress = Progress(plan, None)
    assert "preparing" in shown(progress, width)[2]
    progress.entered("merging")
    names = [tensor.name for tensor in plan.tensors]
    for name in names[:6]:
        progress.began(name)
        progress.moved(progress.total_bytes // 12, 0, name)
        progress.finished(name)
    lines = shown(progress, width)
    assert max(map(len, lines)) <= width
    assert lines[0].rstrip().endswith(" 50 %")
    assert f"6 of {len(names)} tensors" in lines[1]
    assert lines[2].split()[:2] == ["now", "merging"]
    assert lines[3].startswith("memory")
    assert f" of {format_memory(plan.memory.limit_bytes)}" in lines[3]
    slowest = [line for line in lines[4:] if any(line.rstrip().endswith(name) for name in names)]
    assert len(slowest) == MOST_SLOWEST
    progress.entered("finishing")
    assert PHASES["finishing"] in shown(progress, width)[2]


def test_memory_of_this_process_is_not_shown_where_others_merge(plan: Plan) -> None:
    progress = Progress(plan, None, is_elsewhere=True)
    progress.entered("merging")
    assert not [line for line in shown(progress, 80) if line.startswith("memory")]
    assert "memory" not in progress.plain()
    assert "memory" in Progress(plan, None).plain()


def test_more_is_read_than_was_expected(plan: Plan) -> None:
    """Where data takes more passes. What is left to be written is still ahead."""
    progress = Progress(plan, None)
    expected = progress.total_bytes
    size = sum(tensor.size_bytes for shard in plan.shards for tensor in shard.tensors)
    progress.moved(expected, 0, "w")
    assert progress.total_bytes == expected + size
    assert 0.4 < progress.fraction < 1
    progress.moved(1000, size // 2, "w")
    assert progress.total_bytes == expected + 1000 + size
    progress.moved(0, size - size // 2, "w")
    assert (progress.done_bytes, progress.fraction) == (progress.total_bytes, 1)


def test_names_do_not_steer_the_terminal(plan: Plan) -> None:
    progress = Progress(plan, None)
    progress.entered("merging")
    name = "w\x1b[2J\x1b]0;title\x07"
    progress.began(name)
    progress.moved(1, 1, name)
    progress.finished(name)
    text = "\n".join(shown(progress, 100))
    assert "\x1b" not in text
    assert "\x07" not in text


def events(text: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in text.splitlines()]
    times = [line["time"] for line in lines]
    assert times == sorted(times)
    return lines


def test_the_log_of_a_run(
    lazymerge: Command, plan: Plan, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JsonLog, "seconds", 0.001)
    answer = lazymerge("run", "recipe.yml", "-o", "out", "--log-json", "log", "--workers", "1")
    assert answer.code == 0
    logged = events((place / "log").read_text())
    kinds = [event["event"] for event in logged]
    assert kinds[0] == "plan"
    assert kinds[-1] == "done"
    assert logged[0]["fingerprint"] == plan.fingerprint
    assert [e["phase"] for e in logged if e["event"] == "phase"] == ["merging", "finishing"]
    tensors = [event["tensor"] for event in logged if event["event"] == "tensor"]
    assert sorted(tensors) == sorted(tensor.name for tensor in plan.tensors)
    for event in logged:
        if event["event"] == "progress":
            assert 0 <= event["bytes_done"] <= event["bytes_total"]
            assert event["limit_bytes"] == logged[0]["limit_bytes"]
    document = json.loads((place / "out" / MANIFEST_NAME).read_text())
    assert logged[-1]["bytes_written"] == document["run"]["bytes_written"]
    lazymerge("run", "recipe.yml", "-o", "out", "--log-json", "log")
    again = events((place / "log").read_text())
    assert again[: len(logged)] == logged  # it is appended to
    kinds = [event["event"] for event in again[len(logged) :]]
    assert [kind for kind in kinds if kind != "progress"] == ["plan", "notice", "done"]


def test_the_log_of_an_interrupted_run(
    lazymerge: Command, plan: Plan, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ShardWriter.finish_tensor
    done: list[str] = []

    def finish(self: Any, tensor: str) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(tensor)
        real(self, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish_tensor", finish)
        answer = lazymerge("run", "recipe.yml", "-o", "out", "--log-json", "log", "--workers", "1")
    assert answer.code == 130
    last = events((place / "log").read_text())[-1]
    assert (last["event"], last["exit_code"], last["message"]) == ("error", 130, "interrupted")
    assert lazymerge("resume", "out", "--log-json", "more").code == 0
    resumed = [e for e in events((place / "more").read_text()) if e["event"] == "resumed"]
    assert [event["tensors"] for event in resumed] == [4]


def test_the_log_of_a_mistake(lazymerge: Command, plan: Plan, place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "mine").write_text("")
    answer = lazymerge("run", "recipe.yml", "-o", "out", "--log-json", "log")
    last = events((place / "log").read_text())[-1]
    assert (last["event"], last["exit_code"]) == ("error", answer.code)
    assert last["message"] in answer.err


def test_the_log_on_stderr(lazymerge: Command, plan: Plan) -> None:
    answer = lazymerge("run", "recipe.yml", "-o", "out", "--log-json", "-")
    assert [event["event"] for event in events(answer.err)][-1] == "done"


def test_a_log_that_cannot_be_opened(lazymerge: Command, plan: Plan, place: Path) -> None:
    answer = lazymerge("run", "recipe.yml", "-o", "out", "--log-json", "nowhere/log")
    assert answer.code == 2
    assert "--log-json: cannot write nowhere/log" in answer.message()
    assert not (place / "out").exists()


def test_a_full_disk_under_the_log_does_not_end_the_merge(
    lazymerge: Command, plan: Plan, place: Path
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full to write to")
    assert lazymerge("run", "recipe.yml", "-o", "out", "--log-json", "/dev/full").code == 0
