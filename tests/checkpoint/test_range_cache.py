"""The cache of byte ranges: what it believes, what it makes room for, and what dies beside it."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from lazymerge.checkpoint.range_cache import (
    RangeCache,
    default_limit_bytes,
    held_bytes,
    taken_bytes,
)
from lazymerge.checkpoint.transport import RemoteFile
from lazymerge.errors import InputError, LazymergeError

PIECE = 1 << 14
SIZE = 10 * PIECE + 77
PAGES = PIECE + 4096
"""What a piece and its seal occupy."""


class Storage:
    """A file elsewhere, and what was asked of it."""

    def __init__(self, seed: int = 0, pin: str = "one") -> None:
        self.data = random.Random(seed).randbytes(SIZE)
        self.file = RemoteFile("s3://bucket/a", SIZE, pin)
        self.asked: list[tuple[int, int]] = []

    def fetch(self, start: int, stop: int, take: Callable[[Any], None]) -> None:
        self.asked.append((start, stop))
        for place in range(start, stop, 5000):
            take(self.data[place : min(stop, place + 5000)])

    def read(
        self, cache: RangeCache, start: int = 0, stop: int = SIZE, *, keeps: bool = True
    ) -> list[tuple[int, int]]:
        """Reads a range, sees that it is right, and says what had to be fetched."""
        self.asked = []
        got = bytearray()
        cache.read(self.file, start, stop, got.extend, self.fetch, keeps=keeps)
        assert got == self.data[start:stop]
        return self.asked


@pytest.fixture(autouse=True)
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the user: not that of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "lazymerge" / "ranges.key"


def opened(tmp_path: Path, limit_bytes: int | None = 1 << 30) -> RangeCache:
    return RangeCache(str(tmp_path / "cache"), limit_bytes, PIECE)


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "ranges").glob("*/*"))


def occupied(tmp_path: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in entries(tmp_path))


class TestWhatItHas:
    def test_what_was_read_is_not_fetched_again(self, tmp_path: Path) -> None:
        storage, cache = Storage(), opened(tmp_path)
        assert storage.read(cache) == [(0, SIZE)]
        assert storage.read(cache) == []
        assert storage.read(cache, 100, 3 * PIECE + 9) == []
        cache.close()
        again = opened(tmp_path)
        assert storage.read(again) == []
        assert again.found_bytes == SIZE

    def test_neighbours_that_are_missing_are_asked_for_together(self, tmp_path: Path) -> None:
        storage, cache = Storage(), opened(tmp_path)
        storage.read(cache, 2 * PIECE, 3 * PIECE)
        assert storage.read(cache) == [(0, 2 * PIECE), (3 * PIECE, SIZE)]

    def test_parts_of_pieces(self, tmp_path: Path) -> None:
        storage, cache = Storage(), opened(tmp_path)
        assert storage.read(cache, 5, PIECE - 5) == [(5, PIECE - 5)]
        assert storage.read(cache, 5, PIECE - 5) == []
        assert storage.read(cache, 0, PIECE) == [(0, PIECE)]
        assert storage.read(cache, 9, 11) == []

    def test_other_versions_are_other_files(self, tmp_path: Path) -> None:
        cache = opened(tmp_path)
        Storage(1, "one").read(cache)
        assert Storage(2, "two").read(cache) == [(0, SIZE)]
        assert Storage(1, "one").read(cache) == []

    def test_samples_are_not_kept(self, tmp_path: Path) -> None:
        storage, cache = Storage(), opened(tmp_path)
        assert storage.read(cache, 3, 99, keeps=False)
        assert entries(tmp_path) == []

    def test_what_it_has_is_told_without_writing(self, tmp_path: Path) -> None:
        storage = Storage()
        folder = str(tmp_path / "cache")
        needed = [(storage.file, (0, 4 * PIECE)), (storage.file, (5 * PIECE, SIZE))]
        assert held_bytes(folder, needed, PIECE) == 0
        assert list(tmp_path.iterdir()) == []
        cache = opened(tmp_path)
        storage.read(cache, 0, 6 * PIECE)
        assert held_bytes(folder, needed, PIECE) == 5 * PIECE
        assert taken_bytes(folder) == occupied(tmp_path) == 6 * PAGES
        assert 0 < default_limit_bytes(folder) < default_limit_bytes(folder, -(1 << 20))

    def test_a_range_that_breaks_off(self, tmp_path: Path) -> None:
        """What has come whole is kept, and nothing else."""
        storage, cache = Storage(), opened(tmp_path)

        def broken(start: int, stop: int, take: Callable[[Any], None]) -> None:
            take(storage.data[start : start + 2 * PIECE + 100])
            raise LazymergeError("the connection failed")

        with pytest.raises(LazymergeError, match="the connection failed"):
            cache.read(storage.file, 0, SIZE, lambda _: None, broken)
        assert [path.name for path in entries(tmp_path)] == [
            f"0-{PIECE}",
            f"{PIECE}-{2 * PIECE}",
        ]
        assert storage.read(cache) == [(2 * PIECE, SIZE)]


class TestWhatItBelieves:
    @pytest.mark.parametrize("place", [0, PIECE // 2, PIECE - 1, PIECE, PIECE + 15])
    def test_damage(self, tmp_path: Path, place: int) -> None:
        storage, cache = Storage(), opened(tmp_path)
        storage.read(cache)
        path = next(path for path in entries(tmp_path) if path.name == f"{PIECE}-{2 * PIECE}")
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
        assert storage.read(cache) == [(PIECE, 2 * PIECE)]
        assert storage.read(cache) == []

    def test_what_is_short_empty_or_long(self, tmp_path: Path) -> None:
        storage, cache = Storage(), opened(tmp_path)
        storage.read(cache)
        first, second, third, *_ = entries(tmp_path)
        first.write_bytes(first.read_bytes()[:-1])
        second.write_bytes(b"")
        third.write_bytes(third.read_bytes() + b"0")
        assert sum(stop - start for start, stop in storage.read(cache)) >= 2 * PIECE
        assert storage.read(cache) == []

    def test_pieces_that_change_places(self, tmp_path: Path) -> None:
        storage, cache = Storage(), opened(tmp_path)
        storage.read(cache)
        first, second = tmp_path / "a", tmp_path / "b"
        one, two = (
            next(
                path
                for path in entries(tmp_path)
                if path.name == f"{n * PIECE}-{n * PIECE + PIECE}"
            )
            for n in (3, 4)
        )
        one.rename(first)
        two.rename(second)
        first.rename(two)
        second.rename(one)
        assert storage.read(cache)
        assert storage.read(cache) == []

    def test_somebody_elses_pieces(self, tmp_path: Path, key: Path) -> None:
        """A cache that comes from elsewhere is of no use, and does no harm."""
        storage, cache = Storage(), opened(tmp_path)
        storage.read(cache)
        cache.close()
        key.unlink()
        again = opened(tmp_path)
        assert storage.read(again) == [(0, SIZE)]

    def test_forged_pieces(self, tmp_path: Path) -> None:
        """Made by someone who knows all but the key."""
        from lazymerge.checkpoint import cached_pieces

        storage, cache = Storage(), opened(tmp_path)
        storage.read(cache)
        piece = (0, PIECE)
        path = next(path for path in entries(tmp_path) if path.name == f"0-{PIECE}")
        forger = cached_pieces.Shelf(-1, bytes(32), storage.file)
        content = bytes(PIECE)
        digest = cached_pieces.xxh3_128(content, forger.seed).digest()
        path.write_bytes(content + forger.seal(digest, piece))
        assert storage.read(cache) == [piece]

    def test_a_key_is_of_its_owner_alone(self, tmp_path: Path, key: Path) -> None:
        opened(tmp_path)
        assert key.stat().st_mode & 0o777 == 0o600
        assert len(key.read_bytes()) == 32
        assert [path.name for path in key.parent.iterdir()] == [key.name]


class TestWhereItWrites:
    def test_links_lead_nowhere(self, tmp_path: Path) -> None:
        storage, cache = Storage(), opened(tmp_path)
        storage.read(cache)
        shelf = entries(tmp_path)[0].parent
        cache.close()
        outside = tmp_path / "outside"
        shelf.rename(outside)
        before = {path.name: path.read_bytes() for path in outside.iterdir()}
        shelf.symlink_to(outside)
        again = opened(tmp_path, 2 * PAGES)
        assert storage.read(again) == [(0, SIZE)]
        assert {path.name: path.read_bytes() for path in outside.iterdir()} == before

    @pytest.mark.parametrize("name", ["ranges", "lock", "CACHEDIR.TAG"])
    def test_links_in_place_of_its_own(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / name).symlink_to(tmp_path / "outside")
        try:
            Storage().read(opened(tmp_path))
        except InputError as error:
            assert "cannot be used" in str(error)  # noqa: PT017
        assert not (tmp_path / "outside").exists()

    def test_pipes_and_folders_in_place_of_pieces(self, tmp_path: Path) -> None:
        storage, cache = Storage(), opened(tmp_path)
        storage.read(cache)
        first, second, *_ = entries(tmp_path)
        first.unlink()
        os.mkfifo(first)
        second.unlink()
        second.mkdir()
        assert storage.read(cache)

    def test_folders_that_are_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "thesis.txt").write_text("")
        with pytest.raises(InputError, match=r"holds other things \('thesis\.txt'\)"):
            opened(tmp_path)

    def test_files_of_others_stay(self, tmp_path: Path) -> None:
        storage, cache = Storage(), opened(tmp_path)
        storage.read(cache, 0, PIECE)
        other = entries(tmp_path)[0].parent / "mine.txt"
        other.write_text("mine")
        cache.close()
        small = opened(tmp_path, PAGES)
        Storage(3, "three").read(small)
        assert other.read_text() == "mine"
        assert len(entries(tmp_path)) == 2


class TestRoom:
    def test_what_was_used_longest_ago_goes_first(self, tmp_path: Path) -> None:
        storage = Storage()
        for order in ([4, 1, 3], [1]):
            cache = opened(tmp_path)
            for n in order:
                storage.read(cache, n * PIECE, (n + 1) * PIECE)
                time.sleep(0.01)
            cache.close()
        small = opened(tmp_path, 3 * PAGES + PAGES // 2)
        storage.read(small, 7 * PIECE, 8 * PIECE)
        assert {path.name.partition("-")[0] for path in entries(tmp_path)} == {
            str(n * PIECE) for n in (1, 3, 7)
        }

    def test_the_limit_holds(self, tmp_path: Path) -> None:
        for seed in range(3):
            cache = opened(tmp_path, 5 * PAGES)
            Storage(seed, str(seed)).read(cache)
            cache.close()
            assert occupied(tmp_path) <= 5 * PAGES

    def test_a_merge_that_is_larger_finds_a_part_again(self, tmp_path: Path) -> None:
        """Where the oldest simply went, nothing would ever be found."""
        storage = Storage()
        for number in range(3):
            cache = opened(tmp_path, 5 * PAGES)
            cache.protect(storage.file, [(0, SIZE)])
            asked = storage.read(cache)
            cache.close()
            assert asked == [(0, SIZE)] if not number else asked == [(5 * PIECE, SIZE)]

    def test_no_room_at_all(self, tmp_path: Path) -> None:
        storage, cache = Storage(), opened(tmp_path, 10)
        assert storage.read(cache) == [(0, SIZE)]
        assert entries(tmp_path) == []
        with pytest.raises(LazymergeError, match=r"has no room for .*--cache-limit"):
            cache.fill(storage.file, 0, SIZE, storage.fetch)

    def test_a_disk_that_is_full(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        storage, cache = Storage(), opened(tmp_path)

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        assert storage.read(cache) == [(0, SIZE)]
        assert cache.problem == "No space left on device"
        monkeypatch.undo()
        assert entries(tmp_path) == []

    def test_what_is_taken_is_found_out_anew(self, tmp_path: Path) -> None:
        storage, cache = Storage(), opened(tmp_path)
        storage.read(cache)
        cache.close()
        for text in (b"0", b"", b"nonsense", b"9" * 19, b"9" * 40):
            (tmp_path / "cache" / "lock").write_bytes(text)
            with closing(opened(tmp_path)) as cache:
                assert storage.read(cache) == []
            assert taken_bytes(str(tmp_path / "cache")) == occupied(tmp_path)


def keep_reading(folder: str, seed: int, limit_bytes: int) -> None:
    """A process that uses a cache until it is killed."""
    number = random.Random(seed)
    while True:
        cache = RangeCache(folder, limit_bytes, PIECE)
        for _ in range(20):
            version = number.randrange(4)
            start = number.randrange(SIZE)
            Storage(version, str(version)).read(cache, start, number.randrange(start, SIZE + 1))
        cache.close()


def test_several_processes_that_are_killed(tmp_path: Path) -> None:
    """None ever reads what is wrong, and what they leave is within the limit."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    limit_bytes, folder = 25 * PAGES, str(tmp_path / "cache")
    context = multiprocessing.get_context("fork")
    number = random.Random(seed)
    for round_number in range(4):
        processes = [
            context.Process(
                target=keep_reading, args=(folder, seed + 10 * round_number + n, limit_bytes)
            )
            for n in range(3)
        ]
        for process in processes:
            process.start()
        time.sleep(0.1 + number.random() / 3)
        for process in processes:
            assert process.is_alive()  # a wrong byte would have ended it
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        assert occupied(tmp_path) <= limit_bytes
    RangeCache(folder, limit_bytes, PIECE).close()
    assert not [path for path in entries(tmp_path) if path.name.endswith(".partial")]
    assert taken_bytes(folder) == occupied(tmp_path) <= limit_bytes
    for version in range(4):
        Storage(version, str(version)).read(RangeCache(folder, limit_bytes, PIECE))
