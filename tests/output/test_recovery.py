"""What is there of an unfinished output: nothing is believed that the files do not bear out."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from lazymerge.errors import LazymergeError
from lazymerge.output import recovery as recovery_module
from lazymerge.output.checksum import tensor_checksum
from lazymerge.output.identity import file_identity
from lazymerge.output.journal import Finished, this_session
from lazymerge.output.layout import OutputTensor, lay_out
from lazymerge.output.recovery import Recovery, recover
from lazymerge.output.writer import ShardWriter

SHARDS = lay_out([OutputTensor(name, "F32", (100,)) for name in "abcd"], 800)
FIRST, SECOND = (shard.file for shard in SHARDS)
SPAN = 120


def span(_: str) -> int:
    return SPAN


def journalled(folder: Path, names: str) -> dict[str, Finished]:
    """Records of tensors that are written, as they lie in the files."""
    records = {}
    for shard in SHARDS:
        path = folder / shard.file
        path = path if path.exists() else folder / (shard.file + ".partial")
        descriptor = os.open(path, os.O_RDONLY)
        for tensor in shard.tensors:
            if tensor.name in names:
                checksum = tensor_checksum(descriptor, tensor.start, tensor.stop_exclusive, SPAN)
                assert checksum is not None
                records[tensor.name] = Finished(
                    tensor.name,
                    shard.file,
                    tensor.start,
                    tensor.stop_exclusive,
                    checksum,
                    file_identity(descriptor),
                    False,
                    1.0,
                    this_session(),
                )
        os.close(descriptor)
    return records


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a and b are written, their shard has its final name; c is written."""
    writer = ShardWriter(tmp_path, SHARDS)
    writer.create()
    for name in "abc":
        writer.write(name, memoryview(name.encode() * 400), 0)
    for name in "ab":
        writer.finish_tensor(name)
    writer.close()
    return tmp_path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def later(records: dict[str, Finished]) -> dict[str, Finished]:
    """The same records, after the machine was started again."""
    return {
        name: replace(record, session=replace(record.session, boot="before"))
        for name, record in records.items()
    }


def test_all_is_as_the_journal_says(folder: Path) -> None:
    records = journalled(folder, "abc")
    found = recover(folder, SHARDS, records, span)
    assert found == Recovery(records, frozenset([FIRST]), frozenset([SECOND]), 0, 0)


def test_a_shard_that_lacks_a_tensor_loses_its_final_name(folder: Path) -> None:
    found = recover(folder, SHARDS, journalled(folder, "a"), span)
    assert list(found.finished) == ["a"]
    assert (found.complete, found.begun) == (frozenset(), frozenset([FIRST, SECOND]))
    assert files(folder) == [FIRST + ".partial", SECOND + ".partial"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def other_header(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))


