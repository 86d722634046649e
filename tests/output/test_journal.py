"""The journal: what is written is read; what is torn or altered ends it, and nothing raises."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lazymerge.errors import DoesNotFitError, LazymergeError
from lazymerge.output import journal as journal_module
from lazymerge.output.journal import JOURNAL_PATH, Journal, read_journal

NAMES = ["a", "b", "model.layers.0.ß\n", "d"]


def write(folder: Path, names: list[str] = NAMES, length: int = 0) -> Path:
    (folder / ".lazymerge").mkdir(exist_ok=True)
    journal = Journal(folder, "f" * 32, length, fsync=True)
    for number, name in enumerate(names):
        journal.finished(
            name, "model.safetensors", (number, number + 1), "c" * 32, is_nonfinite=name == "b"
        )
    journal.close()
    return folder / JOURNAL_PATH


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path)
    found = read_journal(tmp_path)
    assert found.fingerprint == "f" * 32
    assert list(found.finished) == NAMES
    assert found.length == path.stat().st_size
    record = found.finished["b"]
    assert (record.file, record.start, record.stop_exclusive) == ("model.safetensors", 1, 2)
    assert (record.checksum, record.is_nonfinite) == ("c" * 32, True)
    assert not found.finished["a"].is_nonfinite
    assert record.session.pid == os.getpid()
    assert record.session.boot == journal_module.boot_id()


def test_an_absent_journal_is_empty(tmp_path: Path) -> None:
    assert read_journal(tmp_path).finished == {}


def test_another_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ["a", "b"])
    monkeypatch.setattr(journal_module, "boot_id", lambda: "another boot")
    write(tmp_path, ["c"], read_journal(tmp_path).length)
    found = read_journal(tmp_path)
    assert list(found.finished) == ["a", "b", "c"]
    assert [session.boot for session in found.sessions][1] == "another boot"
    assert found.finished["a"].session == found.sessions[0]
    assert found.finished["c"].session == found.sessions[1]


def test_a_torn_end_is_cut_off_by_the_run_that_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    found = read_journal(tmp_path)
    assert list(found.finished) == NAMES[:-1]
    write(tmp_path, ["e"], found.length)
    assert list(read_journal(tmp_path).finished) == [*NAMES[:-1], "e"]


def test_any_prefix_gives_the_records_that_are_whole(tmp_path: Path) -> None:
    path = write(tmp_path)
    whole = path.read_bytes()
    ends = [0, *(at + 1 for at, byte in enumerate(whole) if byte == ord("\n"))]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        lines = sum(end <= length for end in ends[1:])
        found = read_journal(tmp_path)
        assert list(found.finished) == NAMES[: max(0, lines - 2)]
        assert found.length == ends[lines]


def test_any_altered_bit_ends_it_there(tmp_path: Path) -> None:
    path = write(tmp_path)
    whole = path.read_bytes()
    starts = [0, *(at + 1 for at, byte in enumerate(whole) if byte == ord("\n"))]
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        line = sum(start <= at for start in starts) - 1
        assert list(read_journal(tmp_path).finished) == NAMES[: max(0, line - 2)]


@given(st.binary(max_size=300), st.integers(0, 900))
def test_whatever_stands_there(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    path = write(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + noise + whole[at:])
    found = read_journal(folder)
    assert list(found.finished) == NAMES[: len(found.finished)]
    assert found.length <= at or noise == b""


def line(text: str) -> bytes:
    raw = text.encode()
    return f"{journal_module._checksum(raw)} ".encode() + raw + b"\n"


@pytest.mark.parametrize(
    "text",
    [
        '{"tensor": 3, "file": "f", "bytes": [0, 1], "checksum": "c", "at": 1}',
        '{"tensor": "t", "file": "f", "bytes": [0], "checksum": "c", "at": 1}',
        '{"tensor": "t", "file": "f", "bytes": 7, "checksum": "c", "at": 1}',
        '{"tensor": "t", "file": "f", "bytes": [0, true], "checksum": "c", "at": 1}',
        '{"tensor": "t", "file": "f", "bytes": [0, 1e400], "checksum": "c", "at": 1}',
        '{"tensor": "t", "file": "f", "bytes": [0, 1], "checksum": "", "at": NaN}',
        '{"boot": null, "pid": 1, "host": "h", "at": 1}',
        "[" * 5000,
        "[]",
        "7",
        "{}",
        "",
    ],
)
def test_lines_with_right_checksums_and_wrong_contents(tmp_path: Path, text: str) -> None:
    """Whoever can write checksums can write anything; it must still end in no traceback."""
    path = write(tmp_path)
    length = path.stat().st_size
    path.write_bytes(path.read_bytes() + line(text) + line('{"boot": "", "pid": 1}'))
    found = read_journal(tmp_path)
    assert (list(found.finished), found.length) == (NAMES, length)


def test_tensors_before_any_session(tmp_path: Path) -> None:
    path = write(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], *lines[2:]]))
    assert read_journal(tmp_path).finished == {}


def test_a_journal_of_another_format(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_bytes(line('{"format": 2, "fingerprint": "f"}') + path.read_bytes())
    assert read_journal(tmp_path).fingerprint == ""


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / ".lazymerge").mkdir()
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / JOURNAL_PATH).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Exception, match=r"cannot write .*journal"):
        Journal(tmp_path, "f", 0, fsync=False)
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    (tmp_path / ".lazymerge").mkdir()
    journal = Journal(tmp_path, "f", 0, fsync=False)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DoesNotFitError, match=r"no room for .*journal"):
        journal.finished("a", "m", (0, 1), "c", is_nonfinite=False)
    monkeypatch.undo()
    journal.close()


def half_a_line(real: Callable[[int, Any], int]) -> Callable[[int, Any], int]:
    """A disk that is full in the middle of a line."""
    left = [20]

    def write(descriptor: int, data: Any) -> int:
        if not left[0]:
            raise OSError(28, "No space left on device")
        done = real(descriptor, data[: left[0]])
        left[0] -= done
        return done

    return write


def test_half_a_line_does_not_swallow_what_others_write_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".lazymerge").mkdir()
    journal = Journal(tmp_path, "f", 0, fsync=False)
    monkeypatch.setattr(os, "write", half_a_line(os.write))
    with pytest.raises(DoesNotFitError):
        journal.finished("a", "m", (0, 1), "c", is_nonfinite=False)
    monkeypatch.undo()
    journal.finished("b", "m", (1, 2), "c", is_nonfinite=False)
    journal.close()
    found = read_journal(tmp_path)
    assert list(found.finished) == ["b"]
    assert found.length == (tmp_path / JOURNAL_PATH).stat().st_size


def test_half_a_line_that_stays_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    (tmp_path / ".lazymerge").mkdir()
    journal = Journal(tmp_path, "f", 0, fsync=False)
    journal.finished("a", "m", (0, 1), "c", is_nonfinite=False)
    monkeypatch.setattr(os, "write", half_a_line(os.write))
    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(DoesNotFitError):
        journal.finished("b", "m", (1, 2), "c", is_nonfinite=False)
    monkeypatch.undo()
    with pytest.raises(LazymergeError, match="a line of it is torn"):
        journal.finished("c", "m", (2, 3), "c", is_nonfinite=False)
    journal.close()
    assert list(read_journal(tmp_path).finished) == ["a"]


@pytest.mark.parametrize("identity", [(1, (1 << 64) - 1, 0), (-1, 2, -(1 << 62)), (0, 0, 1 << 70)])
def test_identities_of_any_size(tmp_path: Path, identity: tuple[int, int, int]) -> None:
    """Some filesystems number their files with 64 bits, or make them before 1970."""
    (tmp_path / ".lazymerge").mkdir()
    journal = Journal(tmp_path, "f", 0, fsync=False)
    journal.finished("a", "m", (0, 1), "c", is_nonfinite=False, identity=identity)
    journal.close()
    assert read_journal(tmp_path).finished["a"].identity == identity


def test_a_range_that_ends_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / ".lazymerge").mkdir()
    journal = Journal(tmp_path, "f", 0, fsync=False)
    journal.finished("a", "m", (5, 4), "c", is_nonfinite=False)
    journal.close()
    assert read_journal(tmp_path).finished == {}
