"""Splitting, running and joining on the command line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from command_line import TASK_ARITHMETIC, Command, write_recipe

pytest_plugins = ["command_fixtures"]


@pytest.fixture(autouse=True)
def _recipe(place: Path) -> None:
    write_recipe(place, TASK_ARITHMETIC)


def test_from_beginning_to_end(lazymerge: Command, place: Path) -> None:
    size = ["--max-shard-size", "5000"]
    answer = lazymerge("plan", "recipe.yml", "-o", "my out", "--split", "2", *size)
    assert answer.code == 0, answer.err
    assert "goes in" in answer.out
    run, join = re.findall(r"lazymerge ((?:run|join) .*)", answer.err)
    refused = lazymerge(*shlex.split(join))
    assert refused.code == 2
    assert refused.err.count("has not been run") == 2
    for number in ("1", "2"):
        command = shlex.split(run.replace("part-1-", f"part-{number}-"))
        assert lazymerge(*command).code == 0
    assert lazymerge("verify", "my out/part-1-of-2").code == 0
    joined = lazymerge(*shlex.split(join))
    assert joined.code == 0
    assert "joined 2 parts: 31 tensors" in joined.err
    assert lazymerge("run", "recipe.yml", "-o", "whole", "-q", *size).code == 0
    one, parts = (
        {p.name: p.read_bytes() for p in (place / f).glob("*.safetensors")}
        for f in ("whole", "my out")
    )
    assert one == parts
    assert len(one) > 2
    assert lazymerge("verify", "my out", "--recompute", "2").code == 0
    again = lazymerge(*shlex.split(join), "--json")
    assert again.document["parts"] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "-o OUT"),
        (["-o", "out", "--save", "p.json"], "neither --save"),
        (["-o", "base"], "is to hold the parts of a merge, and holds"),
    ],
)
def test_where_parts_cannot_be_written(
    lazymerge: Command, place: Path, arguments: list[str], said: str
) -> None:
    command = ["plan", "recipe.yml", "--split", "1", "--no-measure", *arguments]
    answer = lazymerge(*command)
    assert answer.code == 2
    assert said in answer.err
    assert not (place / "out").exists()


def test_a_dry_run_says_what_the_parts_are(lazymerge: Command, place: Path) -> None:
    command = ["plan", "recipe.yml", "-o", "out", "--dry-run", "--max-shard-size", "5000"]
    answer = lazymerge(*command, "--split", "2")
    assert answer.code == 0
    lines = [line for line in answer.err.splitlines() if line.startswith("part ")]
    assert [line.split(":")[0] for line in lines] == ["part 1 of 2", "part 2 of 2"]
    shards = [shard for line in lines for shard in re.findall(r"model-\d+-of-\d+", line)]
    assert len(shards) == len(set(shards)) == int(shards[0][-5:])
    assert lazymerge(*command, "--split", "999").code == 2
    assert not (place / "out").exists()
