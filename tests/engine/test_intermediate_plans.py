"""Merges that others of a recipe use, written by themselves: the bytes that the recipe computes
with, and outputs like any other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import lazymerge
import pytest
import torch
import yaml
from lazymerge.engine.intermediates import (
    Output,
    check_outputs,
    clear_earlier,
    outputs_of,
    plan_intermediate,
)
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import signatures
from lazymerge.engine.run import run_plan
from lazymerge.engine.saved_plans import load_plan
from lazymerge.engine.unfinished import plan_of_unfinished
from lazymerge.errors import DoesNotFitError, InputError
from lazymerge.graph.compile import seed_of_part
from lazymerge.graph.node import Write
from lazymerge.output import folder as folder_module
from lazymerge.output.lock import LockedError, OutputLock
from lazymerge.output.writer import ShardWriter
from safetensors.torch import load_file

from conftest import write_adapter, write_checkpoint
from method_recipes import recipe_for

SHAPES = {
    "model.layers.0.w.weight": (70, 60),
    "model.layers.1.w.weight": (33, 41),
    "model.norm.weight": (50,),
}
METHODS = sorted(set(signatures()) - {"passthrough"})
RANDOM_METHODS = ("dare_linear", "dare_ties", "della", "della_linear")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The folder of four models of bfloat16 tensors; m0 is the base of the others."""
    generator = torch.Generator().manual_seed(5)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for number in range(4):
        tensors = {
            name: (values + 0.1 * number * torch.randn(values.shape, generator=generator)).to(
                torch.bfloat16
            )
            for name, values in base.items()
        }
        config = {"model_type": "llama", "num_hidden_layers": 2, "number": number}
        write_checkpoint(tmp_path / f"m{number}", tensors, config)
        (tmp_path / f"m{number}" / "tokenizer.json").write_text(json.dumps({"of": number}))
    return tmp_path


def drop(folder: Path, base: str, *others: str, **more: Any) -> dict[str, Any]:
    """A document that drops elements at random. Models are m0 …, or names of merges."""

    def model(name: str) -> str:
        return str(folder / name) if (folder / name).is_dir() else name

    return {
        "merge_method": "dare_ties",
        "base_model": model(base),
        "models": [
            {"model": model(other), "parameters": {"weight": 0.6, "density": 0.5}}
            for other in others
        ],
        **more,
    }


def write(path: Path, *documents: dict[str, Any]) -> Path:
    # the name first: a document's position is that of its name
    ordered = [{k: d[k] for k in sorted(d, key="name".__ne__)} for d in documents]
    path.write_text(yaml.safe_dump_all(ordered, sort_keys=False))
    return path


def nested(folder: Path, **more: Any) -> Path:
    """inner, of which outer is made, of which the last is made; inner is used twice."""
    return write(
        folder / "recipe.yml",
        drop(folder, "m0", "outer", "inner", "m3", **more),
        drop(folder, "m0", "inner", "m2", name="outer", seed=8),
        drop(folder, "m0", "m1", "m2", name="inner", seed=4, out_dtype="float32"),
    )


def plan_of(path: Path, **options: Any) -> Plan:
    return lazymerge.plan(path, memory="4GiB", workers=2, **options)


def written(plan: Plan, out: Path) -> dict[str, torch.Tensor]:
    run_plan(plan, out, fsync=False)
    return load_file(out / "model.safetensors")


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in expected.items()
    )


@pytest.mark.parametrize("method", RANDOM_METHODS)
@pytest.mark.parametrize("seed", [None, 4, 7])
def test_the_bytes_of_its_document_alone(models: Path, method: str, seed: int | None) -> None:
    """With the seed that the part has in the recipe, given by hand."""
    first = drop(models, "m0", "m1", "m2", name="inner", seed=4, merge_method=method)
    path = write(models / "recipe.yml", first, drop(models, "m0", "inner", "m3"))
    whole = plan_of(path, seed=seed)
    part = plan_intermediate(whole, "inner")
    found = written(part, models / "out-inner")

    own = seed_of_part(whole.recipe.merges[0])
    alone = {key: value for key, value in first.items() if key != "name"}
    plan = plan_of(write(models / "alone.yml", {**alone, "seed": own}))
    assert equal(found, written(plan, models / "alone"))
    assert part.fingerprint == plan.fingerprint
    # and without it, other elements are dropped
    plain = written(plan_of(write(models / "plain.yml", alone), seed=seed), models / "plain")
    assert not equal(found, plain)


