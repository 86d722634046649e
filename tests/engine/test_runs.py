"""Runs: what they report, and what is left when one is interrupted or fails: nothing."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lazymerge.engine import blocks, finishing, scheduler, workforce
from lazymerge.engine import run as run_module
from lazymerge.engine.execution import Kernels, ReadMode
from lazymerge.engine.inputs import InputFiles
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import make_plan
from lazymerge.engine.report import Silent
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.engine.scheduler import SPAN_BLOCKS
from lazymerge.errors import DoesNotFitError, InputError, LazymergeError
from lazymerge.output.folder import is_unfinished
from lazymerge.output.writer import ShardWriter
from merge_cases import RECIPES, write_models
from xxhash import xxh3_128_digest, xxh3_128_hexdigest

from conftest import needs_kernels, write_checkpoint
from merging import plan_of, recipe_of
from open_files import open_files

BLOCK = 1000
BLOCKS = 40  # of every tensor
RESOURCES = Resources(4 << 30, workers=2)
WEIGHTS = "model.safetensors"
NAMES = [f"model.layers.{number}.w" for number in range(6)]


@pytest.fixture(params=[pytest.param("native", marks=needs_kernels), "torch"])
def plan(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Three models of six tensors of forty blocks each, in shards of two tensors."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", BLOCK)
    for number, model in enumerate(("base", "a", "b")):
        tensors = {name: torch.full((BLOCKS * BLOCK - 3,), float(number)) for name in NAMES}
        write_checkpoint(tmp_path / model, tensors, {"model_type": "llama"})
        (tmp_path / model / "tokenizer.json").write_text("{}")
    resources = replace(RESOURCES, kernels=request.param)
    return plan_of(tmp_path, RECIPES["linear"], {}, resources, max_shard_bytes=350_000)


def moves_per_tensor(plan: Plan) -> int:
    """How often an observer is told of one: a span is one for the native kernels."""
    return BLOCKS if plan.execution.kernels == "torch" else -(-BLOCKS // SPAN_BLOCKS)


def kernels_of(plan: Plan) -> Kernels:
    return plan.execution.kernels


class Recorder(Silent):
    """Counts what it is told; `then` is called every time with the number of times so far."""

    def __init__(self, then: Callable[[int], None] = lambda blocks: None) -> None:
        self.read = self.written = self.blocks = 0
        self.tensors: Counter[str] = Counter()
        self.completed: Counter[str] = Counter()
        self._then = then
        self._lock = threading.Lock()

    def moved(self, bytes_read: int, bytes_written: int, tensor: str) -> None:
        with self._lock:
            self.read += bytes_read
            self.written += bytes_written
            self.blocks += 1
            self.tensors[tensor] += 1
            count = self.blocks
        self._then(count)

    def finished(self, tensor: str) -> None:
        with self._lock:
            self.completed[tensor] += 1


def assert_can_be_resumed(plan: Plan, tmp_path: Path, out: Path, *, kept: bool) -> None:
    """Nothing is left of a run in which no tensor was finished; else another run makes the rest.

    kept: something must be.
    """
    if not out.exists():
        assert not kept
        assert_nothing_is_left(tmp_path)
        return
    assert is_unfinished(out)
    report = run_plan(plan, out, fsync=False)
    assert 0 < report.resumed_tensors <= len(NAMES)
    assert digests_in(out) == digests_of_tensors(plan, tmp_path / "anew")


def assert_nothing_is_left(tmp_path: Path) -> None:
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base"]
    for model in ("a", "b", "base"):
        assert {path.name for path in (tmp_path / model).iterdir()} <= {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
        }
    left = [thread for thread in threading.enumerate() if thread.name.startswith("worker-")]
    for thread in left:
        thread.join(0.5)  # it has ended its work, and may not be gone yet
    assert not [thread for thread in left if thread.is_alive()]


# ------------------------------------------------------------------------ success


def test_report_and_observer_agree_with_the_plan(plan: Plan, tmp_path: Path) -> None:
    observer = Recorder()
    report = run_plan(plan, tmp_path / "out", observer=observer)
    assert report.output == str(tmp_path / "out")
    assert report.bytes_read == observer.read == plan.bytes_read
    headers = sum(shard.header_bytes for shard in plan.shards)
    assert report.bytes_written + headers == plan.bytes_written
    assert observer.written == report.bytes_written
    assert observer.tensors == dict.fromkeys(NAMES, moves_per_tensor(plan))
    assert observer.completed == dict.fromkeys(NAMES, 1)
    assert 0 < report.seconds < 60
    assert report.measured_bytes > 0


@pytest.mark.parametrize("span", [1, 4, 16])
def test_the_folder_is_complete_and_the_manifest_tells_the_truth(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, span: int
) -> None:
    for module in (scheduler, finishing):
        monkeypatch.setattr(module, "SPAN_BLOCKS", span)
    out = tmp_path / "out"
    run_plan(plan, out, fsync=False)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "lazymerge.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    manifest = json.loads((out / "lazymerge.json").read_text())
    assert manifest["fingerprint"] == plan.fingerprint
    assert sorted(manifest["tensors"]) == NAMES
    assert "span_elements" not in manifest  # it is a matter of each tensor
    for shard in plan.shards:
        data = (out / shard.file).read_bytes()
        assert len(data) == shard.size_bytes
        for place in shard.tensors:
            values = data[place.start : place.stop_exclusive]
            digests = [
                xxh3_128_digest(values[at : at + 4 * span * BLOCK])
                for at in range(0, len(values), 4 * span * BLOCK)
            ]
            assert len(digests) == -(-BLOCKS // span)
            entry = manifest["tensors"][place.name]
            assert entry["span_elements"] == span * BLOCK
            assert entry["file"] == shard.file
            assert entry["checksum"] == xxh3_128_hexdigest(b"".join(digests))


@pytest.mark.parametrize("kernels", [pytest.param("native", marks=needs_kernels), "torch"])
def test_checksums_of_blocks_of_whole_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: Kernels
) -> None:
    """Which elements a span has follows from the tensor's rows; the manifest says it of each."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", BLOCK)
    for module in (scheduler, finishing):
        monkeypatch.setattr(module, "SPAN_BLOCKS", 3)
    generator = torch.Generator().manual_seed(2)
    shapes = {"even": (50, 100), "uneven": (40, 300), "long": (7, 2 * BLOCK + 1), "vector": (4567,)}
    models = {
        model: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        | {"ids": torch.arange(10_000)}
        for model in ("base", "a", "b")
    }
    recipe = {
        "merge_method": "della",
        "base_model": "base",
        "models": [{"model": m, "parameters": {"weight": 1, "density": 0.5}} for m in ("a", "b")],
    }
    plan = plan_of(tmp_path, recipe, models, replace(RESOURCES, workers=3, kernels=kernels))
    run_plan(plan, tmp_path / "out", fsync=False)
    entries = json.loads((tmp_path / "out" / "lazymerge.json").read_text())["tensors"]
    expected = {
        "even": 3 * 1000,  # ten rows a block
        "uneven": 3 * 900,
        "long": 3 * (2 * BLOCK + 1),
        "vector": 3 * 4567,  # one row
        "ids": 3 * BLOCK,  # copied
    }
    assert {name: entry["span_elements"] for name, entry in entries.items()} == expected
    for shard in plan.shards:
        data = (tmp_path / "out" / shard.file).read_bytes()
        for place in shard.tensors:
            values = data[place.start : place.stop_exclusive]
            width = 8 if place.name == "ids" else 4
            step = width * expected[place.name]
            digests = [
                xxh3_128_digest(values[at : at + step]) for at in range(0, len(values), step)
            ]
            assert entries[place.name]["checksum"] == xxh3_128_hexdigest(b"".join(digests))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_models(folder)
    return folder


