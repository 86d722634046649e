"""What may be in an output folder: never an input, never somebody else's files."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
from lazymerge.errors import DoesNotFitError, InputError
from lazymerge.output.folder import (
    FILESYSTEM_SLACK_BYTES,
    PLAN_PATH,
    check_disk,
    check_output_folder,
    clear_output_folder,
    free_disk_bytes,
    is_own,
)

OUTPUT = (
    "README.md",
    "config.json",
    "lazymerge.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors.partial",
    "model.safetensors.index.json",
    "tokenizer.json",
    "config.json.partial",
    "1_Pooling/config.json",
    ".lazymerge/plan.json",
)


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


def test_a_new_and_an_empty_folder_are_fine_and_stay_as_they_are(tmp_path: Path) -> None:
    check_output_folder(tmp_path / "new" / "deeper", [], overwrite=False)
    check_output_folder(tmp_path, [], overwrite=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fsync", [False, True])
def test_an_output_whose_removal_was_interrupted_can_still_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: bool
) -> None:
    """After any number of its files."""
    for count in range(len(OUTPUT) + 1):
        out = fill(tmp_path / str(count), *OUTPUT)
        left = count

        def unlink(self: Path, missing_ok: bool = False) -> None:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            with suppress(FileNotFoundError):
                os.unlink(self)

        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(Path, "unlink", unlink)
            clear_output_folder(out, fsync=fsync)
        check_output_folder(out, [], overwrite=True)
        clear_output_folder(out, fsync=fsync)
        assert list(out.iterdir()) == []


def test_a_folder_with_a_plan_alone_is_empty(tmp_path: Path) -> None:
    fill(tmp_path, PLAN_PATH)
    check_output_folder(tmp_path, [], overwrite=False)


def test_a_folder_that_is_not_empty_needs_overwrite(tmp_path: Path) -> None:
    fill(tmp_path, *OUTPUT)
    with pytest.raises(InputError, match=r"is not empty \(it holds .*and \d more\).*--overwrite"):
        check_output_folder(tmp_path, [], overwrite=False)
    check_output_folder(tmp_path, [], overwrite=True)


@pytest.mark.parametrize(
    "foreign",
    [
        "notes.txt",
        "modeling.py",
        "pytorch_model.bin",
        "checkpoint-5/config.json",
        "1_Pooling/notes.txt",
        ".lazymerge/mine",
        ".lazymerge/deeper/plan.json",
        "config.json/inside",  # a folder under a file's name
        "model-a.safetensors",
    ],
)
def test_files_of_others_are_refused_and_never_removed(tmp_path: Path, foreign: str) -> None:
    fill(tmp_path, "lazymerge.json", "model.safetensors", foreign)
    with pytest.raises(InputError, match="holds files that no merge has written") as caught:
        check_output_folder(tmp_path, [], overwrite=True)
    assert foreign.split("/")[0] in str(caught.value)
    clear_output_folder(tmp_path)
    assert files_in(tmp_path) == [foreign]


def test_a_model_that_lazymerge_has_not_written_is_not_replaced(tmp_path: Path) -> None:
    fill(tmp_path, "model.safetensors", "config.json", "tokenizer.json", "README.md")
    with pytest.raises(InputError, match=r"no lazymerge\.json, so it is not an earlier output"):
        check_output_folder(tmp_path, [], overwrite=True)


def test_clear_removes_all_of_an_earlier_output(tmp_path: Path) -> None:
    fill(tmp_path / "out", *OUTPUT)
    clear_output_folder(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_clear_removes_links_and_not_what_they_lead_to(tmp_path: Path) -> None:
    elsewhere = fill(tmp_path / "elsewhere", "model.safetensors", "inside/plan.json")
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").symlink_to(elsewhere / "model.safetensors")
    (out / "config.json").symlink_to(elsewhere / "inside")
    clear_output_folder(out)
    assert list(out.iterdir()) == []
    assert files_in(elsewhere) == ["inside/plan.json", "model.safetensors"]


def test_clear_makes_the_folder(tmp_path: Path) -> None:
    clear_output_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("name", ["model.safetensors", "merges.txt", "model.safetensors.partial"])
def test_own_names(tmp_path: Path, name: str) -> None:
    assert is_own(fill(tmp_path, name) / name)


class TestInputs:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        return fill(tmp_path / "model", "lazymerge.json", "model.safetensors")

    def refused(self, output: Path, model: Path) -> None:
        for overwrite in (False, True):
            with pytest.raises(InputError, match="is the folder of an input model"):
                check_output_folder(output, ["/somewhere/else", str(model)], overwrite=overwrite)

    def test_the_folder_itself(self, model: Path) -> None:
        self.refused(model, model)

    def test_by_a_detour(self, model: Path) -> None:
        (model.parent / "other").mkdir()
        self.refused(model.parent / "other" / ".." / "model", model)

    def test_by_a_link(self, model: Path) -> None:
        link = model.parent / "link"
        link.symlink_to(model)
        self.refused(link, model)
        self.refused(model, link)

    def test_by_a_link_above(self, model: Path) -> None:
        link = model.parent.parent / f"{model.parent.name}-link"
        link.symlink_to(model.parent)
        self.refused(link / "model", model)
        link.unlink()

    def test_by_a_relative_path(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(model)
        self.refused(Path(), model)
        self.refused(Path("../model"), model)


class TestUnusable:
    def test_a_file(self, tmp_path: Path) -> None:
        fill(tmp_path, "out")
        with pytest.raises(InputError, match="exists and is not a folder"):
            check_output_folder(tmp_path / "out", [], overwrite=True)

    def test_below_a_file(self, tmp_path: Path) -> None:
        fill(tmp_path, "file")
        with pytest.raises(InputError, match=r"cannot be made: .*file is not a folder"):
            check_output_folder(tmp_path / "file" / "out", [], overwrite=False)

    def test_a_link_to_nowhere(self, tmp_path: Path) -> None:
        (tmp_path / "out").symlink_to(tmp_path / "nowhere")
        with pytest.raises(InputError, match=r"is a link to .*nowhere, which is absent"):
            check_output_folder(tmp_path / "out", [], overwrite=False)

    def test_a_link_to_itself(self, tmp_path: Path) -> None:
        (tmp_path / "out").symlink_to(tmp_path / "out")
        with pytest.raises(InputError, match="which is absent"):
            check_output_folder(tmp_path / "out", [], overwrite=False)

    def test_dot_lazymerge_that_is_a_file(self, tmp_path: Path) -> None:
        fill(tmp_path, ".lazymerge")
        with pytest.raises(InputError, match=r"\.lazymerge is no folder, and lazymerge did not"):
            check_output_folder(tmp_path, [], overwrite=False)

    @pytest.mark.parametrize(
        ("output", "message"),
        [("out", "folder .*out is not writable"), ("out/new", r"cannot be made: .*out is not")],
    )
    def test_not_writable(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, message: str
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out").chmod(0o500)
        # root may write anywhere, so ask what another user would be told
        monkeypatch.setattr(
            os, "access", lambda path, mode: bool(Path(path).stat().st_mode & 0o200)
        )
        with pytest.raises(InputError, match=message):
            check_output_folder(tmp_path / output, [], overwrite=False)


class TestDisk:
    @pytest.fixture
    def free(self, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        """A disk with 1 GB free, and the paths it was asked about."""
        asked: list[Path] = []

        def disk_usage(path: Path) -> object:
            asked.append(path)
            return type("Usage", (), {"free": 10**9})()

        monkeypatch.setattr("shutil.disk_usage", disk_usage)
        return asked

    def test_to_the_byte(self, tmp_path: Path, free: list[Path]) -> None:
        room = 10**9 - FILESYSTEM_SLACK_BYTES
        check_disk(tmp_path, room, overwrite=False)
        with pytest.raises(DoesNotFitError, match=r"needs 983 MB on disk, .* has 1\.00 GB free"):
            check_disk(tmp_path, room + 1, overwrite=False)

    def test_what_is_replaced_makes_room(self, tmp_path: Path, free: list[Path]) -> None:
        needed = 10**9 - FILESYSTEM_SLACK_BYTES + 100_000
        (tmp_path / "model.safetensors").write_bytes(b"x" * 200_000)
        check_disk(tmp_path, needed, overwrite=True)
        with pytest.raises(DoesNotFitError):
            check_disk(tmp_path, needed, overwrite=False)
        (tmp_path / "model.safetensors").rename(tmp_path / "mine")
        with pytest.raises(DoesNotFitError):
            check_disk(tmp_path, needed, overwrite=True)

    def test_of_the_folder_that_will_hold_it(self, tmp_path: Path, free: list[Path]) -> None:
        assert free_disk_bytes(tmp_path / "a" / "b" / "c") == 10**9
        assert free == [tmp_path]