def test_the_values_that_later_merges_use(models: Path) -> None:
    """Written without rounding, a merge of the written model gives the bytes of the whole."""
    whole = plan_of(nested(models))
    at_once = written(whole, models / "out")
    for name in ("inner", "outer"):
        part = plan_intermediate(whole, name)
        recipe = write(
            models / f"unrounded-{name}.yml",
            *(
                {**document, "out_dtype": "float32"} if document.get("name") == name else document
                for document in yaml.safe_load_all((models / "recipe.yml").read_text())
            ),
        )
        run_plan(plan_intermediate(plan_of(recipe), name), models / f"out-{name}", fsync=False)
        assert {write.name for write in part.graph.writes} == SHAPES.keys()
    text = (models / "recipe.yml").read_text()
    last = next(iter(yaml.safe_load_all(text)))
    for entry in last["models"]:
        if entry["model"] in ("inner", "outer"):
            entry["model"] = str(models / f"out-{entry['model']}")
    second = write(models / "second.yml", {**last, "out_dtype": "bfloat16"})
    assert equal(written(plan_of(second), models / "second"), at_once)


@pytest.mark.parametrize("name", ["inner", "outer"])
def test_its_nodes_are_those_of_the_whole(models: Path, name: str) -> None:
    whole = plan_of(nested(models))
    part = plan_intermediate(whole, name)
    assert [w.id for w in part.graph.writes]
    for node in part.graph:
        assert isinstance(node, Write) or node.id in whole.graph


@pytest.mark.parametrize("method", METHODS)
def test_every_method(models: Path, method: str) -> None:
    """Written by itself, without rounding, and read again by what used it."""
    signature = signatures()[method]
    folders = [models / f"m{number}" for number in range(4)]
    count = max(2, signature.min_models)
    first = {"name": "inner", **recipe_for(signature, folders, count, random=Random(3)), "seed": 6}
    last = {
        "merge_method": "slerp",
        "base_model": str(models / "m3"),
        "models": [{"model": "inner"}],
        "parameters": {"t": 0.4},
        "out_dtype": "float32",
    }
    graph = plan_intermediate(plan_of(write(models / "recipe.yml", first, last)), "inner").graph
    computed = {graph.block_node(node.source).dtype for node in graph.writes}
    first["out_dtype"] = "float64" if computed == {"F64"} else "float32"
    whole = plan_of(write(models / "recipe.yml", first, last))
    at_once = written(whole, models / "out")
    part = plan_intermediate(whole, "inner")
    assert all(isinstance(node, Write) or node.id in whole.graph for node in part.graph)
    run_plan(part, models / "inner", fsync=False)
    assert lazymerge.verify(models / "inner", recompute=9).problems == ()
    last["models"] = [{"model": str(models / "inner")}]
    second = plan_of(write(models / "second.yml", last))
    assert equal(written(second, models / "second"), at_once)


