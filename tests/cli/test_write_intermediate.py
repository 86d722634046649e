"""--write-intermediate: where merges go that others of a recipe use, and how a run goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lazymerge as lm
import pytest
import yaml
from command_line import TASK_ARITHMETIC, Command, files_under
from lazymerge.cli.intermediates import as_options, folders_asked
from lazymerge.errors import InputError
from lazymerge.output.writer import ShardWriter
from lazymerge.recipe import Recipe

pytest_plugins = ["command_fixtures"]


def drop(base: str, *others: str, **more: Any) -> dict[str, Any]:
    models = [{"model": name, "parameters": {"weight": 0.6, "density": 0.5}} for name in others]
    return {"merge_method": "dare_ties", "base_model": base, "models": models, **more}


def write(place: Path, *documents: dict[str, Any], name: str = "recipe.yml") -> None:
    (place / name).write_text(yaml.safe_dump_all(documents, sort_keys=False))


@pytest.fixture
def nested(place: Path) -> Path:
    """The current folder, with a recipe of inner, of outer which is made of it, and of the last."""
    write(
        place,
        {"name": "inner", **drop("base", "one", "two", seed=4)},
        {"name": "outer", **drop("base", "inner", "two")},
        drop("base", "outer", "one"),
    )
    return place


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# where they go


def recipe_with(*names: str) -> Recipe:
    merges = tuple(Recipe("linear", (), name=name) for name in names)
    return Recipe("linear", (), merges=merges)


@pytest.mark.parametrize(
    ("asked", "output", "folders"),
    [
        (["x"], "out", {"x": "out-x"}),
        (["x"], "deep/out/", {"x": "deep/out-x"}),
        (["x"], None, {"x": "OUT-x"}),
        (["x=there"], "out", {"x": "there"}),
        (["x=there", "y z"], "out", {"x": "there", "y z": "out-y z"}),
        (["x=a=b"], "out", {"x": "a=b"}),
        (["a=b"], "out", {"a=b": "out-a=b"}),
        (["a=b=there"], "out", {"a=b": "there"}),
        (["a=there"], "out", {"a": "there"}),
        ([".."], "out", {"..": "out-.."}),
        (["a/b=there"], "out", {"a/b": "there"}),
        ([], "out", {}),
        (None, "out", {}),
    ],
)
def test_folders(asked: list[str] | None, output: str | None, folders: dict[str, str]) -> None:
    recipe = recipe_with("x", "y z", "a", "a=b", "..", "a/b")
    found = folders_asked(asked, recipe, None if output is None else Path(output))
    assert found == {name: Path(folder) for name, folder in folders.items()}


def test_folders_beside_the_current_one_and_in_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "deep")
    monkeypatch.setenv("HOME", "/home/somebody")
    recipe = recipe_with("x")
    assert folders_asked(["x"], recipe, Path()) == {"x": tmp_path / "out" / "deep-x"}
    assert folders_asked(["x"], recipe, Path("..")) == {"x": tmp_path / "out-x"}
    assert folders_asked(["x=~/x"], recipe, Path("out")) == {"x": Path("/home/somebody/x")}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["z"], "the merges that the last one uses are 'x', '../y'; 'z' is none of them"),
        (["z=there"], "'z' is none of them"),
        ([""], "'' is none of them"),
        (["x", "x=there"], "--write-intermediate x is given twice"),
        (["x="], "names no folder"),
        (["../y"], r"the merge '../y' needs a folder: --write-intermediate \.\./y=FOLDER"),
    ],
)
def test_folders_that_cannot_be_found(asked: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        folders_asked(asked, recipe_with("x", "../y"), Path("out"))


def test_options_can_be_pasted() -> None:
    words = as_options({"my x": Path("out"), "y": Path("it's")})
    assert words == """ --write-intermediate 'my x=out' --write-intermediate 'y=it'"'"'s'"""


def test_names_that_are_none(lazymerge: Command, nested: Path) -> None:
    before = files_under(nested)
    for command in (["plan", "--dry-run"], ["run"]):
        answer = lazymerge(*command, "recipe.yml", "-o", "out", "--write-intermediate", "iner")
        assert answer.code == 2
        message = answer.message()
        assert message.startswith("recipe.yml: the merges that the last one uses are 'inner', ")
        assert message.endswith("'iner' is none of them")
    write(nested, TASK_ARITHMETIC, name="one.yml")
    answer = lazymerge("run", "one.yml", "-o", "out", "--write-intermediate", "inner")
    assert answer.code == 2
    assert "one.yml has no merge that is named 'inner'" in answer.message()
    (nested / "one.yml").unlink()
    assert files_under(nested) == before


@pytest.mark.parametrize("folder", ["out", "out/inner", "base", "."])
def test_folders_that_cannot_be_used(lazymerge: Command, nested: Path, folder: str) -> None:
    before = files_under(nested)
    asked = f"inner={folder}"
    answer = lazymerge("run", "recipe.yml", "-o", "out", "--write-intermediate", asked)
    assert answer.code == 2
    assert "choose" in answer.message()
    assert files_under(nested) == before


# plan and run


def test_plan_shows_what_is_written_before(lazymerge: Command, nested: Path) -> None:
    arguments = ["plan", "recipe.yml", "--dry-run", "-o", "out"]
    asked = ["--write-intermediate", "inner", "--write-intermediate", "outer=o"]
    plain = lazymerge(*arguments, "--json").document
    document = lazymerge(*arguments, *asked, "--json").document
    assert "intermediates" not in plain
    inner, outer = document["intermediates"]
    assert (inner["name"], inner["folder"]) == ("inner", "out-inner")
    assert (outer["name"], outer["folder"]) == ("outer", "o")
    assert document["fingerprint"] == plain["fingerprint"]
    sizes = [each["totals"]["bytes_written"] for each in (inner, outer, document)]
    assert document["disk"]["needed_bytes"] == sum(sizes)
    assert plain["disk"]["needed_bytes"] == sizes[-1]
    text = " ".join(lazymerge(*arguments, *asked).out.split())
    assert "before it inner in out-inner: 31 tensors, " in text
    assert "before it outer in o: 31 tensors, " in text
    assert not (nested / "out").exists()


def test_a_saved_plan(lazymerge: Command, nested: Path) -> None:
    planned = lazymerge("plan", "recipe.yml", "-o", "out", "--write-intermediate", "inner")
    assert planned.code == 0
    command = planned.err.strip().partition("run it with: lazymerge ")[2]
    assert command == "run out/.lazymerge/plan.json -o out --write-intermediate inner=out-inner"
    answer = lazymerge(*command.split(), "-q")
    assert (answer.code, answer.out, answer.err) == (0, "", "")
    again = lazymerge("run", "recipe.yml", "-o", "new", "--write-intermediate", "inner", "-q")
    assert again.code == 0
    for name in ("", "-inner"):
        assert weights(nested / f"out{name}") == weights(nested / f"new{name}")


def test_run_writes_all_and_says_so(lazymerge: Command, nested: Path) -> None:
    assert lazymerge("run", "recipe.yml", "-o", "plain", "-q").code == 0
    asked = ["--write-intermediate", "outer", "--write-intermediate", "inner"]
    answer = lazymerge("run", "recipe.yml", "-o", "out", *asked)
    assert (answer.code, answer.out) == (0, "")
    lines = answer.err.splitlines()
    assert lines[0::3] == [
        "writing the merge inner into out-inner",
        "writing the merge outer into out-outer",
        "writing what they lead to into out",
    ]
    assert lines[2::3] == [str(nested / name) for name in ("out-inner", "out-outer", "out")]
    assert all(line.startswith("done in ") for line in lines[1::3])
    assert weights(nested / "out") == weights(nested / "plain")
    for name in ("out-inner", "out-outer"):
        verified = lazymerge("verify", name, "--recompute", 40)
        assert (verified.code, verified.err) == (0, "")
        assert "31 merged again" in verified.out
        part = name.removeprefix("out-")
        assert f"recipe  recipe.yml: {part}" in lazymerge("status", name).out
        assert lazymerge("status", name, "--json").document["part"] == part
        assert lazymerge("resume", name).code == 0
    assert lazymerge("status", "out", "--json").document["part"] is None


def test_run_in_json(lazymerge: Command, nested: Path) -> None:
    arguments = ["run", "recipe.yml", "-o", "out", "--json"]
    answer = lazymerge(*arguments, "--write-intermediate", "inner=there")
    assert (answer.code, answer.err) == (0, "")
    (inner,) = answer.document["intermediates"]
    assert (inner["name"], inner["output"]) == ("inner", str(nested / "there"))
    assert inner["bytes_written"] > 0
    assert answer.document["output"] == str(nested / "out")
    assert "intermediates" not in lazymerge(*arguments).document


def test_seeds_of_the_command(lazymerge: Command, nested: Path) -> None:
    for seed in (4, 9):
        answer = lazymerge(
            *("run", "recipe.yml", "-o", f"out{seed}", "--seed", seed),
            *("--write-intermediate", "outer", "-q"),
        )
        assert answer.code == 0
        verified = lazymerge("verify", f"out{seed}-outer", "--recompute", 40)
        assert (verified.code, verified.err) == (0, "")
    assert weights(nested / "out4-outer") != weights(nested / "out9-outer")


def test_from_python(nested: Path) -> None:
    plan = lm.plan("recipe.yml")
    report = lm.run(plan, "out", intermediates={"outer": "o", "inner": "i"}, fsync=False)
    assert report.output == str(nested / "out")
    lm.run(lm.plan_intermediate(plan, "outer"), "alone", fsync=False)
    assert weights(nested / "o") == weights(nested / "alone")
    again = lm.run(plan, "out", intermediates={"inner": "i"}, overwrite=True, fsync=False)
    assert again.resumed_tensors == 0
    with pytest.raises(lm.InputError, match="'x' is none of them"):
        lm.run(plan, "out", intermediates={"x": "i"})


# interruptions


def interrupt(patch: pytest.MonkeyPatch, folder: str, after: int) -> None:
    """Ctrl-C when so many tensors of an output are finished."""
    real = ShardWriter.finish_tensor
    done: list[str] = []

    def finish(self: Any, tensor: str) -> None:
        if self._folder == Path(folder):
            if len(done) == after:
                raise KeyboardInterrupt
            done.append(tensor)
        real(self, tensor)

    patch.setattr(ShardWriter, "finish_tensor", finish)


ASKED = ["-o", "out", "--write-intermediate", "inner", "--workers", "1"]


def test_the_same_command_goes_on(
    lazymerge: Command, nested: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, "out-inner", 5)
        answer = lazymerge("run", "recipe.yml", *ASKED)
    assert answer.code == 130
    assert answer.err.splitlines()[-2:] == [
        "lazymerge: interrupted",
        "lazymerge: 6 finished tensors are kept; go on with: the same command",
    ]
    assert not (nested / "out").exists()
    assert "6 of 31 tensors" in lazymerge("status", "out-inner").out

    with monkeypatch.context() as patch:
        interrupt(patch, "out", 0)
        answer = lazymerge("run", "recipe.yml", *ASKED)
    assert answer.code == 130
    assert "6 of 31 tensors are there already" in answer.err
    assert answer.err.splitlines()[-1].endswith("go on with: lazymerge resume out")

    answer = lazymerge("run", "recipe.yml", *ASKED)
    assert answer.code == 0
    assert "out-inner holds this merge, complete" in answer.err
    assert "1 of 31 tensors is there already" in answer.err
    assert lazymerge("run", "recipe.yml", "-o", "new", ASKED[2], "inner", "-q").code == 0
    for name in ("", "-inner"):
        assert weights(nested / f"out{name}") == weights(nested / f"new{name}")


def test_between_two_outputs(
    lazymerge: Command, nested: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def refuse(self: Any, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        real = ShardWriter.create
        patch.setattr(
            ShardWriter,
            "create",
            lambda self: refuse(self) if self._folder == Path("out") else real(self),
        )
        answer = lazymerge("run", "recipe.yml", *ASKED)
    assert answer.code == 130
    assert answer.err.splitlines()[-1] == (
        f"lazymerge: {nested / 'out-inner'} is complete; go on with: the same command"
    )
    assert lazymerge("run", "recipe.yml", *ASKED).code == 0


def test_resuming_one_alone(
    lazymerge: Command, nested: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, "out-inner", 5)
        assert lazymerge("run", "recipe.yml", *ASKED).code == 130
    resumed = lazymerge("resume", "out-inner")
    assert resumed.code == 0
    assert "25 tensors (6 were there)" in resumed.err
    assert not (nested / "out").exists()
    answer = lazymerge("run", "recipe.yml", *ASKED)
    assert "out-inner holds this merge, complete" in answer.err
    assert lazymerge("verify", "out-inner", "--recompute", 40).code == 0


def test_overwriting(lazymerge: Command, nested: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(nested, TASK_ARITHMETIC, name="old.yml")
    for name in ("out", "out-inner"):
        assert lazymerge("run", "old.yml", "-o", name, "-q").code == 0
    before = files_under(nested)
    answer = lazymerge("run", "recipe.yml", *ASKED)
    assert answer.code == 2
    assert "not empty" in answer.err
    assert files_under(nested) == before

    (nested / "out" / "notes.txt").write_text("mine")
    answer = lazymerge("run", "recipe.yml", *ASKED, "--overwrite")
    assert answer.code == 2
    assert "notes.txt" in answer.err
    (nested / "out" / "notes.txt").unlink()
    assert files_under(nested) == before

    with monkeypatch.context() as patch:
        interrupt(patch, "out-inner", 5)
        answer = lazymerge("run", "recipe.yml", *ASKED, "--overwrite")
    assert answer.code == 130
    assert answer.err.splitlines()[-1].endswith("the same command, without --overwrite")
    answer = lazymerge("run", "recipe.yml", *ASKED)
    assert answer.code == 0
    assert "6 of 31 tensors are there already" in answer.err
    again = lazymerge("run", "recipe.yml", *ASKED, "--overwrite", "--json").document
    assert again["resumed_tensors"] == again["intermediates"][0]["resumed_tensors"] == 0


def test_a_merge_that_is_there_already_gets_its_part(lazymerge: Command, nested: Path) -> None:
    """Asked for afterwards: OUT need not be made again."""
    assert lazymerge("run", "recipe.yml", "-o", "out", "-q").code == 0
    answer = lazymerge("run", "recipe.yml", *ASKED)
    assert answer.code == 0
    assert "out holds this merge, complete" in answer.err
    assert lazymerge("verify", "out-inner", "--recompute", 40).code == 0


def test_a_card_that_somebody_has_removed(lazymerge: Command, nested: Path) -> None:
    assert lazymerge("run", "recipe.yml", *ASKED, "-q").code == 0
    card = nested / "out-inner" / "README.md"
    text = card.read_text()
    assert "The merge that it names `inner`." in text
    card.unlink()
    answer = lazymerge("resume", "out-inner")
    assert answer.code == 0
    assert "README.md written anew" in answer.err
    assert card.read_text() == text


def test_a_process_that_is_terminated(nested: Path) -> None:
    """And one that was not, in a folder of another name."""

    def command(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "lazymerge", *arguments]

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("out", "new"):
        words = ["run", "recipe.yml", "-o", name, "--write-intermediate", "inner"]
        if name == "out":
            process = subprocess.Popen(
                command(*words), env=environment, stderr=subprocess.PIPE, text=True
            )
            assert process.stderr is not None
            assert "writing the merge inner" in process.stderr.readline()
            process.terminate()
            process.stderr.read()
            process.stderr.close()
            assert process.wait() in (0, 130)
        done = subprocess.run(
            command(*words), env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    for name in ("", "-inner"):
        assert weights(nested / f"out{name}") == weights(nested / f"new{name}")
        checks = [
            json.loads((nested / f"{out}{name}" / "lazymerge.json").read_text())["tensors"]
            for out in ("out", "new")
        ]
        assert checks[0] == checks[1]
