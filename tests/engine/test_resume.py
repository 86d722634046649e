"""Going on with unfinished outputs: the same bytes as without the interruption, or a refusal that
names what has changed."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lazymerge
import pytest
import torch
import yaml
from lazymerge.engine import plan as plan_module
from lazymerge.engine import saved_plans, streaming, torch_loading
from lazymerge.engine import unfinished as unfinished_module
from lazymerge.engine.inputs import InputFiles
from lazymerge.engine.plan import Plan
from lazymerge.engine.report import Silent
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.engine.scheduler import Scheduler
from lazymerge.engine.unfinished import difference, plan_of_unfinished
from lazymerge.engine.workforce import Taken
from lazymerge.errors import DoesNotFitError, InputError, LazymergeError
from lazymerge.output import lock as lock_module
from lazymerge.output.folder import is_unfinished
from lazymerge.output.journal import JOURNAL_PATH, read_journal
from lazymerge.output.lock import LOCK_PATH, LockedError, LockLostError, OutputLock
from lazymerge.output.manifest import MANIFEST_NAME, MERGE_PATH, read_document
from safetensors.torch import load_file, save_file

from conftest import write_checkpoint
from open_files import open_files

NAMES = [f"model.layers.{number}.w" for number in range(6)]


class Stop(Exception):
    """What ends a run early here."""


class Stopper(Silent):
    """Ends a run when so many tensors are finished; keeps what it is told."""

    def __init__(self, after: int) -> None:
        self._after = after
        self.tensors: list[str] = []
        self.notes: list[str] = []
        self.before: tuple[int, int, int] | None = None

    def finished(self, tensor: str) -> None:
        self.tensors.append(tensor)
        if len(self.tensors) == self._after:
            raise Stop

    def resumed(self, bytes_read: int, bytes_written: int, tensors: int) -> None:
        self.before = (bytes_read, bytes_written, tensors)

    def noted(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Three models of six tensors, merged by dare_ties (random masks, two passes)."""
    generator = torch.Generator().manual_seed(3)
    for model in ("base", "a", "b"):
        tensors = {name: torch.randn(50, 40, generator=generator) for name in NAMES}
        write_checkpoint(tmp_path / model, tensors, {"model_type": "llama"})
    path = tmp_path / "recipe.yml"
    path.write_text(
        yaml.safe_dump(
            {
                "merge_method": "dare_ties",
                "base_model": str(tmp_path / "base"),
                "models": [
                    {"model": str(tmp_path / m), "parameters": {"weight": 0.5, "density": 0.6}}
                    for m in ("a", "b")
                ],
            }
        )
    )
    return path


def planned(recipe: Path, **options: Any) -> Plan:
    return lazymerge.plan(recipe, workers=1, max_shard_size=20_000, **options)


def begin(recipe: Path, out: Path, after: int = 3, **options: Any) -> Plan:
    """A run that ends when so many tensors are finished."""
    plan = planned(recipe)
    with pytest.raises(Stop):
        run_plan(plan, out, observer=Stopper(after), **options)
    assert is_unfinished(out)
    return plan


def checksums(out: Path) -> dict[str, str]:
    document = json.loads((out / MANIFEST_NAME).read_text())
    return {name: tensor["checksum"] for name, tensor in document["tensors"].items()}


