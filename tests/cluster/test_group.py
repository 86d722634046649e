"""Dividing a plan into groups, and making one of them without a cluster."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lazymerge
import pytest
import yaml
from cluster_cases import write_models, write_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from lazymerge.cluster import group as group_module
from lazymerge.cluster import worker
from lazymerge.cluster import worker as worker_module
from lazymerge.cluster.destination import token_path
from lazymerge.cluster.group import Division, Group, Terms
from lazymerge.cluster.worker import make_group
from lazymerge.engine.plan import Plan
from lazymerge.engine.stamps import stamps_of
from lazymerge.errors import DoesNotFitError, InputError, LazymergeError
from lazymerge.methods.plugins import plugin_digest
from lazymerge.output.layout import shard_header
from lazymerge.version import __version__


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_models(root)
    return write_recipe(root / "recipe.yml", root)


@pytest.fixture
def plan(recipe: Path) -> Plan:
    return lazymerge.plan(recipe, max_shard_size=150_000)


def terms(folder: Path, **more: object) -> Terms:
    given: dict[str, object] = {
        "token": "abc",
        "folder": str(folder),
        "limit_bytes": None,
        "threads": 2,
        "syncs": False,
        "strict": False,
        "forgets": False,
        "versions": {"lazymerge": __version__},
    }
    return Terms(**{**given, **more})  # type: ignore[arg-type]


def divide(plan: Plan, folder: Path, workers: int = 2, **more: object) -> Division:
    return Division(plan, plan.tasks, workers, stamps_of(plan), terms(folder, **more))


def begun(plan: Plan, folder: Path) -> None:
    """The output as the coordinator has it before any group is given away."""
    folder.mkdir()
    token_path(folder, "abc").parent.mkdir()
    token_path(folder, "abc").touch()
    for shard in plan.shards:
        data = shard_header(shard)
        (folder / f"{shard.file}.partial").write_bytes(data.ljust(shard.size_bytes, b"\0"))


@settings(deadline=None, max_examples=30, print_blob=True)
@given(workers=st.integers(1, 64), least=st.integers(1, 400_000), shard=st.integers(1, 500_000))
def test_every_tensor_is_in_one_group(recipe: Path, workers: int, least: int, shard: int) -> None:
    plan = lazymerge.plan(recipe, max_shard_size=shard)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_module, "LEAST_GROUP_BYTES", least)
        division = divide(plan, Path("/nowhere"), workers)
    groups = [division.group(number) for number in range(len(division))]
    names = Counter(t.name for group in groups for t in group.placements)
    assert names == Counter(tensor.name for tensor in plan.tensors)
    shards = {shard.file: shard for shard in plan.shards}
    for number, group in enumerate(groups):
        assert group.number == number
        assert [t.name for t in group.placements] == division.names(number)
        assert set(group.placements) <= set(shards[group.file].tensors)
        assert group.file_bytes == shards[group.file].size_bytes
        assert {write.name for write in group.graph.writes} == set(division.names(number))
        assert group.work_bytes <= max(least, plan.bytes_read) or len(group.tasks) == 1
    total = plan.bytes_read + sum(t.size_bytes for s in plan.shards for t in s.tensors)
    assert sum(group.work_bytes for group in groups) == total


def test_far_larger_tensors_come_first(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "LEAST_GROUP_BYTES", 200_000)
    division = divide(plan, Path("/nowhere"), 100)
    assert division.names(0) == ["lm_head.weight"]


def test_a_group_is_made_in_place_by_any_process(plan: Plan, tmp_path: Path) -> None:
    """Groups travel as pickles; made in any order, some twice, they give what a run gives."""
    lazymerge.run(plan, tmp_path / "run", fsync=False)
    out = tmp_path / "out"
    begun(plan, out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_module, "LEAST_GROUP_BYTES", 100_000)
        division = divide(plan, out)
    assert len(division) > 5
    checksums = {}
    for number in [*reversed(range(len(division))), 2, 0]:
        result = make_group(pickle.loads(pickle.dumps(division.group(number))))
        assert result.number == number
        assert result.bytes_read > 0
        assert [t.name for t in result.tensors] == division.names(number) or result.tensors
        checksums |= {tensor.name: tensor.checksum for tensor in result.tensors}
    for shard in plan.shards:
        made = (out / f"{shard.file}.partial").read_bytes()
        assert made == (tmp_path / "run" / shard.file).read_bytes()
    manifest = yaml.safe_load((tmp_path / "run" / "lazymerge.json").read_text())
    assert checksums == {name: t["checksum"] for name, t in manifest["tensors"].items()}


def test_a_worker_stops_when_the_run_has_ended(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it was stopped while others made the group, and goes on after that."""
    out = tmp_path / "out"
    begun(plan, out)
    monkeypatch.setattr(worker_module, "TOLD_SECONDS", 0.0)

    def ended(*_: object) -> None:
        token_path(out, "abc").unlink(missing_ok=True)
        time.sleep(0.3)

    monkeypatch.setattr(worker_module._Told, "moved", ended)
    with pytest.raises(LazymergeError, match=r"cluster-abc is gone: the run has ended"):
        make_group(divide(plan, out).group(0))