@pytest.mark.parametrize("method", RECIPES)
def test_the_order_in_which_tensors_are_done_does_not_show(
    models: Path, tmp_path: Path, method: str
) -> None:
    recipe = recipe_of(models, RECIPES[method])
    found = []
    for name in ("forward", "backward"):
        plan = make_plan(recipe, RESOURCES)
        if name == "backward":
            plan.__dict__["tasks"] = tuple(reversed(plan.tasks))  # a cached property
        run_plan(plan, tmp_path / name, fsync=False)
        found.append((tmp_path / name / "model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_the_callers_threads_of_torch_are_given_back(plan: Plan, tmp_path: Path) -> None:
    if plan.execution.kernels == "native":
        pytest.skip("they are not touched")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    seen: set[int] = set()
    try:
        run_plan(plan, tmp_path / "out", fsync=False)
        assert torch.get_num_threads() == 3

        def fail(blocks: int) -> None:
            seen.add(torch.get_num_threads())
            raise LazymergeError("enough")

        with pytest.raises(LazymergeError, match="enough"):
            run_plan(plan, tmp_path / "again", observer=Recorder(fail))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == {1}


@needs_kernels
def test_where_torch_does_not_compute_its_threads_are_left_alone(
    plan: Plan, tmp_path: Path
) -> None:
    plan = plan.with_resources(Resources(4 << 30, workers=2, kernels="native"))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    seen: set[int] = set()
    try:
        run_plan(
            plan,
            tmp_path / "out",
            fsync=False,
            observer=Recorder(lambda blocks: seen.add(torch.get_num_threads())),
        )
    finally:
        torch.set_num_threads(before)
    assert seen == {3}


# ------------------------------------------------------------------------ failure


def test_ctrl_c(plan: Plan, tmp_path: Path) -> None:
    def interrupt(blocks: int) -> None:
        if blocks == 7:
            os.kill(os.getpid(), signal.SIGINT)
        if blocks >= 7:
            time.sleep(0.2)  # not done before the main thread has heard of it

    observer = Recorder(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, tmp_path / "deeper" / "out", observer=observer)
    # blocks begun are ended, no others begun
    assert 7 <= observer.blocks < len(NAMES) * moves_per_tensor(plan)
    assert_can_be_resumed(plan, tmp_path, tmp_path / "deeper" / "out", kept=False)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_an_error_in_a_worker_is_raised_whenever_it_comes(
    plan: Plan, tmp_path: Path, workers: int, share: float
) -> None:
    at = max(1, round(share * len(NAMES) * moves_per_tensor(plan)))

    def fail(blocks: int) -> None:
        if blocks == at:
            raise ZeroDivisionError(at)

    opened = open_files(tmp_path)
    with pytest.raises(ZeroDivisionError, match=str(at)):
        run_plan(
            plan.with_resources(replace(RESOURCES, workers=workers, kernels=kernels_of(plan))),
            tmp_path / "deeper" / "out",
            observer=Recorder(fail),
        )
    # of four workers each may be in the middle of a tensor of its own
    is_any_kept = share == 1.0 or (share > 0 and workers == 1)
    assert_can_be_resumed(plan, tmp_path, tmp_path / "deeper" / "out", kept=is_any_kept)
    assert open_files(tmp_path) == opened


def test_a_file_that_cannot_be_read(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads, the system's reason is told: here, that one of the files is a folder."""
    real = InputFiles.descriptor

    def folder_instead(self: InputFiles, path: str) -> int:
        return real(self, str(tmp_path) if path == str(tmp_path / "a" / WEIGHTS) else path)

    monkeypatch.setattr(InputFiles, "descriptor", folder_instead)
    with pytest.raises(
        LazymergeError, match=r"reading .*a/model\.safetensors at byte \d+: Is a dir"
    ):
        run_plan(plan, tmp_path / "out")
    assert_nothing_is_left(tmp_path)


def test_a_read_that_fails(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if plan.execution.kernels == "native":
        pytest.skip("reads are the kernels' own")
    real = os.preadv
    calls = Counter[str]()

    def fail(*arguments: Any) -> int:
        calls["preadv"] += 1
        if calls["preadv"] > 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(LazymergeError, match=r"reading .*model\.safetensors at byte \d+: Input/"):
        run_plan(plan, tmp_path / "out")
    assert_nothing_is_left(tmp_path)


def test_an_input_truncated_under_the_run(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "a" / "model.safetensors"
    with pytest.raises(LazymergeError, match=r"a/model\.safetensors ends at byte \d+, ") as caught:
        run_plan(plan, tmp_path / "out", observer=Recorder(lambda n: os.truncate(path, 500)))
    assert caught.value.exit_code == 1
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("mode", ["pread", "mmap"])
def test_an_input_truncated_before_the_run(
    plan: Plan, tmp_path: Path, mode: ReadMode, kernels: Kernels
) -> None:
    os.truncate(tmp_path / "a" / "model.safetensors", 500)
    mapped = plan.with_resources(Resources(4 << 30, 2, mode, kernels))
    with pytest.raises(InputError, match=r"a/model\.safetensors cannot be read"):
        run_plan(mapped, tmp_path / "out")
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, DoesNotFitError, r"no room for .*\.partial: No space left"),
        (errno.EIO, LazymergeError, r"cannot write .*\.partial: Input/output error"),
    ],
)
def test_a_write_that_fails(
    plan: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[LazymergeError],
    message: str,
) -> None:
    if plan.execution.kernels == "native":
        pytest.skip("writes are the kernels' own")
    real = os.pwrite
    calls = Counter[str]()

    def fail(*arguments: Any) -> int:
        calls["pwrite"] += 1
        if calls["pwrite"] > len(NAMES) * moves_per_tensor(plan) // 2 + 2:
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(kind, match=message):
            run_plan(plan, tmp_path / "out")
    assert_can_be_resumed(plan, tmp_path, tmp_path / "out", kept=True)


@needs_kernels
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (DoesNotFitError, r"no room for .*\.partial: No space left .*4000 bytes .*; free some"),
        (LazymergeError, r"cannot write .*\.partial: Illegal seek"),
    ],
)
def test_a_write_of_the_kernels_that_fails(
    plan: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[LazymergeError],
    message: str,
) -> None:
    """Into a device that is always full, and into a pipe."""
    plan = plan.with_resources(replace(RESOURCES, kernels="native"))
    real = ShardWriter.place
    calls = Counter[str]()
    ends = os.pipe()
    full = os.open("/dev/full", os.O_WRONLY)

    def elsewhere(self: ShardWriter, tensor: str) -> tuple[int, int]:
        descriptor, offset = real(self, tensor)
        calls["place"] += 1
        if calls["place"] > len(NAMES) * moves_per_tensor(plan) // 2 + 2:
            descriptor = full if kind is DoesNotFitError else ends[1]
        return descriptor, offset

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "place", elsewhere)
        with pytest.raises(kind, match=message):
            run_plan(plan, tmp_path / "out")
    for descriptor in (full, *ends):
        os.close(descriptor)
    assert_can_be_resumed(plan, tmp_path, tmp_path / "out", kept=True)


