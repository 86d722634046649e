"""Parts that are merged apart give the bytes of one run; joining may be interrupted anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lazymerge.engine import splitting
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import plan_recipe_file
from lazymerge.engine.report import Silent
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.engine.saved_plans import load_plan
from lazymerge.engine.splitting import join_parts, split_plan, write_parts
from lazymerge.engine.unfinished import plan_of_unfinished
from lazymerge.engine.verification import verify_output
from lazymerge.errors import InputError
from lazymerge.output.manifest import MANIFEST_NAME, STATISTICS_NAME, read_document

from conftest import write_checkpoint

SHARD_BYTES = 30_000
PARTS = 3


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A merge with random masks into seven shards, of layers of unequal sizes."""
    generator = torch.Generator().manual_seed(5)
    for model in ("base", "a", "b"):
        tensors = {"model.embed_tokens.weight": torch.randn(64, 60, generator=generator)}
        for layer in range(9):
            for name, rows in (("q", 30), ("up", 55)):
                tensors[f"model.layers.{layer}.{name}.weight"] = torch.randn(
                    rows, 60, generator=generator
                )
        write_checkpoint(tmp_path / model, tensors)
        (tmp_path / model / "config.json").write_text('{"model_type": "llama"}')
    values = {"weight": 0.5, "density": 0.4}
    recipe = {
        "merge_method": "dare_ties",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / m), "parameters": values} for m in ("a", "b")],
        "dtype": "float32",
    }
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    return plan_recipe_file(path, Resources(4 << 30, workers=2), max_shard_bytes=SHARD_BYTES)


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the manifest and the model card, which has the folder's name."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name not in (MANIFEST_NAME, "README.md")
    }


def run_parts(paths: list[Path]) -> None:
    for path in reversed(paths):
        run_plan(load_plan(path), path.with_suffix(""), fsync=False)


@pytest.mark.parametrize("count", [1, 2, PARTS])
def test_parts_give_the_bytes_of_one_run(plan: Plan, tmp_path: Path, count: int) -> None:
    run_plan(plan, tmp_path / "one" / "out", fsync=False)
    out = tmp_path / "parts" / "out"
    paths = write_parts(plan, out, count)
    assert [path.name for path in paths] == [f"part-{n + 1}-of-{count}.json" for n in range(count)]
    run_parts(paths)
    joined = join_parts(out, fsync=False)
    assert (joined.parts, joined.tensors) == (count, len(plan.tensors))
    assert contents(out) == contents(tmp_path / "one" / "out")
    assert (out / "README.md").read_text() == (tmp_path / "one/out/README.md").read_text()
    one, several = (read_document(f / MANIFEST_NAME) for f in (tmp_path / "one" / "out", out))
    assert several["run"].pop("parts") == count
    for key in ("tensors", "shards", "files", "fingerprint", "output", "recipe", "models"):
        assert one[key] == several[key], key
    for key in ("bytes_read", "bytes_written"):
        assert one["run"][key] == several["run"][key]
    assert verify_output(out, recompute=3, seed=1).problems == ()
    # and to the same plan it is complete
    assert run_plan(plan, out).resumed_tensors == len(plan.tensors)


def test_work_is_balanced(plan: Plan) -> None:
    for count in range(1, len(plan.shards) + 1):
        parts = split_plan(plan, count)
        assert sum((part.shards for part in parts), ()) != ()
        files = sorted(shard.file for part in parts for shard in part.shards)
        assert files == [shard.file for shard in plan.shards]
        assert sum(part.bytes_read for part in parts) == plan.bytes_read
        sizes = [part.bytes_written for part in parts]
        assert max(sizes) - min(sizes) <= max(shard.size_bytes for shard in plan.shards)
        assert len({part.fingerprint for part in parts} | {plan.fingerprint}) == count + 1


