"""The coordinator against a cluster that is made up: workers that die, hang, fail, come late, and
come back; each at a moment that the test chooses."""

from __future__ import annotations

import asyncio
import io
import json
import pickle
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lazymerge
import pytest
from cluster_cases import weights, write_models, write_recipe
from lazymerge.cluster import coordinator, group
from lazymerge.cluster import workforce as workforces
from lazymerge.cluster.connection import ClusterAddress
from lazymerge.cluster.group import Group, GroupResult
from lazymerge.cluster.worker import make_group
from lazymerge.cluster.workforce import DaskWorkforce
from lazymerge.engine.plan import Plan
from lazymerge.engine.report import Silent
from lazymerge.engine.run import run_plan
from lazymerge.errors import DoesNotFitError, InputError, LazymergeError

distributed = pytest.importorskip("distributed", reason="the extra [dask] is not installed")

Behaviour = Callable[["FakeFuture"], None]
"""What a worker does with a group; called in a thread of its own."""


class FakeFuture:
    """A future of a FakeClient."""

    def __init__(self, client: FakeClient, given: Group, worker: str) -> None:
        self.client, self.given, self.worker = client, given, worker
        self.status = "pending"
        self._result: Any = None
        self._callbacks: list[Callable[[Any], None]] = []

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        behaviour = self.client.behaviours.get(self.worker, good)
        behaviour(self)

    def make(self) -> GroupResult:
        return replace(make_group(self.given), worker=self.worker)

    def finish(self, result: Any) -> None:
        """result: an exception is raised by whoever asks for it."""
        if self.worker not in self.client.workers:
            return  # nobody hears of it
        self._result = result
        self.status = "error" if isinstance(result, BaseException) else "finished"
        for callback in self._callbacks:
            callback(self)

    def result(self) -> GroupResult:
        if isinstance(self._result, BaseException):
            raise self._result
        assert isinstance(self._result, GroupResult)
        return self._result

    def release(self) -> None:
        """Dask's futures are cancelled by it, whatever they were."""
        self.status = "cancelled"


def good(future: FakeFuture) -> None:
    try:
        future.finish(future.make())
    except LazymergeError as error:
        future.finish(error)


def hangs(future: FakeFuture) -> None:
    pass