@pytest.mark.parametrize(
    ("asked", "of_worker", "limit"),
    [(None, 1000, 600), (500, None, 500), (500, 1000, 500), (5000, 1000, 800)],
)
def test_a_worker_keeps_to_both_limits(
    asked: int | None, of_worker: int | None, limit: int
) -> None:
    assert worker._limit_bytes(asked, of_worker) == limit


def test_groups_carry_what_they_need_and_no_more(plan: Plan) -> None:
    division = divide(plan, Path("/nowhere"), 64)
    one = division.group(0)
    assert len(one.graph) < len(plan.graph)
    assert set(one.stamps) == {
        f"{read.folder}/{read.tensor.file}" for w in one.graph.writes for read in reads(one, w.id)
    }


def reads(group: Group, write: str) -> list[object]:
    return list(group.graph.reads_of(write))


class TestRefusals:
    """A worker that sees something else than the run means writes nothing."""

    @pytest.fixture
    def out(self, plan: Plan, tmp_path: Path) -> Path:
        begun(plan, tmp_path / "out")
        return tmp_path / "out"

    @pytest.fixture
    def group(self, plan: Plan, out: Path) -> Group:
        return divide(plan, out).group(0)

    def untouched(self, group: Group, out: Path) -> bool:
        path = out / f"{group.file}.partial"
        data = path.read_bytes()
        return all(not any(data[t.start : t.stop_exclusive]) for t in group.placements)

    def test_no_such_folder(self, group: Group, tmp_path: Path) -> None:
        elsewhere = replace(group, folder=str(tmp_path / "elsewhere"))
        with pytest.raises(LazymergeError, match=r"filesystem that all workers share.*s3://"):
            make_group(elsewhere)

    def test_another_run_s_folder(self, group: Group, out: Path) -> None:
        """Of the same name on another machine, with the same merge in it."""
        token_path(out, "abc").rename(token_path(out, "def"))
        with pytest.raises(LazymergeError, match="is not the file that the run writes"):
            make_group(group)
        assert self.untouched(group, out)

    def test_another_file(self, group: Group, out: Path) -> None:
        (out / f"{group.file}.partial").write_bytes(b"short")
        with pytest.raises(LazymergeError, match="is not the file that the run writes"):
            make_group(group)

    def test_a_link(self, group: Group, out: Path, tmp_path: Path) -> None:
        path = out / f"{group.file}.partial"
        path.rename(tmp_path / "precious")
        path.symlink_to(tmp_path / "precious")
        before = (tmp_path / "precious").read_bytes()
        with pytest.raises(LazymergeError, match="cannot write"):
            make_group(group)
        assert (tmp_path / "precious").read_bytes() == before

    def test_another_version(self, group: Group, out: Path) -> None:
        with pytest.raises(InputError, match=r"lazymerge is .* here, and 0.0.1 where"):
            make_group(replace(group, versions={"lazymerge": "0.0.1"}))
        with pytest.raises(InputError, match="no-such-package is not there here"):
            make_group(replace(group, versions={"no-such-package": "1"}))
        assert self.untouched(group, out)

    def test_an_input_that_is_another_file(self, group: Group, out: Path) -> None:
        stamps = {path: (size, time + 1) for path, (size, time) in group.stamps.items()}
        with pytest.raises(LazymergeError, match="was changed while it was merged"):
            make_group(replace(group, stamps=stamps))
        assert self.untouched(group, out)

    def test_an_input_that_changes(
        self, group: Group, recipe: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On the worker's own disk: nobody else would notice."""
        path, (_, modified_ns) = next(iter(group.stamps.items()))

        def change(*_: object) -> None:
            os.utime(path, ns=(0, 0))

        monkeypatch.setattr(worker_module._Told, "moved", change)
        try:
            with pytest.raises(LazymergeError, match="was changed while it was merged"):
                make_group(group)
        finally:
            os.utime(path, ns=(modified_ns, modified_ns))

    def test_too_little_memory(self, group: Group, out: Path) -> None:
        with pytest.raises(DoesNotFitError, match="the smallest limit that works"):
            make_group(replace(group, limit_bytes=1 << 20))
        assert self.untouched(group, out)

    @pytest.fixture
    def forgotten(self) -> Iterator[None]:
        """Plugins that a test loads are gone after it."""
        before = set(sys.modules)
        yield
        for name in set(sys.modules) - before:
            if name.startswith("lazymerge_plugin_"):
                del sys.modules[name]

    @pytest.mark.usefixtures("forgotten")
    def test_plugins_that_are_not_the_same(self, group: Group, tmp_path: Path) -> None:
        plugin = tmp_path / "mine.py"
        plugin.write_text("A = 1\n")
        digest = plugin_digest(plugin)
        make_group(replace(group, plugins=[(str(plugin), digest)]))
        plugin.write_text("A = 2\n")
        with pytest.raises(InputError, match=r"mine\.py is another file here"):
            make_group(replace(group, plugins=[(str(plugin), digest)]))
        with pytest.raises(InputError, match=r"mine\.py has changed since this process loaded it"):
            make_group(replace(group, plugins=[(str(plugin), plugin_digest(plugin))]))
        with pytest.raises(InputError, match="there is no plugin"):
            make_group(replace(group, plugins=[(str(tmp_path / "gone.py"), digest)]))

    def test_errors_name_the_machine(self, group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("socket.gethostname", lambda: "node17")
        with pytest.raises(InputError, match=r"^node17: "):
            make_group(replace(group, versions={"lazymerge": "0.0.1"}))