def test_what_does_not_fit_beside_what_the_process_holds(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before anything is written; with fewer workers, where that is enough."""
    needed = plan.memory.projected_bytes - plan.memory.reserved_bytes
    monkeypatch.setattr(run_module, "resident_bytes", lambda: plan.memory.limit_bytes)
    with pytest.raises(DoesNotFitError, match="with one worker, the limit is 4"):
        run_plan(plan, tmp_path / "out")
    assert_nothing_is_left(tmp_path)
    room = plan.memory.limit_bytes - needed - 1_000_000  # for the graph's nodes
    monkeypatch.setattr(run_module, "resident_bytes", lambda: room)
    run_plan(plan, tmp_path / "out", fsync=False)
    manifest = json.loads((tmp_path / "out" / "lazymerge.json").read_text())
    assert manifest["memory"]["reserved_bytes"] >= room


def test_a_tokenizer_file_that_has_gone(plan: Plan, tmp_path: Path) -> None:
    """All tensors are done by then; when it is there again the rest takes no time."""
    tokenizer = tmp_path / "base" / "tokenizer.json"
    content = tokenizer.read_bytes()
    tokenizer.unlink()
    with pytest.raises(LazymergeError, match=r"base/tokenizer\.json: No such file"):
        run_plan(plan, tmp_path / "out")
    tokenizer.write_bytes(content)
    report = run_plan(plan, tmp_path / "out")
    assert (report.resumed_tensors, report.bytes_written) == (len(NAMES), 0)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == content
    assert digests_in(tmp_path / "out") == digests_of_tensors(plan, tmp_path / "anew")


def test_what_others_put_there_meanwhile_stays(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "deeper" / "out"

    def fail(blocks: int) -> None:
        (out / "notes.txt").write_text("mine")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_plan(plan, out, observer=Recorder(fail))
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_a_folder_that_was_there_stays(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    def fail(blocks: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_plan(plan, tmp_path / "out", observer=Recorder(fail))
    assert list((tmp_path / "out").iterdir()) == []


def test_an_earlier_output_is_replaced_only_when_asked(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_plan(plan, out, fsync=False)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run_plan(plan, out).bytes_written == 0  # it is complete
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    single = make_plan(plan.recipe, RESOURCES)
    with pytest.raises(InputError, match="is not empty"):
        run_plan(single, out)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    run_plan(single, out, fsync=False, overwrite=True)
    assert [path.name for path in sorted(out.glob("*.safetensors*"))] == ["model.safetensors"]


@pytest.mark.parametrize("model", ["base", "b"])
def test_an_input_is_never_the_output(plan: Plan, tmp_path: Path, model: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / model)
    before = (tmp_path / model / "model.safetensors").read_bytes()
    for output in (tmp_path / model, tmp_path / "link"):
        with pytest.raises(InputError, match="is the folder of an input model"):
            run_plan(plan, output, overwrite=True)
    assert (tmp_path / model / "model.safetensors").read_bytes() == before


def test_what_outgrows_the_page_cache_is_let_out_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every input byte once, after it has been merged; the output is the same."""
    write_models(tmp_path)
    plan = plan_of(tmp_path, RECIPES["ties"], {}, Resources(4 << 30, workers=2))
    kept = digests_of_tensors(plan, tmp_path / "kept")
    forgotten: list[tuple[int, int]] = []
    real = os.posix_fadvise

    def advise(descriptor: int, first: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            forgotten.append((first, length))
        real(descriptor, first, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    assert digests_of_tensors(plan, tmp_path / "again") == kept
    assert forgotten == []
    monkeypatch.setattr(workforce, "available_memory_bytes", lambda: 1000)
    for read_mode in ("pread", "mmap"):
        forgotten.clear()
        execution = replace(plan.execution, read_mode=read_mode)
        changed = replace(plan, execution=execution)
        assert digests_of_tensors(changed, tmp_path / read_mode) == kept
        reads = [read for task in plan.tasks for read in plan.graph.reads_of(task.write.id)]
        assert sum(length for _, length in forgotten) == sum(r.tensor.size_bytes for r in reads)


def digests_of_tensors(plan: Plan, output: Path) -> list[str]:
    run_module.run_plan(plan, output, fsync=False)
    return digests_in(output)


def digests_in(output: Path) -> list[str]:
    manifest = json.loads((output / "lazymerge.json").read_text())
    return [tensor["checksum"] for tensor in manifest["tensors"].values()]