def test_more_parts_than_shards(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the output has \d+ shards.*--max-shard-size"):
        write_parts(plan, tmp_path / "out", len(plan.shards) + 1)
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    paths = write_parts(plan, out, PARTS)
    run_plan(load_plan(paths[1]), paths[1].with_suffix(""), fsync=False)
    with pytest.raises(InputError) as caught:
        join_parts(out)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert f"lazymerge run {out}/part-1-of-3.json -o {out}/part-1-of-3" in lines[0]
    assert "part-3-of-3 has not been run" in lines[1]
    run_parts([paths[0], paths[2]])
    shard = next((out / "part-2-of-3").glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name} is missing"):
        join_parts(out)


def test_a_part_is_resumed(plan: Plan, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class Stopper(Silent):
        def finished(self, tensor: str) -> None:
            raise Stop

    out = tmp_path / "out"
    paths = write_parts(plan, out, PARTS)
    part = paths[0].with_suffix("")
    with pytest.raises(Stop):
        run_plan(load_plan(paths[0], Resources(workers=1)), part, fsync=False, observer=Stopper())
    with pytest.raises(InputError, match="part-1-of-3 is not complete"):
        join_parts(out)
    report = run_plan(plan_of_unfinished(part), part, fsync=False)
    assert report.resumed_tensors == 1
    assert verify_output(part, recompute=2, seed=3).problems == ()
    run_parts(paths[1:])
    join_parts(out, fsync=False)
    run_plan(plan, tmp_path / "one", fsync=False)
    assert contents(out) == contents(tmp_path / "one")


def interruptions(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Has the n-th call that changes a file fail, for n = 1, 2, …, until none is left to fail."""
    names = ("rename", "unlink", "rmdir")
    real = {name: getattr(Path, name) for name in names}
    number = 0
    while True:
        number += 1
        left = [number]
        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(Path, name, _interrupted(real[name], left))
            yield number
        if left[0] > 0:
            return


def _interrupted(call: Any, left: list[int]) -> Any:
    def interrupted(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return call(*arguments, **named)

    return interrupted


def test_joining_is_interrupted_anywhere(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_plan(plan, tmp_path / "one" / "out", fsync=False)
    expected = contents(tmp_path / "one" / "out")
    prepared = tmp_path / "prepared"
    run_parts(write_parts(plan, prepared / "out", PARTS))
    number = 0
    for number in interruptions(monkeypatch):
        out = tmp_path / str(number) / "out"
        _copy(prepared, tmp_path / str(number))
        try:
            join_parts(out, fsync=False)
        except KeyboardInterrupt:
            monkeypatch.undo()
            join_parts(out, fsync=False)
        assert contents(out) == expected
        assert verify_output(out).problems == ()
    assert number > 15


def _copy(source: Path, target: Path) -> None:
    """With hard links, whose times are the same."""
    for path in source.rglob("*"):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())


def test_parts_of_different_merges(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    paths = write_parts(plan, out, 2)
    run_parts(paths)
    document = json.loads((out / "part-2-of-2" / MANIFEST_NAME).read_text())
    document["split"]["whole"] = "0" * 32
    (out / "part-2-of-2" / MANIFEST_NAME).write_text(json.dumps(document))
    with pytest.raises(InputError, match="parts of different merges"):
        join_parts(out)
    (out / "part-1-of-3.json").write_text("{}")
    with pytest.raises(InputError, match="divisions into 2, 3"):
        join_parts(out)


@pytest.mark.parametrize("split", [None, 7, {}, {"number": 9, "count": 2, "whole": "x"}, []])
def test_damaged_parts(plan: Plan, tmp_path: Path, split: object) -> None:
    out = tmp_path / "out"
    paths = write_parts(plan, out, 2)
    run_parts(paths)
    for path in (paths[0], out / "part-1-of-2" / MANIFEST_NAME):
        document = json.loads(path.read_text())
        document["split"] = split
        path.write_text(json.dumps(document))
    with pytest.raises(InputError):
        load_plan(paths[0])
    with pytest.raises(InputError):
        join_parts(out)


def test_nothing_to_join(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no parts of a merge"):
        join_parts(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    run_plan(plan, tmp_path / "whole", fsync=False)
    assert join_parts(tmp_path / "whole").parts == 0


def test_parts_are_not_written_among_other_files(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"holds notes\.txt"):
        write_parts(plan, tmp_path / "mine", 2)
    out = tmp_path / "out"
    write_parts(plan, out, 2)
    paths = write_parts(plan, out, PARTS)  # in place of the others
    assert sorted(out.iterdir()) == paths
    run_parts(paths[:1])
    with pytest.raises(InputError, match="parts of a merge that have been run"):
        write_parts(plan, out, 2)


def test_across_filesystems(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run_parts(write_parts(plan, out, PARTS))
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.parent.name.startswith("part-") and target.parent == out:
            raise OSError(splitting.errno.EXDEV, "Invalid cross-device link")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        join_parts(out)
    run_plan(plan, tmp_path / "one", fsync=False)
    assert contents(out) == contents(tmp_path / "one")


def test_statistics_of_parts_are_joined(plan: Plan, tmp_path: Path) -> None:
    run_plan(plan.with_statistics(), tmp_path / "whole", fsync=False)
    out = tmp_path / "out"
    for path in write_parts(plan, out, PARTS):
        run_plan(load_plan(path).with_statistics(), path.with_suffix(""), fsync=False)
    join_parts(out, fsync=False)
    names = [tmp_path / each / STATISTICS_NAME for each in ("whole", "out")]
    assert names[0].read_text() == names[1].read_text()
    assert not list(out.glob("part-*"))
