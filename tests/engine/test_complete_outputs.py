"""Running a plan whose weights are there already: nothing is merged, and nothing that is asked for
is passed over."""

from __future__ import annotations

import json
import os
from pathlib import Path

import lazymerge
import pytest
import torch
import yaml
from lazymerge.engine.plan import Plan
from lazymerge.engine.report import Silent
from lazymerge.engine.run import run_plan
from lazymerge.engine.verification import verify_output
from lazymerge.errors import InputError, LazymergeError
from lazymerge.output.manifest import MANIFEST_NAME, read_document

from conftest import write_checkpoint


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def noted(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for number, model in enumerate(("a", "b")):
        tensors = {f"layers.{n}.w": torch.full((20, 30), number + n + 0.5) for n in range(4)}
        write_checkpoint(tmp_path / model, tensors, {"model_type": "llama", "rope_theta": 1.0})
        (tmp_path / model / "tokenizer.json").write_text('{"old": 1}')
        (tmp_path / model / "1_Pooling").mkdir()
        (tmp_path / model / "1_Pooling" / "config.json").write_text("{}")
    path = tmp_path / "recipe.yml"
    models = [
        {"model": str(tmp_path / name), "parameters": {"weight": weight}}
        for name, weight in (("a", 0.25), ("b", 0.75))
    ]
    path.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    return path


def planned(recipe: Path) -> Plan:
    return lazymerge.plan(recipe, workers=1, max_shard_size=6_000)


@pytest.fixture
def out(recipe: Path, tmp_path: Path) -> Path:
    run_plan(planned(recipe), tmp_path / "out")
    return tmp_path / "out"


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def again(recipe: Path, out: Path, **options: bool) -> list[str]:
    """Runs the recipe once more; returns what is noted. Nothing is merged."""
    notes = Notes()
    report = run_plan(planned(recipe), out, observer=notes, **options)
    assert report.bytes_written == 0
    return notes.notes


def test_nothing_has_changed(recipe: Path, out: Path) -> None:
    before = contents(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert len(again(recipe, out)) == 1
    assert contents(out) == before
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "config.json",
        "tokenizer.json",
        "1_Pooling/config.json",
        "model.safetensors.index.json",
    ],
)
def test_a_small_file_that_was_removed_is_written_again(recipe: Path, out: Path, name: str) -> None:
    before = contents(out)
    (out / name).unlink()
    notes = again(recipe, out)
    assert notes[0] == f"{name} written anew: missing, or changed where it comes from"
    assert contents(out) == before
    assert len(again(recipe, out)) == 1


def test_what_has_changed_in_the_base_model(recipe: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "a" / "tokenizer.json").write_text('{"new": 2}')
    config = json.loads((tmp_path / "a" / "config.json").read_text()) | {"rope_theta": 5.0}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    notes = again(recipe, out)
    assert notes[0].startswith("config.json, tokenizer.json written anew")
    assert (out / "tokenizer.json").read_text() == '{"new": 2}'
    assert json.loads((out / "config.json").read_text())["rope_theta"] == 5.0
    assert (verify_output(out).problems, verify_output(out).edited) == ((), ())
    assert len(again(recipe, out)) == 1


def test_a_file_that_the_base_model_has_no_more(recipe: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "a" / "tokenizer.json").unlink()
    (out / "tokenizer.json").unlink()
    assert verify_output(out).problems
    (out / "README.md").unlink()
    again(recipe, out)
    assert verify_output(out).problems == ()


def test_a_comment_in_the_recipe(recipe: Path, out: Path) -> None:
    recipe.write_text("# half and half\n" + recipe.read_text())
    assert again(recipe, out)[0].startswith("README.md written anew")
    assert "# half and half" in (out / "README.md").read_text()
    assert "# half and half" in read_document(out / MANIFEST_NAME)["recipe"]["text"]


def test_what_somebody_has_edited_stays(recipe: Path, out: Path, tmp_path: Path) -> None:
    (out / "README.md").write_text("mine")
    (out / "tokenizer.json").write_text("mine too")
    assert len(again(recipe, out)) == 1  # nothing else would be written now
    (tmp_path / "a" / "tokenizer.json").write_text('{"new": 2}')
    notes = again(recipe, out)
    assert notes[0] == (
        "tokenizer.json would be written otherwise now, and stays: somebody has edited it"
    )
    assert (out / "README.md").read_text() == "mine"
    assert (out / "tokenizer.json").read_text() == "mine too"