def as_link(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("damage", [truncate, other_header, as_link, Path.unlink])
@pytest.mark.parametrize("name", [FIRST, SECOND + ".partial"])
def test_a_shard_that_is_not_the_plans(
    folder: Path, damage: Callable[[Path], None], name: str
) -> None:
    records = journalled(folder, "abc")
    damage(folder / name)
    found = recover(folder, SHARDS, records, span)
    assert found.lost == (2 if name == FIRST else 1)
    assert name not in files(folder)
    if damage is as_link:
        assert (folder / "elsewhere").exists()


def test_a_partial_file_beside_the_final_one_goes(folder: Path) -> None:
    (folder / (FIRST + ".partial")).write_text("older")
    found = recover(folder, SHARDS, journalled(folder, "ab"), span)
    assert found.complete == {FIRST}
    assert FIRST + ".partial" not in files(folder)


def test_junk_under_the_final_name_does_not_cost_the_partial_file(folder: Path) -> None:
    records = journalled(folder, "abc")
    (folder / FIRST).rename(folder / (FIRST + ".partial"))
    (folder / FIRST).write_text("junk")
    found = recover(folder, SHARDS, records, span)
    assert sorted(found.finished) == ["a", "b", "c"]
    assert FIRST in found.begun


def test_a_file_that_is_not_the_one_that_was_written_is_read(folder: Path) -> None:
    """A copy of an output that was still being written, or a file from a backup."""
    records = journalled(folder, "abc")
    path = folder / FIRST
    data = bytearray(path.read_bytes())
    place = records["a"].start
    data[place : place + 4] = b"old!"
    path.rename(folder / "kept")  # so that its number is not given to the new one
    path.write_bytes(data)
    found = recover(folder, SHARDS, records, span)
    assert sorted(found.finished) == ["b", "c"]
    assert found.lost == 1


def test_records_that_name_another_place(folder: Path) -> None:
    records = journalled(folder, "abc")
    records["a"] = replace(records["a"], start=records["a"].start + 4)
    records["b"] = replace(records["b"], file=SECOND)
    assert list(recover(folder, SHARDS, records, span).finished) == ["c"]


def test_a_file_made_later_with_the_number_of_the_one_that_was_written(folder: Path) -> None:
    """As filesystems do: the inode of a file that was removed is the next one's."""
    records = journalled(folder, "abc")
    device, inode, made = records["c"].identity or (0, 0, 0)
    records["c"] = replace(records["c"], checksum="other", identity=(device, inode, made - 1))
    assert set(recover(folder, SHARDS, records, span).finished) == set("ab")


class TestDataThatThePowerFailureTook:
    def test_is_not_looked_for_in_the_same_boot(self, folder: Path) -> None:
        records = journalled(folder, "abc")
        records["c"] = replace(records["c"], checksum="other")
        assert set(recover(folder, SHARDS, records, span).finished) == set("abc")

    def test_is_missed_in_another_boot(self, folder: Path) -> None:
        records = later(journalled(folder, "abc"))
        data = bytearray((folder / (SECOND + ".partial")).read_bytes())
        data[records["c"].start + 399] ^= 1
        (folder / (SECOND + ".partial")).write_bytes(data)
        found = recover(folder, SHARDS, records, span)
        assert set(found.finished) == set("ab")
        assert (found.checked, found.lost) == (2, 1)

    def test_is_missed_when_asked(self, folder: Path) -> None:
        records = journalled(folder, "abc")
        records["a"] = replace(records["a"], checksum="other")
        found = recover(folder, SHARDS, records, span, recheck=True)
        assert set(found.finished) == set("bc")
        assert found.begun == {FIRST, SECOND}

    def test_is_missed_where_the_system_does_not_tell(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(recovery_module, "boot_id", lambda: "")
        records = journalled(folder, "abc")
        assert recover(folder, SHARDS, records, span).checked == 3


def test_what_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(recovery_module, "open_shard", fail)
    with pytest.raises(LazymergeError, match=f"{FIRST}: Input/output error"):
        recover(folder, SHARDS, {}, span)


def test_a_run_goes_on_where_the_other_ended(folder: Path) -> None:
    found = recover(folder, SHARDS, journalled(folder, "abc"), span)
    writer = ShardWriter(
        folder,
        SHARDS,
        begun=found.begun,
        complete=found.complete,
        finished=found.finished,
    )
    writer.create()
    writer.write("d", memoryview(b"d" * 400), 0)
    writer.finish_tensor("d")
    writer.close()
    assert files(folder) == [FIRST, SECOND]
    assert (folder / SECOND).read_bytes()[-800:] == b"c" * 400 + b"d" * 400


def test_a_shard_that_lacks_only_its_name_gets_it(folder: Path) -> None:
    (folder / FIRST).rename(folder / (FIRST + ".partial"))
    found = recover(folder, SHARDS, journalled(folder, "abc"), span)
    assert found.begun == {FIRST, SECOND}
    writer = ShardWriter(folder, SHARDS, begun=found.begun, finished=found.finished)
    writer.create()
    writer.close()
    assert files(folder) == [FIRST, SECOND + ".partial"]
