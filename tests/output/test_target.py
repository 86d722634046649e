"""Files that a person names: what is there already is replaced only if lazymerge wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
from lazymerge.errors import InputError
from lazymerge.output.target import check_target, write_target

BEGINS = (b"<page>", b"lazymerge")


@pytest.mark.parametrize("there", [None, "", "<page> of lazymerge, older"])
def test_what_may_be_written(tmp_path: Path, there: str | None) -> None:
    path = tmp_path / "page.html"
    if there is not None:
        path.write_text(there)
    write_target(path, "<page> lazymerge \udcff", *BEGINS)
    assert path.read_bytes().startswith(b"<page> lazymerge")
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("there", ["mine", "<page> of somebody", "{}", "<page"])
def test_what_is_somebodys_stays(tmp_path: Path, there: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text(there)
    (tmp_path / "model.safetensors.partial").write_text("mine, too")
    with pytest.raises(InputError, match="is not replaced: choose another name"):
        write_target(path, "<page> lazymerge", *BEGINS)
    assert path.read_text() == there
    assert len([*tmp_path.iterdir()]) == 2


def test_links_and_folders(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("<page> lazymerge")
    (tmp_path / "link").symlink_to("own")
    write_target(tmp_path / "link", "<page> lazymerge, new", *BEGINS)
    # a link is replaced, not followed
    assert (tmp_path / "own").read_text() == "<page> lazymerge"
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, said in (
        ("dangling", "is no file"),
        (".", "is no file"),
        ("no/where", "cannot write"),
    ):
        with pytest.raises(InputError, match=said):
            write_target(tmp_path / name, "<page> lazymerge", *BEGINS)


def test_standard_output_is_not_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--html: - is not standard output"):
        check_target(Path("-"), *BEGINS, option="--html")
    assert [*tmp_path.iterdir()] == []