@pytest.mark.parametrize("after", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("recheck", [False, True])
def test_the_rest_is_made_and_nothing_twice(
    recipe: Path, tmp_path: Path, after: int, recheck: bool
) -> None:
    out = tmp_path / "out"
    plan = begin(recipe, out, after)
    observer = Stopper(99)
    report = run_plan(plan, out, observer=observer, recheck=recheck)
    assert report.resumed_tensors == after
    assert observer.tensors == NAMES[after:]
    assert observer.before is not None
    assert observer.before[1:] == (after * 50 * 40 * 4, after)
    assert len(observer.notes) == recheck
    run_plan(plan, tmp_path / "whole")
    assert checksums(out) == checksums(tmp_path / "whole")
    assert sorted(path.name for path in out.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )
    for shard in plan.shards:
        assert (out / shard.file).read_bytes() == (tmp_path / "whole" / shard.file).read_bytes()


def test_with_other_memory_workers_and_way_of_reading(recipe: Path, tmp_path: Path) -> None:
    begin(recipe, tmp_path / "out")
    plan = plan_of_unfinished(tmp_path / "out", Resources(2 << 30, workers=3, read_mode="mmap"))
    run_plan(plan, tmp_path / "out")
    run_plan(plan, tmp_path / "whole")
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")


def test_from_another_folder(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe that names its models relative to where it was run."""
    monkeypatch.chdir(tmp_path)
    recipe.write_text(recipe.read_text().replace(f"{tmp_path}/", ""))
    begin(Path("recipe.yml"), Path("out"))
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    report = lazymerge.resume("../out")
    assert report.resumed_tensors == 3
    monkeypatch.chdir(tmp_path)
    run_plan(planned(Path("recipe.yml")), "whole")
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")


def test_data_that_is_lost_is_noticed_after_a_restart(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    plan = begin(recipe, out)
    monkeypatch.setattr("lazymerge.output.recovery.boot_id", lambda: "another")
    shard = plan.shards[0]
    path = out / shard.file
    with path.open("r+b") as stream:
        stream.seek(shard.tensors[0].start)
        stream.write(bytes(1000))
    observer = Stopper(99)
    assert run_plan(plan, out, observer=observer).resumed_tensors == 2
    assert observer.notes == [
        "reading 3 tensors of an earlier run before believing them",
        "1 tensor of an earlier run is not whole, and made again",
    ]
    run_plan(plan, tmp_path / "whole")
    assert checksums(out) == checksums(tmp_path / "whole")


def change_a_line(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("weight: 0.5", "weight: 0.25", 1))


def add_a_line(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "dtype: float16\n")


def change_a_model(recipe: Path) -> None:
    tensors = {name: torch.zeros(50, 40) for name in NAMES}
    write_checkpoint(recipe.parent / "a", tensors)


def touch_a_model(recipe: Path) -> None:
    os.utime(recipe.parent / "a" / "model.safetensors", (1, 1))


def change_a_header(recipe: Path) -> None:
    path = recipe.parent / "b" / "model.safetensors"
    save_file(load_file(path), path, metadata={"made by": "somebody"})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_a_line, r"line \d+ was '.*weight: 0\.5', now it is '.*weight: 0\.25'"),
        (add_a_line, r"line \d+ is new: 'dtype: float16'"),
        (touch_a_model, r"a/model\.safetensors has changed: its time of modification is not"),
        (change_a_model, r"a/model\.safetensors has changed: its time of modification is not"),
        (change_a_header, r"b/model\.safetensors has changed: its size is not"),
    ],
)
def test_what_has_changed_is_named(
    recipe: Path, tmp_path: Path, change: Callable[[Path], None], named: str
) -> None:
    out = tmp_path / "out"
    begin(recipe, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    change(recipe)
    if change not in (change_a_line, add_a_line):  # the recipe is not read again
        with pytest.raises(InputError, match=f"cannot be resumed: .*{named}.*\n.*--overwrite"):
            lazymerge.resume(out)
    with pytest.raises(InputError, match=f"not of this plan: .*{named}.*\n.*--overwrite"):
        run_plan(planned(recipe), out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    run_plan(planned(recipe), out, overwrite=True)
    assert not is_unfinished(out)


def test_another_seed_shard_size_and_device(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin(recipe, out)
    with pytest.raises(InputError, match="its seed was 0, now it is 5"):
        run_plan(planned(recipe, seed=5), out)
    with pytest.raises(
        InputError, match=r"in shards of at most 20,000, now it is .* 5,000,000,000"
    ):
        run_plan(lazymerge.plan(recipe), out)
    with pytest.raises(InputError, match="leave --device cuda out"):
        plan_of_unfinished(out, Resources(device="cuda"))


def test_a_tensor_larger_than_a_shard_may_be(recipe: Path, tmp_path: Path) -> None:
    """The limit is kept, not what it led to: two small tensors in one shard, beside a large one
    that has its own, would else be laid out otherwise when planned again."""
    for model in ("base", "a", "b"):
        tensors = {f"t{n}": torch.full((size,), float(n)) for n, size in enumerate((2, 2, 2, 90))}
        write_checkpoint(tmp_path / model, tensors)
    plan = lazymerge.plan(recipe, workers=1, max_shard_size=16)
    assert len(plan.shards) == 3
    with pytest.raises(Stop):
        run_plan(plan, tmp_path / "out", observer=Stopper(1))
    assert lazymerge.resume(tmp_path / "out").resumed_tensors == 1
    assert lazymerge.verify(tmp_path / "out", recompute=9).problems == ()
    plan.save(tmp_path / "plan.json")
    assert lazymerge.plan(tmp_path / "plan.json").fingerprint == plan.fingerprint


def test_models_of_ones_home(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe.write_text(recipe.read_text().replace(f"{tmp_path}/", "~/"))
    begin(recipe, tmp_path / "out")
    assert lazymerge.resume(tmp_path / "out").resumed_tensors == 3


def test_another_torch(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = begin(recipe, tmp_path / "out")
    plan.save(tmp_path / "plan.json")
    for module in (plan_module, saved_plans, unfinished_module):
        monkeypatch.setattr(module, "torch_version", lambda: "1.0")
    with pytest.raises(InputError, match=r"was written with torch .*, this is 1\.0"):
        lazymerge.resume(tmp_path / "out")
    with pytest.raises(InputError, match=r"it was begun by torch .*, this is 1\.0"):
        run_plan(planned(recipe), tmp_path / "out")
    with pytest.raises(InputError, match=r"was made with torch .*, this is 1\.0; plan"):
        lazymerge.plan(tmp_path / "plan.json")


def test_comments_make_no_difference(recipe: Path, tmp_path: Path) -> None:
    begin(recipe, tmp_path / "out")
    recipe.write_text("# tried on Monday\n\n" + recipe.read_text().replace("\n", "  # so\n", 1))
    beginning = read_document(tmp_path / "out" / MERGE_PATH)
    assert "recipe has changed" not in difference(beginning, planned(recipe))
    assert run_plan(planned(recipe), tmp_path / "out").resumed_tensors == 3


def test_a_lock_that_is_taken_away_ends_the_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is there, which may be another's by now, stays."""
    monkeypatch.setattr(lock_module, "TOUCH_SECONDS", 0.01)

    class Thief(Stopper):
        def finished(self, tensor: str) -> None:
            (tmp_path / "out" / LOCK_PATH).unlink(missing_ok=True)
            time.sleep(0.5)

    with pytest.raises(LockLostError):
        run_plan(planned(recipe), tmp_path / "out", observer=Thief(99))
    assert (tmp_path / "out" / JOURNAL_PATH).exists()
    monkeypatch.undo()
    assert run_plan(planned(recipe), tmp_path / "out").resumed_tensors > 0


def test_a_pipe_in_the_locks_place_goes(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = begin(recipe, out)
    os.mkfifo(out / LOCK_PATH)
    assert run_plan(plan, out).resumed_tensors > 0


@pytest.mark.parametrize("name", [JOURNAL_PATH, MERGE_PATH])
def test_pipes_are_not_waited_for(recipe: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    plan = begin(recipe, out)
    (out / name).unlink(missing_ok=True)
    os.mkfifo(out / name)
    for attempt in (lambda: lazymerge.resume(out), lambda: run_plan(plan, out)):
        with pytest.raises(LazymergeError):
            attempt()


def test_contents_compared_from_now_on(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = begin(recipe, out)
    observer = Stopper(1)
    with pytest.raises(Stop):
        run_plan(plan, out, observer=observer, hash_inputs=True)
    assert any("contents are compared from now on" in note for note in observer.notes)
    assert read_document(out / MERGE_PATH)["input_checksums"]
    assert run_plan(plan, out).resumed_tensors == 4


def test_a_constructor_that_fails_leaves_no_descriptor(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_files(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", fail)
    with pytest.raises(DoesNotFitError):
        run_plan(planned(recipe), tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()
    assert open_files(tmp_path) == before


def test_another_version(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    begin(recipe, out)
    document = json.loads((out / MERGE_PATH).read_text())
    (out / MERGE_PATH).write_text(json.dumps({**document, "lazymerge": "0.0.1"}))
    with pytest.raises(InputError, match=r"was written by lazymerge 0\.0\.1, this is"):
        lazymerge.resume(out)
    document["fingerprint"] = "f" * 32
    (out / MERGE_PATH).write_text(json.dumps(document))
    with pytest.raises(InputError, match="has a plugin changed"):
        lazymerge.resume(out)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 1, "recipe": 3}', '{"format": 7}']
)
def test_a_damaged_beginning(recipe: Path, tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    plan = begin(recipe, out)
    (out / MERGE_PATH).write_text(text)
    for attempt in (lambda: lazymerge.resume(out), lambda: run_plan(plan, out)):
        with pytest.raises(InputError, match=r"merge\.json"):
            attempt()
    run_plan(plan, out, overwrite=True)


def test_a_journal_that_is_gone_costs_time_and_nothing_else(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = begin(recipe, out)
    (out / JOURNAL_PATH).unlink()
    assert run_plan(plan, out).resumed_tensors == 0
    run_plan(plan, tmp_path / "whole")
    assert checksums(out) == checksums(tmp_path / "whole")


def test_content_that_changed_behind_size_and_time(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = begin(recipe, out, hash_inputs=True)
    path = tmp_path / "a" / "model.safetensors"
    assert path.name in str(read_document(out / MERGE_PATH)["input_checksums"])
    times = path.stat()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(InputError, match=r"a/model\.safetensors has changed .*its content"):
        run_plan(plan, out)
    path.write_bytes(whole)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    run_plan(plan, out)
    assert str(path) in json.loads((out / MANIFEST_NAME).read_text())["input_checksums"]


def test_inf_of_an_earlier_run_is_told(recipe: Path, tmp_path: Path) -> None:
    tensors = {name: torch.zeros(50, 40) for name in NAMES}
    tensors[NAMES[0]] += torch.inf
    write_checkpoint(tmp_path / "a", tensors)
    plan = begin(recipe, tmp_path / "out")
    with pytest.raises(LazymergeError, match=f"{NAMES[0]} of the merge holds inf or nan"):
        run_plan(plan, tmp_path / "out", strict=True)
    (found,) = run_plan(plan, tmp_path / "out").nonfinite
    assert found.name == NAMES[0]
    assert found.inputs[str(tmp_path / "a")] == found.elements == 2000


def test_while_another_process_is_at_it(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = begin(recipe, out)
    lock = OutputLock(out)
    for overwrite in (False, True):
        with pytest.raises(LockedError, match=f"process {os.getpid()} on"):
            run_plan(plan, out, overwrite=overwrite)
    lock.release()
    run_plan(plan, out)


def test_an_output_that_is_complete_stays(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = planned(recipe)
    run_plan(plan, out)
    observer = Stopper(99)
    report = run_plan(plan, out, observer=observer)
    assert (report.bytes_written, report.resumed_tensors) == (0, 6)
    assert "complete" in observer.notes[0]
    with pytest.raises(InputError, match="is complete; lazymerge verify checks it"):
        plan_of_unfinished(out)
    with pytest.raises(InputError, match="holds no unfinished merge"):
        plan_of_unfinished(tmp_path)


def test_an_output_without_one_of_its_files_is_not_complete(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = planned(recipe)
    run_plan(plan, out)
    (out / plan.shards[1].file).unlink()
    with pytest.raises(InputError, match="is not empty"):
        run_plan(plan, out)


def test_other_mistakes_leave_what_is_finished(recipe: Path, tmp_path: Path) -> None:
    """Credentials that expire after an hour; certificates that a resumed run lacks."""
    out = tmp_path / "out"

    class Expires(Silent):
        def finished(self, tensor: str) -> None:
            raise InputError("may not be read")

    with pytest.raises(InputError, match="may not be read"):
        run_plan(planned(recipe), out, observer=Expires())
    kept = lazymerge.status(out).tensors
    assert kept > 0
    with pytest.raises(InputError, match="no certificates"):
        run_plan(planned(recipe), out, workforce=RefusingWorkforce())
    assert lazymerge.status(out).tensors == kept


class RefusingWorkforce:
    """A cluster that is not to be had."""

    is_elsewhere = True

    def make(self, *_: object, **__: object) -> Taken:
        raise InputError("no certificates")


def test_an_input_at_fault_leaves_nothing(recipe: Path, tmp_path: Path) -> None:
    """When it has been put right, it is another merge."""
    for model in ("base", "a", "b"):
        tensors: dict[str, torch.Tensor] = {name: torch.zeros(50, 40) for name in NAMES}
        tensors["z.positions"] = torch.tensor([1, 2 if model == "a" else 3])
        write_checkpoint(tmp_path / model, tensors)
    with pytest.raises(InputError, match=r"z\.positions"):
        run_plan(planned(recipe), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dot_lazymerge_that_leads_elsewhere(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = begin(recipe, out)
    shutil.move(out / ".lazymerge", tmp_path / "elsewhere")
    (out / ".lazymerge").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"\.lazymerge is no folder"):
        run_plan(plan, out)


def test_a_worker_that_does_not_stop_is_not_waited_for(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the command's own process, which ends anyway. What it is writing is kept."""
    monkeypatch.setattr(torch_loading, "is_own_process", True)
    monkeypatch.setattr(streaming, "PATIENCE_SECONDS", 0.2)
    stopped: list[float] = []
    real = Scheduler.stop

    def stop(self: Scheduler, error: BaseException | None = None) -> None:
        stopped.append(time.monotonic())
        real(self, error)

    class Slow(Stopper):
        def finished(self, tensor: str) -> None:
            if stopped:
                return
            os.kill(os.getpid(), 2)
            time.sleep(1.5)

    monkeypatch.setattr(Scheduler, "stop", stop)
    plan = planned(recipe)
    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, tmp_path / "out", observer=Slow(99))
    assert time.monotonic() - stopped[0] < 1.0
    assert len(read_journal(tmp_path / "out").finished) == 1
    time.sleep(1.5)  # it ends its tensor
    monkeypatch.undo()
    run_plan(replace(plan), tmp_path / "out")


def test_links_that_somebody_has_put_there_are_not_written_through(
    recipe: Path, tmp_path: Path
) -> None:
    """An unfinished output may come from a stranger, too."""
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "1_Pooling").mkdir()
    (tmp_path / "base" / "1_Pooling" / "config.json").write_text("{}")
    out = tmp_path / "out"
    plan = begin(recipe, out)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("mine")
    names = ["config.json", "README.md", "tokenizer.json", MANIFEST_NAME, plan.shards[-1].file]
    for name in names:
        (out / f"{name}.partial").unlink(missing_ok=True)
        (out / f"{name}.partial").symlink_to(mine / "file")
        if name not in (MANIFEST_NAME, plan.shards[-1].file):
            (out / name).symlink_to(mine / "file")
    (out / "1_Pooling").symlink_to(mine)
    run_plan(plan, out)
    assert [path.name for path in mine.iterdir()] == ["file"]
    assert (mine / "file").read_text() == "mine"
    assert not any(path.is_symlink() for path in out.rglob("*"))


def test_shards_of_a_run_that_did_not_sync_are_synced(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    plan = begin(recipe, out, 4, fsync=False)
    synced: set[str] = set()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    run_plan(plan, out)
    for shard in plan.shards:
        assert {shard.file, f"{shard.file}.partial"} & synced


def test_a_method_that_is_not_there_any_more(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(recipe, tmp_path / "out")
    document = json.loads((tmp_path / "out" / MERGE_PATH).read_text())
    document["recipe"]["text"] = document["recipe"]["text"].replace("dare_ties", "my_own")
    (tmp_path / "out" / MERGE_PATH).write_text(json.dumps(document))
    with pytest.raises(InputError, match="a method of your own needs --plugin again"):
        lazymerge.resume(tmp_path / "out")


def test_a_second_signal_ends_the_waiting(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in somebody's program, where the first waits for the worker however long it takes. What
    the worker writes to stays open, and locked, until it has ended."""
    out = tmp_path / "out"
    times: list[float] = []

    class Slow(Stopper):
        def finished(self, tensor: str) -> None:
            if not times:
                times.append(time.monotonic())
                os.kill(os.getpid(), 2)
                threading.Timer(0.3, os.kill, (os.getpid(), 2)).start()
                time.sleep(1.5)

    plan = planned(recipe)
    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, out, observer=Slow(99))
    assert 0.2 < time.monotonic() - times[0] < 1.2
    with pytest.raises(LockedError):
        run_plan(plan, out)
    time.sleep(1.8)
    assert run_plan(plan, out).resumed_tensors > 0


def test_a_shard_that_was_lost_and_made_anew_is_not_believed(recipe: Path, tmp_path: Path) -> None:
    """Its size and header are right, the journal's lines are of this boot, and its bytes are not
    there: the run that made it anew was interrupted, too."""
    out = tmp_path / "out"
    plan = lazymerge.plan(recipe, workers=1)  # one shard
    with pytest.raises(Stop):
        run_plan(plan, out, observer=Stopper(4))
    (out / f"{plan.shards[0].file}.partial").unlink()
    with pytest.raises(Stop):
        run_plan(plan, out, observer=Stopper(1))
    assert list(read_journal(out).finished) == NAMES[:1]
    assert run_plan(plan, out).resumed_tensors == 1
    run_plan(plan, tmp_path / "whole")
    assert checksums(out) == checksums(tmp_path / "whole")
    assert (out / plan.shards[0].file).read_bytes() == (
        tmp_path / "whole" / plan.shards[0].file
    ).read_bytes()


def test_a_copy_of_an_output_that_was_being_written(recipe: Path, tmp_path: Path) -> None:
    """Its journal is newer than its shards."""
    plan = lazymerge.plan(recipe, workers=1)
    copy = tmp_path / "copy"
    for after, what in ((2, "shards"), (4, "journal")):
        with pytest.raises(Stop):
            run_plan(plan, tmp_path / "out", observer=Stopper(after if what == "shards" else 2))
        if what == "shards":
            copy.mkdir()
            shutil.copy(tmp_path / "out" / "model.safetensors.partial", copy)
    shutil.copytree(tmp_path / "out" / ".lazymerge", copy / ".lazymerge")
    assert lazymerge.resume(copy).resumed_tensors == 2
    run_plan(plan, tmp_path / "whole")
    assert (copy / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_an_output_that_is_removed_under_a_run(recipe: Path, tmp_path: Path) -> None:
    """And another begun in its place: that stays as it is."""
    out = tmp_path / "out"
    plan = planned(recipe)

    class Remover(Stopper):
        def finished(self, tensor: str) -> None:
            if not self.tensors:
                shutil.rmtree(out)
                begin(recipe, out, 2)
            super().finished(tensor)

    with pytest.raises(LazymergeError):
        run_plan(plan, out, observer=Remover(99))
    assert len(read_journal(out).finished) == 2
    assert run_plan(plan, out).resumed_tensors == 2
    run_plan(plan, tmp_path / "whole")
    assert checksums(out) == checksums(tmp_path / "whole")


@pytest.mark.parametrize("name", [JOURNAL_PATH, "model-00002-of-00003.safetensors.partial"])
def test_other_names_of_a_file_do_not_change_with_it(
    recipe: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    begin(recipe, out)
    names = [path.name for path in out.glob("*.partial")]
    path = out / (name if name == JOURNAL_PATH else names[0])
    before = path.read_bytes()
    os.link(path, tmp_path / "mine")
    with pytest.raises(LazymergeError, match=r"hard links"):
        lazymerge.resume(out)
    assert (tmp_path / "mine").read_bytes() == before


def test_an_empty_manifest_is_none(recipe: Path, tmp_path: Path) -> None:
    """As a power failure leaves it of a run that did not sync."""
    out = tmp_path / "out"
    begin(recipe, out)
    (out / MANIFEST_NAME).touch()
    assert lazymerge.resume(out).resumed_tensors == 3


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2}', '{"format": 1, "lazymerge": '])
def test_a_damaged_document_says_how_to_begin_anew(recipe: Path, tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    plan = begin(recipe, out)
    (out / MERGE_PATH).write_text(text)
    with pytest.raises(InputError, match=r"to begin anew: lazymerge run \S+ -o \S+ --overwrite"):
        lazymerge.resume(out)
    with pytest.raises(InputError, match="give --overwrite to throw it away and begin anew"):
        run_plan(plan, out)
    run_plan(plan, out, overwrite=True)


def test_a_document_that_only_its_fingerprint_is_right_of(recipe: Path, tmp_path: Path) -> None:
    """It does not get into the manifest."""
    out = tmp_path / "out"
    plan = begin(recipe, out)
    document = read_document(out / MERGE_PATH)
    document.update(output=None, recipe=7, models="x", more="y" * 1000)
    (out / MERGE_PATH).write_text(json.dumps(document))
    assert run_plan(plan, out).resumed_tensors == 3
    run_plan(plan, tmp_path / "whole")
    manifests = [read_document(each / MANIFEST_NAME) for each in (out, tmp_path / "whole")]
    assert [manifests[0][key] for key in ("recipe", "models", "output")] == [
        manifests[1][key] for key in ("recipe", "models", "output")
    ]
    assert "more" not in manifests[0]


@pytest.mark.parametrize(
    "name", ["model-00001-of-00003.safetensors", "config.json", "README.md", LOCK_PATH]
)
def test_a_folder_where_a_file_belongs(recipe: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    plan = begin(recipe, out)
    (out / name).unlink(missing_ok=True)
    (out / name).mkdir()
    with pytest.raises(InputError, match=f"{name} is no regular file, and no merge has made it"):
        run_plan(plan, out)
    (out / name).rmdir()
    run_plan(plan, out)


@pytest.mark.parametrize("way", ["in place", "by renaming"])
def test_an_input_that_changes_under_the_run(recipe: Path, tmp_path: Path, way: str) -> None:
    out, path = tmp_path / "out", tmp_path / "a" / "model.safetensors"
    before, modified_ns = path.read_bytes(), path.stat().st_mtime_ns
    run_plan(planned(recipe), tmp_path / "undisturbed")
    data = bytearray(before)
    data[-1] ^= 1

    class Changer(Stopper):
        def finished(self, tensor: str) -> None:
            super().finished(tensor)
            if len(self.tensors) == 3:
                other = path if way == "in place" else path.with_name("other")
                other.write_bytes(data)
                other.replace(path)

    with pytest.raises(
        LazymergeError, match=r"a/model\.safetensors was changed while it was merged"
    ):
        run_plan(planned(recipe), out, observer=Changer(99))
    assert is_unfinished(out)
    with pytest.raises(InputError, match="has changed: its time of modification"):
        lazymerge.resume(out)
    path.write_bytes(before)
    os.utime(path, ns=(modified_ns, modified_ns))
    assert lazymerge.resume(out).resumed_tensors == 0, "nothing of that run is believed"
    for shard in planned(recipe).shards:
        made, expected = (tmp_path / name / shard.file for name in ("out", "undisturbed"))
        assert made.read_bytes() == expected.read_bytes()


def test_inputs_stay_open_while_a_worker_reads(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted twice, a run ends before its workers do; the numbers of its files are not given
    to others until then."""
    closed = threading.Event()
    running = threading.Event()
    real_close = InputFiles.close

    def close(files: InputFiles) -> None:
        real_close(files)
        closed.set()

    def work(*_: object, **__: object) -> None:
        raise streaming.AbandonedError([running])

    monkeypatch.setattr(InputFiles, "close", close)
    monkeypatch.setattr(streaming, "run_workers", work)
    with pytest.raises(KeyboardInterrupt):
        run_plan(planned(recipe), tmp_path / "out")
    assert not closed.wait(0.2)
    running.set()
    assert closed.wait(10)
