"""The output's bytes depend on recipe and inputs alone: not on workers, read mode, spans, shards,
hash seeds or memory."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from lazymerge.checkpoint import open_checkpoint
from lazymerge.engine import scheduler
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import make_plan, signatures
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.output.manifest import MANIFEST_NAME
from merge_cases import RECIPES, write_models

import check_determinism
from conftest import write_checkpoint
from merging import recipe_of

LARGE = 8 << 30

SETTINGS_OF_PARAMETERS = ("numbers", "flags")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("determinism")
    write_models(folder)
    return folder


def digests(output: Path) -> dict[str, str]:
    """A digest of every file, of the manifest without what was measured."""
    found = {}
    for path in sorted(output.iterdir()):
        data = path.read_bytes()
        if path.name == MANIFEST_NAME:
            manifest = json.loads(data)
            del manifest["run"], manifest["memory"], manifest["timeline"]
            data = json.dumps(manifest).encode()
        found[path.name] = hashlib.sha256(data).hexdigest()
    return found


@pytest.mark.parametrize("method", RECIPES)
def test_bytes_do_not_depend_on_who_computes_what_when(
    models: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spans decide what checksums are made of, and nothing else."""
    recipe = recipe_of(models, RECIPES[method])
    expected: dict[str, str] = {}
    expected_manifests: dict[int, str] = {}
    for span, mode, workers in product((16, 1, 2), ("pread", "mmap"), (1, 2, 3, 5)):
        monkeypatch.setattr(scheduler, "SPAN_BLOCKS", span)
        plan = make_plan(recipe, Resources(LARGE, workers, mode))
        assert plan.memory.workers == workers
        output = tmp_path / f"{span}-{mode}-{workers}" / "merged"
        run_plan(plan, output, fsync=False)
        found = digests(output)
        manifest = found.pop(MANIFEST_NAME)
        expected = expected or found
        assert found == expected
        assert manifest == expected_manifests.setdefault(span, manifest)
        for path in output.iterdir():
            path.unlink()
    assert sorted(expected) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def tensor_bytes(folder: Path) -> dict[str, str]:
    checkpoint = open_checkpoint(str(folder))
    return {
        t.name: hashlib.sha256(
            (folder / t.file).read_bytes()[t.start : t.stop_exclusive]
        ).hexdigest()
        for t in checkpoint.tensors.values()
    }


@pytest.mark.parametrize("method", RECIPES)
def test_tensors_do_not_depend_on_shard_sizes(models: Path, tmp_path: Path, method: str) -> None:
    recipe = recipe_of(models, RECIPES[method])
    found = []
    checksums = []
    for size, files in ((0, 5), (2_000_000, 2), (10**9, 1)):
        plan = make_plan(recipe, Resources(LARGE, workers=2), max_shard_bytes=size)
        output = tmp_path / str(size)
        run_plan(plan, output, fsync=False)
        assert len(list(output.glob("*.safetensors"))) == files
        found.append(tensor_bytes(output))
        manifest = json.loads((output / MANIFEST_NAME).read_text())
        checksums.append({name: t["checksum"] for name, t in manifest["tensors"].items()})
    assert found[0] == found[1] == found[2]
    assert checksums[0] == checksums[1] == checksums[2]
    assert len(found[0]) == 5


SETTINGS = check_determinism.settings_to_try(
    {
        "workers": (1, 2, 3, 5),
        "memory": ("2GiB", "4GiB", "8GiB"),  # beside what the process of the tests holds
        "max_shard": ("1MB", "5GB"),
        "read_mode": ("pread", "mmap"),
        "order": ("planned", "reversed"),
    },
    quick=True,
)


@pytest.fixture(scope="module")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three of different dtypes: a tensor of four blocks, one of two, small ones, an empty one."""
    folder = tmp_path_factory.mktemp("small")
    generator = torch.Generator().manual_seed(11)
    shapes = {
        "model.embed_tokens.weight": (1300, 640),
        "model.layers.0.w.weight": (2, 131_073),
        "model.layers.1.w.weight": (7, 11),
        "model.layers.2.w.weight": (0, 11),
        "model.norm.weight": (97,),
    }
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    return [
        write_checkpoint(
            folder / str(number),
            {
                name: torch.randn(shape, generator=generator).to(dtype)
                for name, shape in shapes.items()
            },
        )
        for number, dtype in enumerate(dtypes)
    ]


@pytest.mark.parametrize("method", signatures())
def test_every_method_under_every_pair_of_settings(
    small_models: list[Path], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What scripts/check_determinism.py does with all combinations and larger models."""
    monkeypatch.setattr(scheduler, "SPAN_BLOCKS", 1)  # four spans of the largest tensor
    orders = set()

    def run(plan: Plan, output: Path) -> None:
        orders.add(plan.tasks[0].write.name)
        run_plan(plan, output, fsync=False)

    for recipe in check_determinism.recipes_of(method, small_models, SETTINGS_OF_PARAMETERS):
        verdict = check_determinism.compare(recipe, SETTINGS, tmp_path, run)
        assert list(verdict.problems()) == []
        assert (verdict.runs, verdict.raised) == (len(SETTINGS), 0)
    assert orders == {"model.embed_tokens.weight", "model.norm.weight"}


def test_memory_decides_how_many_work_and_nothing_else(models: Path, tmp_path: Path) -> None:
    recipe = recipe_of(models, RECIPES["ties"])
    roomy = make_plan(recipe, Resources(LARGE, workers=4))
    tight = roomy.with_resources(Resources(roomy.memory.smallest_limit_bytes, workers=4))
    assert (roomy.memory.workers, tight.memory.workers) == (4, 1)
    assert roomy.fingerprint == tight.fingerprint
    outputs = []
    for name, plan in (("roomy", roomy), ("tight", tight)):
        run_plan(plan, tmp_path / name / "merged", fsync=False)
        outputs.append(digests(tmp_path / name / "merged"))
    assert outputs[0] == outputs[1]


SCRIPT = """
import json, sys
from pathlib import Path
from merge_cases import RECIPES
from merging import recipe_of
from test_determinism import digests
from lazymerge.engine.planning import make_plan
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan

models, out = map(Path, sys.argv[1:])
found = {}
for method, recipe in RECIPES.items():
    plan = make_plan(recipe_of(models, recipe), Resources(8 << 30, workers=2))
    run_plan(plan, out / method, fsync=False)
    found[method] = digests(out / method), plan.fingerprint
print(json.dumps(found))
"""


def test_bytes_do_not_depend_on_the_hash_seed(models: Path, tmp_path: Path) -> None:
    here = Path(__file__).parent
    found = []
    for seed in ("1", "4321"):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join(
                [str(here), str(here.parent), str(here.parents[1] / "scripts")]
            ),
        }
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(models), str(tmp_path / seed)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(done.stdout)
    assert found[0] == found[1]
    assert len(json.loads(found[0])) == len(RECIPES)


def test_fingerprint_tells_merges_apart(models: Path) -> None:
    plans: list[Plan] = []
    for recipe in RECIPES.values():
        plans.append(make_plan(recipe_of(models, recipe), Resources(LARGE)))
        plans.append(make_plan(recipe_of(models, recipe), Resources(LARGE), max_shard_bytes=0))
        changed = {**recipe, "out_dtype": "float16"}
        plans.append(make_plan(recipe_of(models, changed), Resources(LARGE)))
    again = make_plan(recipe_of(models, RECIPES["linear"]), Resources(LARGE, 1, "mmap"))
    assert again.fingerprint == plans[0].fingerprint
    assert len({plan.fingerprint for plan in plans}) == len(plans)
