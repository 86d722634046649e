"""What a person sees of a long merge: interrupting it, its status, going on, verifying it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TASK_ARITHMETIC, Command, write_recipe
from lazymerge.output import lock as lock_module
from lazymerge.output.journal import JOURNAL_PATH
from lazymerge.output.lock import OutputLock
from lazymerge.output.manifest import MERGE_PATH
from lazymerge.output.writer import ShardWriter

from conftest import write_checkpoint

pytest_plugins = ["command_fixtures"]


@pytest.fixture
def interrupted(lazymerge: Command, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output with five finished tensors, in a folder whose name a shell would split."""
    write_recipe(place, TASK_ARITHMETIC)
    real = ShardWriter.finish_tensor
    done: list[str] = []

    def finish(self: Any, tensor: str) -> None:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(tensor)
        real(self, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish_tensor", finish)
        answer = lazymerge("run", "recipe.yml", "-o", "my out", "--workers", "1")
    assert answer.code == 130
    assert answer.err.splitlines()[-2:] == [
        "lazymerge: interrupted",
        "lazymerge: 6 finished tensors are kept; go on with: lazymerge resume 'my out'",
    ]
    return place / "my out"


def test_status_resume_and_verify(
    lazymerge: Command, interrupted: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = lazymerge("status", interrupted)
    assert (status.code, status.err) == (0, "")
    assert status.out.startswith("state   unfinished")
    assert "6 of 31 tensors" in status.out
    assert f"lazymerge resume '{interrupted}'" in status.out
    document = lazymerge("status", interrupted, "--json").document
    assert (document["state"], document["tensors"], document["owner"]) == ("unfinished", 6, None)
    assert document["seconds_left"] is None

    resumed = lazymerge("resume", interrupted)
    assert resumed.code == 0
    assert "6 of 31 tensors are there already" in resumed.err
    assert "25 tensors (6 were there)" in resumed.err

    status = lazymerge("status", interrupted)
    assert status.out.startswith("state   complete")
    assert "100 %" in status.out
    again = lazymerge("resume", interrupted)
    assert (again.code, "is complete" in again.err) == (0, True)
    assert lazymerge("resume", interrupted, "--json").document["state"] == "complete"

    verified = lazymerge("verify", interrupted, "--recompute", 2, "--seed", 1)
    assert (verified.code, verified.err) == (0, "")
    assert verified.out.startswith("whole: 31 tensors")
    assert "2 merged again (--seed 1), the same bytes" in verified.out
    assert lazymerge("verify", interrupted, "--json").document["problems"] == []


def test_run_goes_on_too(lazymerge: Command, interrupted: Path) -> None:
    answer = lazymerge("run", "recipe.yml", "-o", interrupted, "--json", "-q")
    assert answer.document["resumed_tensors"] == 6
    assert not (interrupted / ".lazymerge").exists()


def test_what_is_damaged_is_said(lazymerge: Command, interrupted: Path) -> None:
    assert lazymerge("resume", interrupted).code == 0
    path = interrupted / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    answer = lazymerge("verify", interrupted)
    assert answer.code == 1
    assert answer.out == ""
    first, second = answer.err.splitlines()
    assert first.startswith("wrong ")
    assert first.endswith("has other bytes than were written")
    assert "is not what was merged: 1 problem;" in second


def test_status_of_a_run_that_is_alive(lazymerge: Command, interrupted: Path) -> None:
    lock = OutputLock(interrupted)
    status = lazymerge("status", interrupted)
    assert f"running, process {os.getpid()} on " in status.out
    assert "resume" not in status.out
    document = lazymerge("status", interrupted, "--json").document
    assert document["state"] == "running"
    assert document["bytes_per_second"] > 0
    assert document["seconds_left"] > 0
    refused = lazymerge("resume", interrupted)
    assert refused.code == 2
    assert f"is being written by process {os.getpid()}" in refused.err
    assert "kept" not in refused.err
    lock.release()


def test_a_lock_that_was_left_is_told(
    lazymerge: Command, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = {"pid": 4711, "host": "there", "boot": lock_module.boot_id(), "started": 5}
    (interrupted / ".lazymerge" / "lock").write_text(json.dumps(owner))
    answer = lazymerge("resume", interrupted)
    assert answer.code == 0
    assert "process 4711 on there was writing" in answer.err


@pytest.mark.parametrize("command", ["status", "resume", "verify"])
def test_folders_that_are_no_outputs(lazymerge: Command, place: Path, command: str) -> None:
    for folder in ("absent", "base"):
        answer = lazymerge(command, folder)
        assert answer.code == 2
        assert folder in answer.message()


@pytest.mark.parametrize("command", ["status", "resume"])
@pytest.mark.parametrize("text", ["", "[", '{"format": 1}', '{"format": 1, "recipe": []}'])
def test_documents_that_are_damaged(
    lazymerge: Command, interrupted: Path, command: str, text: str
) -> None:
    (interrupted / MERGE_PATH).write_text(text)
    answer = lazymerge(command, interrupted)
    assert answer.code == 2
    assert "merge.json" in answer.err
    assert "Traceback" not in answer.err


def test_a_journal_that_says_nothing(lazymerge: Command, interrupted: Path) -> None:
    (interrupted / JOURNAL_PATH).write_bytes(os.urandom(500))
    status = lazymerge("status", interrupted)
    assert "0 of 31 tensors" in status.out
    assert lazymerge("resume", interrupted).code == 0


def test_times_that_no_calendar_knows(lazymerge: Command, interrupted: Path) -> None:
    """Whoever can write a journal can write any time into it."""
    from lazymerge.output import journal

    path = interrupted / JOURNAL_PATH
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines[1:], 1):
        record = json.loads(line.partition(b" ")[2])
        record["at"] = 1e17
        text = json.dumps(record).encode()
        lines[number] = journal._checksum(text).encode() + b" " + text
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert lazymerge("status", interrupted).code == 0


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "one"],
        ["plan", "recipe.yml", "--dry-run", "--layers"],
        ["plan", "recipe.yml", "--dry-run", "--tensor", "."],
        ["plan", "recipe.yml", "--dry-run", "--diff", "other.yml"],
    ],
)
def test_names_do_not_steer_the_terminal(
    lazymerge: Command, place: Path, command: list[str]
) -> None:
    name = "a\x1b[31m\x07\u202e.weight"
    for model in ("base", "one", "two"):
        for file in (place / model).glob("model*"):
            file.unlink()
        write_checkpoint(place / model, {name: torch.ones(4, 4)})
    write_recipe(place, TASK_ARITHMETIC)
    write_recipe(place, {**TASK_ARITHMETIC, "dtype": "float16"}, "other.yml")
    answer = lazymerge(*command)
    assert answer.code == 0
    assert "[31m" in answer.out
    assert all(char.isprintable() or char == "\n" for char in answer.out + answer.err)
    answer = lazymerge("run", "recipe.yml", "-o", "out\x1b[31m")
    assert answer.code == 0
    assert all(char.isprintable() or char == "\n" for char in answer.out + answer.err)