def test_contents_of_inputs_are_compared_when_asked(
    recipe: Path, out: Path, tmp_path: Path
) -> None:
    notes = again(recipe, out, hash_inputs=True)
    assert "what the inputs' contents were is not known" in notes[0]
    other = tmp_path / "other"
    run_plan(planned(recipe), other, hash_inputs=True)
    assert len(again(recipe, other, hash_inputs=True)) == 1
    path = tmp_path / "b" / "model.safetensors"
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(again(recipe, other)) == 1
    with pytest.raises(InputError, match="its content is not what it was"):
        again(recipe, other, hash_inputs=True)


def test_inf_and_nan_when_asked(recipe: Path, tmp_path: Path) -> None:
    tensors = {f"layers.{n}.w": torch.full((20, 30), float("nan")) for n in range(4)}
    write_checkpoint(tmp_path / "b", tensors, {"model_type": "llama"})
    run_plan(planned(recipe), tmp_path / "nan")
    assert len(again(recipe, tmp_path / "nan")) == 1
    with pytest.raises(LazymergeError, match=r"tensor layers\.0\.w of the merge holds inf or nan"):
        again(recipe, tmp_path / "nan", strict=True)


@pytest.mark.parametrize("damage", [{"files": []}, {"nonfinite": 7}])
def test_a_damaged_manifest(recipe: Path, out: Path, damage: dict[str, object]) -> None:
    path = out / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(LazymergeError):
        again(recipe, out, strict=True)


def test_what_a_killed_run_has_left_goes(recipe: Path, out: Path) -> None:
    (out / ".lazymerge").mkdir()
    for name in ("merge.json", "merge.json.partial", "journal", "replaced"):
        (out / ".lazymerge" / name).write_text("")
    again(recipe, out)
    assert not (out / ".lazymerge").exists()


@pytest.mark.parametrize("calls", range(1, 12))
def test_interrupted_while_small_files_are_written(
    recipe: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """None of them is taken for somebody's afterwards, whatever changes next."""
    real, left = Path.rename, [calls]

    def rename(path: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(path, target)

    for token in ("new", "newer"):
        (tmp_path / "a" / "tokenizer.json").write_text(f'{{"{token}": 2}}')
        config = json.loads((tmp_path / "a" / "config.json").read_text()) | {"note": token}
        (tmp_path / "a" / "config.json").write_text(json.dumps(config))
        if token == "new":
            monkeypatch.setattr(Path, "rename", rename)
            try:
                again(recipe, out)
            except KeyboardInterrupt:
                pass
            else:
                assert left[0] > 0  # there are not so many
            monkeypatch.undo()
    notes = again(recipe, out)
    assert not any("edited" in note for note in notes)
    assert (out / "tokenizer.json").read_text() == '{"newer": 2}'
    assert json.loads((out / "config.json").read_text())["note"] == "newer"
    assert (verify_output(out).problems, verify_output(out).edited) == ((), ())
    assert not [*out.rglob("*.partial")]
    assert not (out / ".lazymerge").exists()


def test_what_is_right_already_is_recorded(recipe: Path, out: Path) -> None:
    """A run that was killed before it wrote the manifest, or somebody quicker."""
    recipe.write_text("# new\n" + recipe.read_text())
    before = (out / MANIFEST_NAME).read_bytes()
    again(recipe, out)
    (out / MANIFEST_NAME).write_bytes(before)
    assert verify_output(out).edited == ("README.md",)
    assert len(again(recipe, out)) == 1
    assert verify_output(out).edited == ()


def test_a_tokenizer_file_that_is_gone_goes(recipe: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "a" / "tokenizer.json").unlink()
    assert again(recipe, out)[0].startswith("tokenizer.json removed: not there any more")
    assert not (out / "tokenizer.json").exists()
    assert verify_output(out).problems == ()


def test_an_output_that_was_moved_stays_as_it_is(recipe: Path, out: Path, tmp_path: Path) -> None:
    before = contents(out)
    out.rename(tmp_path / "moved")
    assert len(again(recipe, tmp_path / "moved")) == 1
    assert contents(tmp_path / "moved") == before


def test_from_another_recipe_of_the_same_merge(
    recipe: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest opens the models by the names that stand in its recipe."""
    monkeypatch.chdir(tmp_path)
    recipe.write_text(recipe.read_text().replace(f"{tmp_path}/", "./"))
    again(recipe, out)
    monkeypatch.chdir("/")
    assert verify_output(out, recompute=4).problems == ()


def test_a_folder_in_a_small_files_place(recipe: Path, out: Path) -> None:
    (out / "README.md").unlink()
    (out / "README.md").mkdir()
    with pytest.raises(InputError, match=r"README\.md is a folder, and no merge has made it"):
        again(recipe, out)


def test_names_that_no_file_can_have(out: Path) -> None:
    path = out / MANIFEST_NAME
    document = json.loads(path.read_text())
    document["files"]["9" * 5000] = "0"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="is damaged") as caught:
        verify_output(out)
    assert len(str(caught.value)) < 1000
