"""Files are told apart though they have the same name, or even the same number."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from lazymerge.output import identity as identity_module
from lazymerge.output.identity import FileIdentity, file_identity


def identity_of(path: Path) -> FileIdentity:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return file_identity(descriptor)
    finally:
        os.close(descriptor)


def test_stays_when_a_file_is_written_renamed_and_touched(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    before = identity_of(path)
    with path.open("r+b") as stream:
        stream.write(b"two and more")
    path.rename(tmp_path / "b")
    os.utime(tmp_path / "b", (1, 1))
    assert identity_of(tmp_path / "b") == before


def test_a_file_in_its_place_is_another(tmp_path: Path) -> None:
    """Also where the system gives the number of the one that is gone to the next."""
    path = tmp_path / "a"
    seen = set()
    for _ in range(20):
        path.write_bytes(b"same")
        seen.add(identity_of(path))
        path.unlink()
    device, inode, made = seen.pop()
    assert (device, inode) != (0, 0)
    if made:
        assert len(seen) == 19


def test_without_the_time_of_making(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"")
    for statx in (None, lambda *_: -1, lambda *_: 0):
        monkeypatch.setattr(identity_module, "_statx", lambda function=statx: function)
        status = path.stat()
        assert identity_of(path) == (status.st_dev, status.st_ino, 0)
