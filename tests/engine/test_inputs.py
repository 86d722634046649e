"""Reading inputs: mapped or by pread the same bytes, whatever the offsets; files that shrink."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lazymerge.checkpoint import DTYPES
from lazymerge.checkpoint.tensor import TensorInfo
from lazymerge.engine import inputs
from lazymerge.engine.arena import Arena
from lazymerge.engine.frame import _TensorInput
from lazymerge.engine.inputs import (
    InputFiles,
    MappedInput,
    PreadInput,
    read_exactly,
)
from lazymerge.engine.stages import Slot
from lazymerge.errors import LazymergeError
from lazymerge.graph.node import Read

from merging import bits
from open_files import open_files

ELEMENTS = 5000
BLOCK = 1500


@pytest.fixture
def files() -> Iterator[InputFiles]:
    opened = InputFiles()
    yield opened
    opened.close()


def node_for(path: Path, dtype: str, start: int, elements: int) -> Read:
    stop = start + elements * DTYPES[dtype].item_bytes
    return Read(str(path.parent), TensorInfo("t", dtype, (elements,), path.name, start, stop))


def arena(count: int = 1, size: int = BLOCK * 8) -> list[memoryview]:
    """Room for a block each."""
    return [memoryview(bytearray(size)) for _ in range(count)]


PIECES: list[list[tuple[int, int]]] = [
    [(0, BLOCK)],
    [(BLOCK, 2 * BLOCK)],
    [(4500, ELEMENTS)],
    [(ELEMENTS - 1, ELEMENTS)],
    [(7, 8)],
    [(0, 10), (100, 110), (3000, 3010), (ELEMENTS - 10, ELEMENTS)],
]


@pytest.mark.parametrize("start", [0, 1, 3, 8, 4093])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_both_ways_give_the_same_bytes(
    tmp_path: Path, random: np.random.Generator, files: InputFiles, dtype: str, start: int
) -> None:
    item_bytes = DTYPES[dtype].item_bytes
    data = random.bytes(start + ELEMENTS * item_bytes + 5)
    if dtype == "BOOL":  # other bytes are no booleans
        data = bytes(byte & 1 for byte in data)
    path = tmp_path / "f"
    path.write_bytes(data)
    node = node_for(path, dtype, start, ELEMENTS)
    tensor_bytes = data[start:]
    slot = Slot(64, "U8", BLOCK * item_bytes)
    memory = Arena(64 + BLOCK * item_bytes)
    decoders = [
        _TensorInput(node, files, "pread", memory, [slot], 2 * BLOCK),
        _TensorInput(node, files, "mmap", memory, [slot], 2 * BLOCK),
    ]
    for pieces in [*PIECES, *reversed(PIECES)]:
        count = sum(stop - first for first, stop in pieces)
        expected = b"".join(tensor_bytes[a * item_bytes : b * item_bytes] for a, b in pieces)
        copied, mapped = PreadInput(node, files, arena()), MappedInput(node, files, arena())
        copied.seek(pieces)
        assert copied.raw() == expected
        mapped.seek(pieces)
        assert mapped.raw() == expected  # of a sample, in the slot; else in the map
        for decoder in decoders:
            decoder.seek(pieces, count)
            same = torch.empty(count, dtype=getattr(torch, DTYPES[dtype].torch_name))
            decoder.read_into(same)
            assert bits(same) == expected
            if DTYPES[dtype].is_float:
                wide = torch.empty(count, dtype=torch.float64)
                decoder.read_into(wide)
                assert bits(wide) == bits(same.to(torch.float64))


def test_decoding_is_not_for_those_who_hand_out_bytes(tmp_path: Path, files: InputFiles) -> None:
    (tmp_path / "f").write_bytes(bytes(40))
    node = node_for(tmp_path / "f", "F32", 0, 10)
    for source in (PreadInput(node, files, arena()), MappedInput(node, files)):
        with pytest.raises(TypeError, match="undecoded"):
            source.read_into(torch.empty(10))


def test_slots_of_raw_bytes_do_not_disturb_each_other(tmp_path: Path, files: InputFiles) -> None:
    nodes = []
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 100)
        nodes.append(node_for(tmp_path / name, "U8", 0, 100))
    for sources in (
        [PreadInput(node, files, slots) for slots in [arena(2)] for node in nodes],
        [MappedInput(node, files) for node in nodes],
    ):
        for source in sources:
            source.seek([(10, 20)])
        first, second = sources[0].raw(0), sources[1].raw(1)
        assert (first, second) == (b"a" * 10, b"b" * 10)


def test_inputs_are_never_written_to(tmp_path: Path, files: InputFiles) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"\1" * 100)
    source = MappedInput(node_for(path, "U8", 0, 100), files)
    source.seek([(0, 100)])
    source.raw()[:] = b"\t" * 100
    assert source.raw() == b"\t" * 100
    assert path.read_bytes() == b"\1" * 100


class TestPread:
    def test_a_file_that_is_truncated_while_it_is_read(
        self, tmp_path: Path, files: InputFiles
    ) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(bytes(4000))
        source = PreadInput(node_for(path, "F32", 0, 1000), files, arena())
        os.truncate(path, 3001)
        source.seek([(0, 750)])
        assert source.raw() == bytes(3000)
        source.seek([(700, 800)])
        with pytest.raises(LazymergeError, match=rf"{re.escape(str(path))} ends at byte 3001") as e:
            source.raw()
        assert e.value.exit_code == 1

    def test_a_file_that_cannot_be_read(
        self, tmp_path: Path, files: InputFiles, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(bytes(4000))
        source = PreadInput(node_for(path, "F32", 0, 1000), files, arena())
        source.seek([(10, 20)])

        def fail(*arguments: Any) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(LazymergeError, match=rf"{re.escape(str(path))} at byte 40: Input/out"):
            source.raw()

    def test_short_reads_are_continued(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "f"
        path.write_bytes(bytes(range(200)))
        real = os.preadv
        monkeypatch.setattr(os, "preadv", lambda fd, b, at: real(fd, [b[0][:7]], at))
        buffer = bytearray(150)
        with path.open("rb") as file:
            read_exactly(file.fileno(), memoryview(buffer), 30, "f")
        assert buffer == bytes(range(30, 180))


class TestMapped:
    def test_a_file_that_is_too_short_to_begin_with(
        self, tmp_path: Path, files: InputFiles
    ) -> None:
        path = tmp_path / "f"
        path.write_bytes(bytes(3999))
        source = MappedInput(node_for(path, "F32", 0, 1000), files)
        with pytest.raises(LazymergeError, match="f is shorter than its header promises"):
            source.seek([(0, 1000)])

    def test_a_file_that_is_cut_while_it_is_read(self, tmp_path: Path, files: InputFiles) -> None:
        path = tmp_path / "f"
        path.write_bytes(bytes(40_000))
        source = MappedInput(node_for(path, "F32", 0, 10_000), files)
        source.seek([(0, 100)])
        os.truncate(path, 20_000)
        source.seek([(4000, 5000)])
        with pytest.raises(LazymergeError, match="changed or truncated while"):
            source.seek([(5000, 6000)])

    def test_a_file_that_cannot_be_mapped(
        self, tmp_path: Path, files: InputFiles, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.ENODEV, "No such device")

        path = tmp_path / "f"
        path.write_bytes(bytes(4000))
        source = MappedInput(node_for(path, "F32", 0, 1000), files)
        monkeypatch.setattr(inputs.mmap, "mmap", refuse)
        with pytest.raises(LazymergeError, match=r"f, mapped: .*No such device"):
            source.seek([(0, 1000)])

    @pytest.mark.parametrize("window", [1, 1000, 4096, 5000, 40_000])
    def test_windows_of_any_length(
        self, tmp_path: Path, random: np.random.Generator, files: InputFiles, window: int
    ) -> None:
        path = tmp_path / "f"
        path.write_bytes(random.bytes(9 + 40_000))
        source = MappedInput(node_for(path, "F32", 9, 10_000), files, window_elements=window)
        data = path.read_bytes()[9:]
        for start in range(0, 10_000, 777):
            stop = min(start + 777, 10_000)
            source.seek([(start, stop)])
            assert source.raw() == data[start * 4 : stop * 4]
            assert source.window is not None
            most = max(window, 777) * 4 + 2 * mmap.ALLOCATIONGRANULARITY
            assert len(source.window) <= most
            first = ctypes.string_at(source.address + 9 + start * 4, 4)
            assert first == data[start * 4 : start * 4 + 4]
        source.seek([(3, 5)])  # and back
        assert source.raw() == data[12:20]

    def test_no_more_is_resident_than_the_window(
        self, tmp_path: Path, random: np.random.Generator, files: InputFiles
    ) -> None:
        """Faults map what lies around them, but nothing beyond a mapping."""
        size = 16 << 20
        path = tmp_path / "f"
        path.write_bytes(random.bytes(size))
        source = MappedInput(node_for(path, "U8", 0, size), files, window_elements=500_000)
        before = mapped_resident_bytes()
        for start in range(100, size - 100_003, 100_003):
            source.seek([(start, start + 100_003)])
            bytes(source.raw())
            assert mapped_resident_bytes() - before < 500_000 + (64 << 10)
        source.release()
        assert mapped_resident_bytes() - before < 64 << 10

    def test_what_refers_to_a_window_keeps_it(
        self, tmp_path: Path, random: np.random.Generator, files: InputFiles
    ) -> None:
        path = tmp_path / "f"
        path.write_bytes(random.bytes(40_000))
        source = MappedInput(node_for(path, "U8", 0, 40_000), files)
        source.seek([(0, 10_000)])
        kept = source.raw()
        source.seek([(20_000, 30_000)])
        source.release()
        assert kept == path.read_bytes()[:10_000]


def mapped_resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssFile:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


class TestFiles:
    def test_each_is_opened_once(self, tmp_path: Path) -> None:
        path = tmp_path / "f"
        path.write_bytes(b"12345")
        before = open_files(tmp_path)
        files = InputFiles()
        assert files.descriptor(str(path)) == files.descriptor(str(path))
        files.close()
        assert open_files(tmp_path) == before

    def test_an_absent_file_is_named(self, tmp_path: Path, files: InputFiles) -> None:
        with pytest.raises(LazymergeError, match=r"cannot open .*absent: No such file"):
            files.descriptor(str(tmp_path / "absent"))

    def test_an_empty_file_cannot_be_mapped_and_need_not_be(
        self, tmp_path: Path, files: InputFiles
    ) -> None:
        path = tmp_path / "f"
        path.touch()
        source = PreadInput(node_for(path, "U8", 0, 0), files, arena())
        source.seek([(0, 0)])
        assert len(source.raw()) == 0
