"""One process at a time on an output; the lock of one that is gone is nobody's."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from lazymerge.errors import DoesNotFitError, LazymergeError
from lazymerge.output import lock as lock_module
from lazymerge.output.journal import boot_id
from lazymerge.output.lock import (
    ALIVE_SECONDS,
    LOCK_PATH,
    TAKING_PATH,
    LockedError,
    LockLostError,
    OutputLock,
    lock_owner,
)

from open_files import open_files

HOLDER = """
import sys, time
from pathlib import Path
from lazymerge.output.lock import OutputLock
lock = OutputLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_another_process_is_refused_and_told_whose_it_is(tmp_path: Path, holder: Any) -> None:
    with pytest.raises(LockedError, match=f"is being written by process {holder.pid} on "):
        OutputLock(tmp_path)
    owner = lock_owner(tmp_path)
    assert owner is not None
    assert owner.pid == holder.pid


def test_what_a_dead_process_held_is_taken_over(tmp_path: Path, holder: Any) -> None:
    holder.kill()
    holder.wait()
    assert lock_owner(tmp_path) is None
    lock = OutputLock(tmp_path)
    assert lock.taken_over is not None
    assert lock.taken_over.pid == holder.pid
    lock.release()


def test_release_leaves_nothing(tmp_path: Path) -> None:
    lock = OutputLock(tmp_path)
    assert lock.taken_over is None
    assert lock_owner(tmp_path) is not None
    lock.release()
    assert [*tmp_path.iterdir()] == []
    OutputLock(tmp_path).release()


def test_two_in_one_process(tmp_path: Path) -> None:
    lock = OutputLock(tmp_path)
    with pytest.raises(LockedError):
        OutputLock(tmp_path)
    lock.release()


def write_owner(folder: Path, age: float = 0.0, **values: object) -> None:
    owner = {
        "pid": os.getpid(),
        "host": "elsewhere",
        "boot": boot_id(),
        "started": 1,
        "namespace": lock_module._pid_namespace(),
        **values,
    }
    (folder / ".lazymerge").mkdir(exist_ok=True)
    (folder / LOCK_PATH).write_text(json.dumps(owner))
    then = time.time() - age
    os.utime(folder / LOCK_PATH, (then, then))