def test_layers_and_adapters(models: Path) -> None:
    """A part of slices, whose model has an adapter; the last merge uses one of its tensors."""
    factors = {
        "base_model.model.model.layers.0.w.lora_A.weight": torch.ones(2, 60),
        "base_model.model.model.layers.0.w.lora_B.weight": torch.ones(70, 2),
    }
    write_adapter(models / "adapter", factors, r=2, lora_alpha=2, target_modules=["w"])
    adapted = f"{models / 'm1'}+{models / 'adapter'}"
    inner = {
        "name": "inner",
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": adapted, "layer_range": [0, 1]}]},
            {"sources": [{"model": str(models / "m2"), "layer_range": [0, 2]}]},
        ],
    }
    last = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": "inner", "layer_range": [1, 2]}]}],
    }
    whole = plan_of(write(models / "recipe.yml", inner, last))
    part = plan_intermediate(whole, "inner")
    assert len(whole.tensors) < len(part.tensors) == 4
    found = written(part, models / "out")
    alone = write(models / "alone.yml", {k: v for k, v in inner.items() if k != "name"})
    assert equal(found, written(plan_of(alone), models / "alone"))
    config = json.loads((models / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    assert lazymerge.verify(models / "out", recompute=9).problems == ()


def test_for_an_accelerator(models: Path) -> None:
    whole = lazymerge.plan(nested(models), device="cuda", vram="2GiB", workers=1)
    found = outputs_of(whole, models / "out", {"inner": models / "i"})
    for each in found:
        assert each.plan.execution == whole.execution
        assert each.plan.memory.vram is not None
    on_processor = plan_intermediate(plan_of(nested(models)), "inner")
    assert found[0].plan.fingerprint != on_processor.fingerprint


def test_an_output_like_any_other(models: Path, tmp_path: Path) -> None:
    whole = plan_of(nested(models), max_shard_size="9kB")
    part = plan_intermediate(whole, "outer")
    assert (len(part.shards), part.max_shard_bytes) == (2, 9000)
    out = models / "out-outer"
    run_plan(part, out, fsync=False)
    assert sorted(f.name for f in out.iterdir()) == [
        "README.md",
        "config.json",
        "lazymerge.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert json.loads((out / "config.json").read_text())["number"] == 0
    assert "The merge that it names `outer`." in (out / "README.md").read_text()
    recipe = json.loads((out / "lazymerge.json").read_text())["recipe"]
    seeds = {str(m.name): seed_of_part(m) for m in whole.recipe.merges}
    assert recipe["part"] == {"name": "outer", "seeds": seeds}
    assert recipe["text"] == (models / "recipe.yml").read_text()
    models_of_part = json.loads((out / "lazymerge.json").read_text())["models"]
    assert [Path(m["reference"]).name for m in models_of_part] == ["m0", "m2", "m1"]
    assert lazymerge.verify(out, recompute=9).problems == ()
    state = lazymerge.status(out)
    assert (state.state, state.part) == ("complete", "outer")


@pytest.mark.parametrize("seed", [None, 0, 4, 8, 9])
def test_it_is_resumed_and_recomputed_with_its_seeds(
    models: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    """Seeds of the parts and of the command: 4 and 8 are those of single documents."""
    part = plan_intermediate(plan_of(nested(models), seed=seed), "outer")
    expected = written(part, models / "expected")
    out = models / "out"
    real = ShardWriter.finish_tensor
    done: list[str] = []

    def finish(self: Any, tensor: str) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(tensor)
        real(self, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish_tensor", finish)
        with pytest.raises(KeyboardInterrupt):
            run_plan(part, out, fsync=False)
    state = lazymerge.status(out)
    assert (state.state, state.part) == ("unfinished", "outer")
    (models / "elsewhere").mkdir()
    monkeypatch.chdir(models / "elsewhere")
    again = plan_of_unfinished(out)
    assert again.fingerprint == part.fingerprint
    assert again.recipe == part.recipe
    report = run_plan(again, out, fsync=False)
    assert report.resumed_tensors >= 1
    assert equal(load_file(out / "model.safetensors"), expected)
    assert lazymerge.verify(out, recompute=9).problems == ()


@pytest.mark.parametrize("of", ["whole", "part"])
def test_saved_plans(models: Path, of: str) -> None:
    whole = plan_of(nested(models), seed=11)
    part = plan_intermediate(whole, "outer")
    (whole if of == "whole" else part).save(models / "plan.json")
    loaded = load_plan(models / "plan.json")
    if of == "whole":
        loaded = plan_intermediate(loaded, "outer")
    assert loaded.fingerprint == part.fingerprint
    assert loaded.recipe == part.recipe
    assert equal(written(loaded, models / "a"), written(part, models / "b"))
    assert loaded.summary().splitlines()[0].endswith("recipe.yml (outer)")


@pytest.mark.parametrize(
    ("documents", "name", "message"),
    [
        (["inner", None], "iner", "the merges that the last one uses are 'inner'; 'iner' is none"),
        (["inner", "last"], "last", "'last' is the last merge, which is written in any case"),
        ([None], "inner", "has no merge that is named 'inner', for it uses no other merges"),
    ],
)
def test_names_that_are_none(
    models: Path, documents: list[str | None], name: str, message: str
) -> None:
    made = [
        drop(models, "m0", "inner" if number else "m1", "m2", **({"name": n} if n else {}))
        for number, n in enumerate(documents)
    ]
    with pytest.raises(InputError, match=message):
        plan_intermediate(plan_of(write(models / "recipe.yml", *made)), name)


def test_it_is_not_gone_on_with_by_another_part(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plan_of(nested(models))
    parts = {name: plan_intermediate(whole, name) for name in ("inner", "outer")}

    def begin(plan: Plan, out: Path) -> None:
        real = ShardWriter.finish_tensor

        def finish(self: Any, tensor: str) -> None:
            real(self, tensor)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "finish_tensor", finish)
            with pytest.raises(KeyboardInterrupt):
                run_plan(plan, out, fsync=False)

    begin(parts["inner"], models / "a")
    with pytest.raises(InputError, match="it was its merge 'inner', now it is its merge 'outer'"):
        run_plan(parts["outer"], models / "a", fsync=False)
    with pytest.raises(InputError, match="now it is the merge that its recipe leads to"):
        run_plan(whole, models / "a", fsync=False)
    (models / "m1" / "model.safetensors").touch()
    with pytest.raises(InputError) as caught:
        plan_of_unfinished(models / "a")
    assert str(caught.value).endswith(
        f"recipe.yml -o OUT --write-intermediate inner={models / 'a'} --overwrite"
    )


def test_models_with_other_names_in_the_whole(models: Path) -> None:
    """The numbers of random methods go by names; a model must not be written under others."""
    for number in (1, 2):
        folder = models / f"m{number}"
        tensors = load_file(folder / "model.safetensors")
        write_checkpoint(folder, {f"module.{name}": t for name, t in tensors.items()})
    path = write(
        models / "recipe.yml",
        drop(models, "m1", "m2", name="inner"),
        drop(models, "m0", "inner", "m3"),
    )
    with pytest.raises(InputError, match=r"'inner' cannot be written by itself: .*m1 is read with"):
        plan_intermediate(plan_of(path), "inner")
    # where the part has the names itself, it can
    path = write(
        models / "recipe.yml",
        drop(models, "m0", "m1", "m2", name="inner"),
        drop(models, "m3", "inner"),
    )
    assert [t.name for t in plan_intermediate(plan_of(path), "inner").tensors] == [*SHAPES]


def outputs(folder: Path, **folders: str) -> tuple[Output, ...]:
    plan = plan_of(nested(folder))
    return outputs_of(plan, folder / "out", {k: folder / v for k, v in folders.items()})


def test_parts_are_written_before_what_they_lead_to(models: Path) -> None:
    found = outputs(models, outer="o", inner="i")
    assert [(each.name, each.folder.name) for each in found] == [
        ("inner", "i"),
        ("outer", "o"),
        (None, "out"),
    ]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({"inner": "out"}, "two merges cannot be written into one folder"),
        ({"inner": "a", "outer": "./a/../a"}, "two merges cannot be written into one folder"),
        ({"inner": "out/inner"}, "lies in another, .*out; choose"),
        ({"inner": "."}, "out lies in another"),
        ({"inner": "link"}, "two merges cannot be written into one folder"),
        # of the last merge alone: not one that the part reads from
        ({"inner": "m3"}, "is the folder of an input model"),
        ({"inner": "full"}, "is not empty"),
    ],
)
def test_folders_that_cannot_be_used(models: Path, folders: dict[str, str], message: str) -> None:
    (models / "link").symlink_to("out")
    (models / "full").mkdir()
    (models / "full" / "notes.txt").write_text("mine")
    before = sorted(models.rglob("*"))
    with pytest.raises(InputError, match=message):
        check_outputs(outputs(models, **folders), overwrite=False)
    assert sorted(models.rglob("*")) == [*before, *({models / "recipe.yml"} - {*before})]


def test_disk_is_counted_for_all(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = outputs(models, inner="i")
    needed = sum(each.plan.bytes_written for each in found)
    free = needed + 2 * folder_module.FILESYSTEM_SLACK_BYTES
    monkeypatch.setattr(folder_module, "free_disk_bytes", lambda _: free)
    check_outputs(found, overwrite=False)
    monkeypatch.setattr(folder_module, "free_disk_bytes", lambda _: free - 1)
    with pytest.raises(DoesNotFitError, match="the outputs need"):
        check_outputs(found, overwrite=False)
    run_plan(found[0].plan, found[0].folder, fsync=False)
    check_outputs(found, overwrite=False)  # what is complete needs no more
    check_outputs(found, overwrite=True)  # what it takes is set free


def test_what_is_replaced_is_removed_first(models: Path) -> None:
    found = outputs(models, inner="i")
    other = plan_of(write(models / "other.yml", drop(models, "m0", "m1")))
    for each in found:
        run_plan(other, each.folder, fsync=False)
    with pytest.raises(InputError, match="not empty"):
        check_outputs(found, overwrite=False)
    check_outputs(found, overwrite=True)
    clear_earlier(found, fsync=False)
    assert [sorted(each.folder.iterdir()) for each in found] == [[], []]
    check_outputs(found, overwrite=False)


def test_nothing_is_removed_where_another_process_is_at_work(models: Path) -> None:
    found = outputs(models, inner="i")
    other = plan_of(write(models / "other.yml", drop(models, "m0", "m1")))
    for each in found:
        run_plan(other, each.folder, fsync=False)
    before = sorted(models.rglob("*"))
    lock = OutputLock(models / "out")
    with pytest.raises(LockedError):
        clear_earlier(found, fsync=False)
    lock.release()
    assert sorted(models.rglob("*")) == before


def test_a_saved_plan_stays_in_its_folder(models: Path) -> None:
    found = outputs(models, inner="i")
    saved = models / "out" / ".lazymerge" / "plan.json"
    saved.parent.mkdir(parents=True)
    found[-1].plan.save(saved)
    check_outputs(found, overwrite=True)
    clear_earlier(found, fsync=False)
    assert saved.is_file()


def test_what_is_needed_by_one_is_reserved_for_all(models: Path) -> None:
    whole = plan_of(nested(models))
    parts = [plan_intermediate(whole, name) for name in ("inner", "outer")]
    alone = [plan.memory.reserved_bytes for plan in (*parts, whole)]
    found = outputs(models, inner="i", outer="o")
    assert all(each.plan.memory.reserved_bytes > max(alone) for each in found)
    assert [each.plan.fingerprint for each in found[:2]] == [part.fingerprint for part in parts]
    assert outputs(models)[0].plan.memory == whole.memory


@pytest.mark.parametrize(
    "change",
    [
        lambda part: part.update(name=3),
        lambda part: part.pop("name"),
        lambda part: part.update(name="another"),
    ],
)
def test_documents_that_somebody_has_altered(
    models: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    out = models / "out"
    run_plan(plan_intermediate(plan_of(nested(models)), "inner"), out, fsync=False)
    manifest = json.loads((out / "lazymerge.json").read_text())
    change(manifest["recipe"]["part"])
    (out / "lazymerge.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"is damaged|'another' is none of them"):
        lazymerge.verify(out, recompute=1)


def test_paths_are_those_of_the_plan(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative references are looked up where the recipe was planned."""
    monkeypatch.chdir(models)
    relative = [
        {"name": "inner", **drop(Path(), "m0", "m1")},
        drop(Path(), "m0", "inner"),
    ]
    whole = plan_of(write(models / "recipe.yml", *relative))
    monkeypatch.chdir(os.sep)
    with pytest.raises(InputError):
        plan_of(models / "recipe.yml")
    part = plan_intermediate(whole, "inner")
    assert [*part.checkpoints] == ["m0", "m1"]
    assert part.sidecars == ("tokenizer.json",)
    run_plan(part, models / "out", fsync=False)
    assert lazymerge.verify(models / "out", recompute=9).problems == ()