def dies(future: FakeFuture) -> None:
    """In the middle: half of what it was to write is there."""
    path = Path(future.given.folder, future.given.file + ".partial")
    with path.open("r+b") as stream:
        stream.seek(future.given.placements[0].start)
        stream.write(b"\xff" * (future.given.placements[0].size_bytes // 2))
    future.client.workers.pop(future.worker)


class Unpacked(pickle.Unpickler):
    """A group in place of what becomes of it."""

    def find_class(self, module: str, name: str) -> Any:
        if name == make_group.__name__:
            return lambda group: group
        return super().find_class(module, name)


class FakeClient:
    """As much of distributed.Client as the coordinator uses."""

    def __init__(self, *workers: str) -> None:
        self.workers = dict.fromkeys(workers, 1)
        self.behaviours: dict[str, Behaviour] = {}
        self.given: list[tuple[int, str]] = []
        self.status = "running"
        self.paused: set[str] = set()
        self.versions: dict[str, dict[str, str]] = {}
        self.tell: Callable[[Any], None] = lambda event: None

    def sync(self, function: Any, *arguments: Any) -> Any:
        return asyncio.run(function(*arguments))

    async def gather(self, future: FakeFuture, asynchronous: bool) -> GroupResult:
        assert asynchronous
        return future.result()

    async def run(self, function: Any, workers: list[str], on_error: str) -> dict[str, Any]:
        assert on_error == "return"
        return {worker: self.versions.get(worker, function()) for worker in workers}

    @property
    def scheduler(self) -> FakeClient:
        """What is asked of the scheduler is asked of this."""
        return self

    async def identity(self, n_workers: int) -> dict[str, Any]:
        assert n_workers == -1
        facts = {"nthreads": 1, "resources": {}}
        return {
            "workers": {
                worker: {**facts, "status": "paused" if worker in self.paused else "running"}
                for worker in self.workers
            }
        }

    def subscribe_topic(self, topic: str, handler: Callable[[Any], None]) -> None:
        self.tell = handler

    def submit(self, function: Any, packed: bytes, **options: Any) -> FakeFuture:
        assert function is pickle.loads
        given: Group = Unpacked(io.BytesIO(packed)).load()
        (worker,) = options["workers"]
        self.given.append((given.number, worker))
        return FakeFuture(self, given, worker)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_models(root)
    return root


@pytest.fixture
def plan(models: Path, tmp_path: Path) -> Plan:
    path = write_recipe(tmp_path / "recipe.yml", models)
    return lazymerge.plan(path, max_shard_size=150_000)


@pytest.fixture
def expected(plan: Plan, tmp_path: Path) -> Mapping[str, bytes]:
    lazymerge.run(plan, tmp_path / "expected", fsync=False)
    return weights(tmp_path / "expected")


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "LEAST_GROUP_BYTES", 200_000)
    monkeypatch.setattr(coordinator, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(coordinator, "WAKE_SECONDS", 0.01)
    monkeypatch.setattr(coordinator, "REPEAT_SECONDS", 0.3)
    monkeypatch.setattr(coordinator, "REPEAT_FACTOR", 0.0)
    monkeypatch.setattr(coordinator, "SILENT_SECONDS", 30.0)


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.bytes_moved = 0

    def noted(self, message: str) -> None:
        self.notes.append(message)

    def moved(self, bytes_read: int, bytes_written: int, tensor: str) -> None:
        assert min(bytes_read, bytes_written) >= 0
        self.bytes_moved += bytes_read + bytes_written


def run(
    plan: Plan, client: FakeClient, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Notes:
    from contextlib import nullcontext

    monkeypatch.setattr(workforces, "connected", lambda *_, **__: nullcontext(client))
    notes = Notes()
    workforce = DaskWorkforce(ClusterAddress("tls://fake:1"), threads=1)
    run_plan(plan, out, fsync=False, observer=notes, workforce=workforce, **options)
    return notes


def moved_by_one_process(plan: Plan, out: Path) -> int:
    notes = Notes()
    run_plan(plan, out, fsync=False, observer=notes)
    return notes.bytes_moved


def facts(out: Path) -> dict[str, Any]:
    return json.loads((out / "lazymerge.json").read_text())["run"]["cluster"]


def test_all_is_well(
    plan: Plan, expected: Mapping[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "REPEAT_SECONDS", 60.0)
    client = FakeClient("a", "b", "c")
    notes = run(plan, client, tmp_path / "out", monkeypatch)
    assert weights(tmp_path / "out") == expected
    assert facts(tmp_path / "out") == {
        "address": "tls://fake:1",
        "workers": 3,
        "groups": len(client.given),
        "repeated": 0,
        "projected_bytes": facts(tmp_path / "out")["projected_bytes"],
    }
    assert facts(tmp_path / "out")["projected_bytes"] > 10 << 20
    assert notes.notes == []
    assert notes.bytes_moved == moved_by_one_process(plan, tmp_path / "alone")
    assert not (tmp_path / "out" / ".lazymerge").exists()


class TestPausedWorkers:
    """Dask has workers begin nothing that hold more memory than they should."""

    def test_others_make_what_there_is(
        self,
        plan: Plan,
        expected: Mapping[str, bytes],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        client = FakeClient("a", "b")

        def makes_one(future: FakeFuture) -> None:
            client.paused.add("b")
            time.sleep(0.1)  # the scheduler has been asked since
            good(future)

        def makes_slowly(future: FakeFuture) -> None:
            time.sleep(0.05)
            good(future)

        client.behaviours = {"a": makes_slowly, "b": makes_one}
        monkeypatch.setattr(coordinator, "REPEAT_SECONDS", 60.0)
        run(plan, client, tmp_path / "out", monkeypatch)
        assert weights(tmp_path / "out") == expected
        given = [worker for _, worker in client.given]
        assert given.count("b") == 1
        assert given.count("a") > 1

    def test_all_of_them(self, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(coordinator, "WITHOUT_WORKERS_SECONDS", 0.5)
        client = FakeClient("a", "b")
        client.paused |= {"a", "b"}
        for worker in ("a", "b"):
            client.behaviours[worker] = hangs
        monkeypatch.setattr(coordinator, "SILENT_SECONDS", 0.2)
        with pytest.raises(LazymergeError, match=r"paused for .* larger --memory-limit"):
            run(plan, client, tmp_path / "out", monkeypatch)

    def test_what_has_failed_before_is_said(
        self, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(coordinator, "WITHOUT_WORKERS_SECONDS", 0.5)
        client = FakeClient("a")

        def fails(future: FakeFuture) -> None:
            client.paused.add("a")
            time.sleep(0.1)
            future.finish(DoesNotFitError("the smallest limit is 93MiB"))

        client.behaviours["a"] = fails
        with pytest.raises(DoesNotFitError, match="93MiB"):
            run(plan, client, tmp_path / "out", monkeypatch)


def test_a_worker_that_dies(
    plan: Plan, expected: Mapping[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = FakeClient("a", "b")
    client.behaviours["b"] = dies
    run(plan, client, tmp_path / "out", monkeypatch)
    assert weights(tmp_path / "out") == expected
    assert facts(tmp_path / "out")["repeated"] == 1
    assert [worker for _, worker in client.given].count("b") == 1


def test_a_worker_that_hangs_holds_up_one_group(
    plan: Plan, expected: Mapping[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = FakeClient("a", "b")
    client.behaviours["b"] = hangs
    run(plan, client, tmp_path / "out", monkeypatch)
    assert weights(tmp_path / "out") == expected
    assert [worker for _, worker in client.given].count("b") == 1
    hung = next(number for number, worker in client.given if worker == "b")
    assert client.given[-1] == (hung, "a"), "it comes last, when there is nothing else to do"


def test_a_silent_worker_is_not_waited_for(
    plan: Plan, expected: Mapping[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor by groups that are still to be given away; and when it comes back, it is given more."""
    monkeypatch.setattr(coordinator, "SILENT_SECONDS", 1.0)
    client = FakeClient("a", "b")

    def slow(future: FakeFuture) -> None:
        time.sleep(0.1)
        good(future)

    def sleeps_once(future: FakeFuture) -> None:
        client.behaviours["b"] = slow
        time.sleep(1.3)
        good(future)

    client.behaviours.update(a=slow, b=sleeps_once)
    notes = run(plan, client, tmp_path / "out", monkeypatch)
    assert weights(tmp_path / "out") == expected
    assert notes.notes == ["b has said nothing for 1 seconds; others make what it was given"]
    assert [worker for _, worker in client.given].count("b") > 1
    assert facts(tmp_path / "out")["repeated"] == 1


def test_a_worker_that_says_how_far_it_is_is_waited_for(
    plan: Plan, expected: Mapping[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(coordinator, "REPEAT_SECONDS", 60.0)
    client = FakeClient("a")

    def talks(future: FakeFuture) -> None:
        client.behaviours["a"] = good
        for tenth in range(10):
            time.sleep(0.2)
            told = {
                "group": future.given.number,
                "worker": "a",
                "tensor": "t",
                "written": 0,
                "fetched": 0,
            }
            client.tell((0.0, {**told, "token": future.given.token, "read": tenth}))
            client.tell((0.0, {**told, "token": "another run's", "read": 10**9}))
        good(future)

    client.behaviours["a"] = talks
    notes = run(plan, client, tmp_path / "out", monkeypatch)
    assert weights(tmp_path / "out") == expected
    assert notes.notes == []
    assert notes.bytes_moved == moved_by_one_process(plan, tmp_path / "alone")


def test_workers_that_come_late(
    plan: Plan, expected: Mapping[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = FakeClient()
    threading.Timer(0.3, lambda: client.workers.update(late=1)).start()
    monkeypatch.setattr(coordinator, "LOOK_SECONDS", 0.03)
    notes = run(plan, client, tmp_path / "out", monkeypatch)
    assert weights(tmp_path / "out") == expected
    assert notes.notes == ["tls://fake:1 has no workers at the moment; waiting for some"]


def test_no_workers(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "WITHOUT_WORKERS_SECONDS", 0.2)
    with pytest.raises(LazymergeError, match="has had no worker for 0 seconds; start some"):
        run(plan, FakeClient(), tmp_path / "out", monkeypatch)


def test_a_scheduler_that_does_not_answer(
    plan: Plan, expected: Mapping[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made is kept, and another run goes on."""
    monkeypatch.setattr(coordinator, "SCHEDULER_SECONDS", 0.3)
    client = FakeClient("a")

    def last(future: FakeFuture) -> None:
        client.behaviours["a"] = hangs
        good(future)

        async def identity(n_workers: int) -> dict[str, Any]:
            raise OSError("gone")

        client.identity = identity  # type: ignore[method-assign]

    client.behaviours["a"] = last
    out = tmp_path / "out"
    with pytest.raises(LazymergeError, match="does not answer any more"):
        run(plan, client, out, monkeypatch)
    assert not list(out.glob(".lazymerge/cluster-*"))
    report = run_plan(lazymerge.plan_of_unfinished(out), out)
    assert report.resumed_tensors >= 1
    assert weights(out) == expected


def test_a_worker_that_fails_is_given_nothing_any_more(
    plan: Plan, expected: Mapping[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = FakeClient("a", "b")

    def slow(future: FakeFuture) -> None:
        time.sleep(0.02)
        good(future)

    def fails(future: FakeFuture) -> None:
        future.finish(InputError("node17: /models/a is not there"))

    client.behaviours.update(a=slow, b=fails)
    notes = run(plan, client, tmp_path / "out", monkeypatch)
    assert weights(tmp_path / "out") == expected
    assert notes.notes == ["b is given nothing any more: node17: /models/a is not there"]
    assert [worker for _, worker in client.given].count("b") == coordinator.MOST_FAILURES


def test_a_group_that_nobody_can_make(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = FakeClient("a", "b", "c", "d")

    def fails(future: FakeFuture) -> None:
        if future.given.number == 0:
            future.finish(LazymergeError("reading /models/a at byte 7: Input/output error"))
        else:
            good(future)

    client.behaviours.update(dict.fromkeys(client.workers, fails))
    with pytest.raises(LazymergeError, match="at byte 7"):
        run(plan, client, tmp_path / "out", monkeypatch)
    failed = [worker for number, worker in client.given if number == 0]
    assert coordinator.MOST_FAILURES <= len(set(failed)) == len(failed) <= len(client.workers)


def test_workers_that_come_late_and_are_not_fit(
    plan: Plan, expected: Mapping[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes the group that the last has failed to make; that is not the end of the run."""
    client = FakeClient("a")

    def first(future: FakeFuture) -> None:
        good(future)
        for name in "bcdef":
            client.behaviours[name] = fails
            client.workers[name] = 1
        client.behaviours["a"] = slow

    def slow(future: FakeFuture) -> None:
        time.sleep(0.2)
        good(future)

    def fails(future: FakeFuture) -> None:
        future.finish(InputError("node17: torch is 1.0 here"))

    client.behaviours["a"] = first
    run(plan, client, tmp_path / "out", monkeypatch)
    assert weights(tmp_path / "out") == expected
    assert {worker for _, worker in client.given} > {"a", "b"}


def test_a_group_that_kills_workers(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = FakeClient(*"abcdefgh")

    def dies_of_it(future: FakeFuture) -> None:
        if future.given.number == 0:
            future.finish(distributed.KilledWorker("key", "worker", 4))
        else:
            good(future)

    client.behaviours.update(dict.fromkeys(client.workers, dies_of_it))
    with pytest.raises(LazymergeError, match=r"5 workers of .* have ended while .* lm_head"):
        run(plan, client, tmp_path / "out", monkeypatch)


def test_two_workers_that_make_other_bytes(
    plan: Plan, expected: Mapping[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them computes wrongly. Nothing of the group is believed, now or by a later run."""
    client = FakeClient("a", "b")
    gate = threading.Event()

    def wrong(future: FakeFuture) -> None:
        result = future.make()
        tensors = tuple(replace(tensor, checksum="0" * 32) for tensor in result.tensors)
        gate.wait(60)
        future.finish(replace(result, tensors=tensors))

    client.behaviours.update(b=wrong)
    out = tmp_path / "out"
    original = coordinator.Coordinator.to_the_end

    def waits_for_b(self: Any, check: Callable[[], None]) -> None:
        """The run is not over before the other result comes."""
        original(self, check)
        gate.set()
        deadline = time.monotonic() + 60
        while self._attempts and time.monotonic() < deadline:
            self._happened(self._events.get(timeout=60))
            self._take_ended()

    monkeypatch.setattr(coordinator.Coordinator, "to_the_end", waits_for_b)
    with pytest.raises(LazymergeError, match="was made twice, and b has made other bytes"):
        run(plan, client, out, monkeypatch)
    monkeypatch.undo()
    report = run_plan(lazymerge.plan_of_unfinished(out), out)
    assert 0 < len(plan.tensors) - report.resumed_tensors < len(plan.tensors)
    assert weights(out) == expected


def test_inf_ends_a_strict_run_at_once(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path / "inf.yml", models, "task_arithmetic", dtype="float16")
    path.write_text(path.read_text().replace("0.6", "60000.0"))
    client = FakeClient("a")
    with pytest.raises(LazymergeError, match="holds inf or nan; look for it"):
        run(lazymerge.plan(path), client, tmp_path / "out", monkeypatch, strict=True)
    assert len(client.given) == 1


def test_another_version_on_a_worker(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = FakeClient("a", "b")
    client.versions["b"] = {"torch": "1.0"}
    with pytest.raises(InputError) as error:
        run(plan, client, tmp_path / "out", monkeypatch)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("b has lazymerge (none), here it is ")
    assert lines[1].startswith("b has torch 1.0, here it is ")
    assert "install the same" in lines[2]
    assert client.given == []


def test_what_earlier_runs_have_left(
    plan: Plan, expected: Mapping[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sign of a coordinator that was killed is taken away: its workers write nothing more."""
    out = tmp_path / "out"
    monkeypatch.setattr(coordinator, "WITHOUT_WORKERS_SECONDS", 0.1)
    client = FakeClient("a")
    client.behaviours["a"] = dies
    with pytest.raises(LazymergeError):
        run(plan, client, out, monkeypatch)
    (out / ".lazymerge").mkdir(parents=True, exist_ok=True)
    (out / ".lazymerge" / "cluster-old").touch()
    run(plan, FakeClient("a"), out, monkeypatch)
    assert weights(out) == expected
    assert not (out / ".lazymerge").exists()