class TestWhereTheFileDecides:
    """On filesystems without locks, or of other machines."""

    @pytest.fixture(autouse=True)
    def _without_locks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lock_module, "_try_lock", lambda _: None)

    def test_a_living_process_of_this_machine(self, tmp_path: Path) -> None:
        write_owner(tmp_path, started=lock_module._start_ticks(os.getpid()))
        with pytest.raises(LockedError, match=f"process {os.getpid()} on elsewhere"):
            OutputLock(tmp_path)

    def test_its_number_given_again(self, tmp_path: Path) -> None:
        write_owner(tmp_path, started=lock_module._start_ticks(os.getpid()) + 1)
        OutputLock(tmp_path).release()

    def test_a_process_that_is_gone(self, tmp_path: Path, holder: Any) -> None:
        holder.kill()
        holder.wait()
        write_owner(tmp_path, pid=holder.pid, started=0)
        OutputLock(tmp_path).release()

    def test_a_process_of_another_container(self, tmp_path: Path, holder: Any) -> None:
        """Its number means nothing here; it touches its lock."""
        holder.kill()
        holder.wait()
        write_owner(tmp_path, 5, pid=holder.pid, started=0, namespace="pid:[4]")
        with pytest.raises(LockedError):
            OutputLock(tmp_path)
        write_owner(tmp_path, 2 * ALIVE_SECONDS, pid=holder.pid, started=0, namespace="pid:[4]")
        OutputLock(tmp_path).release()

    def test_this_machine_before_it_was_started_again(self, tmp_path: Path) -> None:
        host = lock_module.this_session().host
        write_owner(tmp_path, 1e9, host=host, boot="earlier")
        OutputLock(tmp_path).release()

    def test_another_machine_of_the_same_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It has touched the lock since this machine was started."""
        monkeypatch.setattr(lock_module, "_seconds_since_boot", lambda: 1000.0)
        write_owner(tmp_path, host=lock_module.this_session().host, boot="of another machine")
        with pytest.raises(LockedError):
            OutputLock(tmp_path)
        monkeypatch.setattr(lock_module, "_seconds_since_boot", lambda: 5.0)
        write_owner(tmp_path, 10, host=lock_module.this_session().host, boot="earlier")
        OutputLock(tmp_path).release()

    @pytest.mark.parametrize("is_left", [False, True] * 10)
    def test_of_many_that_try_one_has_it(self, tmp_path: Path, is_left: bool) -> None:
        """Also where all of them find one whose owner is gone."""
        if is_left:
            write_owner(tmp_path, 1e6, boot="of another machine")
        start = threading.Barrier(4)

        def take() -> OutputLock | None:
            start.wait()
            try:
                return OutputLock(tmp_path)
            except LockedError:
                return None

        with ThreadPoolExecutor(4) as pool:
            taken = [pool.submit(take) for _ in range(4)]
            held = [lock for lock in (future.result() for future in taken) if lock]
        assert len(held) == 1
        held[0].touch()
        held[0].check()
        held[0].release()
        assert [*tmp_path.iterdir()] == []

    @pytest.mark.parametrize("links", [True, False])
    def test_whoever_is_slow_between_two_calls(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
    ) -> None:
        """Four that find a dead lock, each held up for a while now and then."""
        seed = random.SystemRandom().randrange(1 << 32)
        print(f"seed {seed}")
        if not links:
            monkeypatch.setattr(os, "link", _no_links)
        generator = random.Random(seed)
        for place, name in (
            (lock_module, "open_own"),
            (lock_module, "_is_at"),
            (lock_module, "_write_owner"),
            (Path, "rename"),
        ):
            monkeypatch.setattr(place, name, _now_and_then_late(getattr(place, name), generator))

        def take() -> OutputLock | None:
            start.wait()
            try:
                return OutputLock(tmp_path)
            except LockedError:
                return None

        with ThreadPoolExecutor(4) as pool:
            for _ in range(40):
                write_owner(tmp_path, 1e6, boot="of another machine")
                start = threading.Barrier(4)
                taken = [pool.submit(take) for _ in range(4)]
                held = [lock for lock in (future.result() for future in taken) if lock]
                for lock in held:
                    lock.check()
                    lock.release()
                assert len(held) == 1
        assert [*tmp_path.iterdir()] == []

    def test_who_took_over_a_lock_was_killed_at_it(self, tmp_path: Path, holder: Any) -> None:
        holder.kill()
        holder.wait()
        write_owner(tmp_path, pid=holder.pid, started=0)
        (tmp_path / LOCK_PATH).rename(tmp_path / TAKING_PATH)
        write_owner(tmp_path, pid=holder.pid, started=0)
        OutputLock(tmp_path).release()
        assert [*tmp_path.iterdir()] == []

    def test_a_clock_that_was_set_back(self, tmp_path: Path) -> None:
        write_owner(tmp_path, -86400, boot="of another machine")
        OutputLock(tmp_path).release()

    def test_the_lock_of_another_is_neither_removed_nor_kept(self, tmp_path: Path) -> None:
        lock = OutputLock(tmp_path)
        (tmp_path / LOCK_PATH).unlink()
        other = OutputLock(tmp_path)
        lock.touch()
        with pytest.raises(LockLostError, match="was removed or replaced while it was held"):
            lock.check()
        lock.release()
        assert (tmp_path / LOCK_PATH).exists()
        other.touch()
        other.check()
        other.release()
        assert [*tmp_path.iterdir()] == []

    @pytest.mark.parametrize(
        ("age", "is_alive"), [(0.0, True), (ALIVE_SECONDS / 2, True), (ALIVE_SECONDS * 2, False)]
    )
    def test_another_machine(self, tmp_path: Path, age: float, is_alive: bool) -> None:
        write_owner(tmp_path, age, boot="of another machine")
        if is_alive:
            with pytest.raises(LockedError, match="on elsewhere"):
                OutputLock(tmp_path)
        else:
            OutputLock(tmp_path).release()


def _no_links(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def _now_and_then_late(call: Any, generator: random.Random) -> Any:
    def late(*arguments: Any, **named: Any) -> Any:
        time.sleep(generator.choice((0, 0, 0.001, 0.01)))
        return call(*arguments, **named)

    return late


def test_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _no_links)
    lock = OutputLock(tmp_path)
    with pytest.raises(LockedError):
        OutputLock(tmp_path)
    lock.release()
    assert [*tmp_path.iterdir()] == []


def test_another_machine_whose_locks_are_not_seen_here(tmp_path: Path) -> None:
    write_owner(tmp_path, boot="of another machine")
    with pytest.raises(LockedError, match="on elsewhere"):
        OutputLock(tmp_path)


def test_a_lock_that_is_held_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "TOUCH_SECONDS", 0.01)
    others = threading.active_count()
    lock = OutputLock(tmp_path)
    assert threading.active_count() == others + 1
    os.utime(tmp_path / LOCK_PATH, (1, 1))
    deadline = time.monotonic() + 10
    while (tmp_path / LOCK_PATH).stat().st_mtime < 1e9 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / LOCK_PATH).stat().st_mtime > 1e9
    lock.release()
    assert threading.active_count() == others


def test_who_looks_does_not_keep_others_from_beginning(tmp_path: Path) -> None:
    """lazymerge status, again and again."""
    stopped = threading.Event()

    def look() -> None:
        while not stopped.is_set():
            lock_owner(tmp_path)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(200):
            OutputLock(tmp_path).release()
    finally:
        stopped.set()
        looking.join()


def test_folder_and_file_come_and_go(tmp_path: Path) -> None:
    """Two that take and release it in turns, one of whom removes the folder under the other."""

    def take() -> None:
        for _ in range(200):
            while True:
                try:
                    lock = OutputLock(tmp_path)
                except LockedError:
                    continue
                lock.release()
                break

    with ThreadPoolExecutor(2) as pool:
        for taken in [pool.submit(take) for _ in range(2)]:
            taken.result(60)
    assert [*tmp_path.iterdir()] == []


def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_files(tmp_path)

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lock_module, "_write_owner", fail)
    with pytest.raises(DoesNotFitError):
        OutputLock(tmp_path)
    assert [*tmp_path.iterdir()] == []
    assert open_files(tmp_path) == before


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / ".lazymerge").mkdir()
    os.mkfifo(tmp_path / LOCK_PATH)
    assert lock_owner(tmp_path) is None
    OutputLock(tmp_path).release()
    assert [*tmp_path.iterdir()] == []


def test_a_folder_in_its_place_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK_PATH).mkdir(parents=True)
    with pytest.raises(LazymergeError, match=f"cannot write {tmp_path / LOCK_PATH}"):
        OutputLock(tmp_path)


def test_another_name_of_the_lock_is_somebodys(tmp_path: Path) -> None:
    (tmp_path / ".lazymerge").mkdir()
    (tmp_path / "elsewhere").write_text("mine")
    os.link(tmp_path / "elsewhere", tmp_path / LOCK_PATH)
    lock = OutputLock(tmp_path)
    assert "pid" in (tmp_path / LOCK_PATH).read_text()
    lock.release()
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_the_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / ".lazymerge").write_text("")
    with pytest.raises(LazymergeError, match="File exists"):
        OutputLock(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '{"pid": "x"}', '{"pid": 0, "host": "", "boot": "", "started": 0}']
)
def test_a_lock_that_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / ".lazymerge").mkdir()
    (tmp_path / LOCK_PATH).write_text(text)
    assert lock_owner(tmp_path) is None
    OutputLock(tmp_path).release()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / ".lazymerge").mkdir()
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / LOCK_PATH).symlink_to(tmp_path / "elsewhere")
    OutputLock(tmp_path).release()
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in /proc: it is not there, however often one tries."""
    monkeypatch.setattr(lock_module, "TRY_SECONDS", 0.05)

    def mkdir(self: Path, **_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(LazymergeError, match=r"cannot write .*: No such file or directory"):
        OutputLock(tmp_path / "foo")
