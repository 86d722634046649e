"""The shard writer: any order, any thread; names that tell the truth; disks that are full."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from lazymerge.errors import DoesNotFitError, LazymergeError
from lazymerge.output.layout import OutputTensor, Shard, lay_out, shard_header
from lazymerge.output.writer import ShardWriter, sync_folder

from open_files import open_files


def shards_of(count: int = 6, elements: int = 1000, maximum: int = 10_000) -> tuple[Shard, ...]:
    return lay_out([OutputTensor(f"t{n}", "F32", (elements,)) for n in range(count)], maximum)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_pieces_in_any_order_by_several_threads(
    tmp_path: Path, random: np.random.Generator
) -> None:
    shards = shards_of()
    data = {place.name: random.bytes(place.size_bytes) for s in shards for place in s.tensors}
    pieces = [(name, at) for name in data for at in range(0, 4000, 100)]
    random.shuffle(pieces)
    writer = ShardWriter(tmp_path, shards)
    writer.create()
    left = dict.fromkeys(data, 40)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if not pieces:
                    return
                name, at = pieces.pop()
            writer.write(name, memoryview(data[name][at : at + 100]), at)
            with lock:
                left[name] -= 1
                is_last = left[name] == 0
            if is_last:
                writer.finish_tensor(name)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    assert names_in(tmp_path) == [shard.file for shard in shards]
    for shard in shards:
        expected = shard_header(shard) + b"".join(data[place.name] for place in shard.tensors)
        assert (tmp_path / shard.file).read_bytes() == expected


def test_a_shard_has_its_final_name_once_its_last_tensor_is_finished(tmp_path: Path) -> None:
    shards = shards_of(count=3, maximum=8000)
    assert [len(shard.tensors) for shard in shards] == [2, 1]
    first, second = (shard.file for shard in shards)
    writer = ShardWriter(tmp_path, shards)
    writer.create()
    assert names_in(tmp_path) == [first + ".partial", second + ".partial"]
    assert [(tmp_path / f"{s.file}.partial").stat().st_size for s in shards] == [
        shard.size_bytes for shard in shards
    ]
    writer.finish_tensor("t1")
    assert names_in(tmp_path) == [first + ".partial", second + ".partial"]
    writer.finish_tensor("t2")
    assert names_in(tmp_path) == [first + ".partial", second]
    writer.finish_tensor("t0")
    assert names_in(tmp_path) == [first, second]


def test_close_keeps_partial_names_and_discard_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    writer = ShardWriter(tmp_path, shards_of(count=3, maximum=8000))
    writer.create()
    writer.finish_tensor("t2")
    writer.close()
    assert len(names_in(tmp_path)) == 3
    writer.discard()
    assert names_in(tmp_path) == ["mine.txt"]


def test_never_writes_over_a_file_that_is_there(tmp_path: Path) -> None:
    shards = shards_of()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    (tmp_path / f"{shards[0].file}.partial").symlink_to(elsewhere)
    writer = ShardWriter(tmp_path, shards)
    with pytest.raises(LazymergeError, match=r"cannot write .*partial: File exists"):
        writer.create()
    assert elsewhere.read_text() == "precious"


def test_data_is_synced_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), real_fsync(fd))[1])
    monkeypatch.setattr(
        Path, "rename", lambda self, to: (events.append("rename"), real_rename(self, to))[1]
    )
    for fsync, expected in ((True, ["sync", "rename", "sync"]), (False, ["rename"])):
        writer = ShardWriter(tmp_path, shards_of(count=1), fsync=fsync)
        writer.create()
        writer.finish_tensor("t0")
        assert events == expected
        events.clear()
        (tmp_path / "model.safetensors").unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "lazymerge-test", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a filesystem can only be mounted by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small(small_disk: Path) -> None:
    writer = ShardWriter(small_disk, shards_of(elements=100_000, maximum=800_000))
    with pytest.raises(DoesNotFitError, match=r"no room for .*partial: No space left") as caught:
        writer.create()
    assert caught.value.exit_code == 3
    writer.discard()
    assert names_in(small_disk) == []


def test_a_disk_that_fills_while_writing(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as on a filesystem that cannot reserve space
    monkeypatch.setattr(os, "posix_fallocate", raising(errno.EOPNOTSUPP))
    writer = ShardWriter(small_disk, shards_of(count=2, elements=250_000, maximum=10**7))
    writer.create()
    writer.write("t0", memoryview(bytes(1_000_000)), 0)
    with pytest.raises(DoesNotFitError, match="no room for"):
        writer.write("t1", memoryview(bytes(1_000_000)), 0)
    writer.discard()


def raising(number: int) -> object:
    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("function", ["posix_fallocate", "pwrite", "fsync"])
@pytest.mark.parametrize(
    ("number", "kind", "exit_code"),
    [
        (errno.ENOSPC, DoesNotFitError, 3),
        (errno.EDQUOT, DoesNotFitError, 3),
        (errno.EIO, LazymergeError, 1),
    ],
)
def test_errors_of_the_system(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    number: int,
    kind: type[LazymergeError],
    exit_code: int,
) -> None:
    writer = ShardWriter(tmp_path, shards_of(count=1))
    opened = open_files(tmp_path)
    monkeypatch.setattr(os, function, raising(number))

    def write_all() -> None:
        writer.create()
        writer.write("t0", memoryview(bytes(4000)), 0)
        writer.finish_tensor("t0")

    with pytest.raises(kind, match=r"model\.safetensors\.partial: ") as caught:
        write_all()
    assert caught.value.exit_code == exit_code
    writer.discard()
    assert names_in(tmp_path) == []
    assert open_files(tmp_path) == opened  # none is left open


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_filesystem_that_cannot_reserve_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", raising(number))
    (shard,) = shards_of(count=1)
    writer = ShardWriter(tmp_path, (shard,))
    writer.create()
    assert (tmp_path / "model.safetensors.partial").stat().st_size == shard.size_bytes
    writer.write("t0", memoryview(b"\1" * 4000), 0)
    writer.finish_tensor("t0")
    assert (tmp_path / "model.safetensors").read_bytes() == shard_header(shard) + b"\1" * 4000


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:7], at))
    (shard,) = shards_of(count=1)
    writer = ShardWriter(tmp_path, (shard,))
    writer.create()
    data = bytes(range(250)) * 16
    writer.write("t0", memoryview(data), 0)
    writer.finish_tensor("t0")
    assert (tmp_path / "model.safetensors").read_bytes() == shard_header(shard) + data


def test_space_is_reserved_not_just_promised(tmp_path: Path) -> None:
    (shard,) = shards_of(count=1, elements=500_000, maximum=10**9)
    writer = ShardWriter(tmp_path, (shard,))
    writer.create()
    writer.close()
    assert (tmp_path / "model.safetensors.partial").stat().st_blocks * 512 >= shard.size_bytes


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.ENOTSUP])
def test_a_filesystem_that_cannot_sync_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    sync_folder(tmp_path)


def test_a_disk_that_cannot_write_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    before = open_files(tmp_path)
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)
    assert open_files(tmp_path) == before
