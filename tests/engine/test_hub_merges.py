"""Merges of models of the Hub, from the recipe to the output, against a server of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lazymerge
import pytest
import torch
import yaml
from lazymerge.engine.report import Silent
from lazymerge.engine.run import run_plan
from lazymerge.errors import InputError, LazymergeError
from safetensors.torch import save_file

from conftest import write_checkpoint
from hub_server import TOKEN, HubServer

NAMES = [f"model.layers.{n}.w" for n in range(4)]


def publish(hub: HubServer, folder: Path, name: str, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {key: torch.randn(40, 30, generator=generator) for key in NAMES}
    write_checkpoint(folder / name, tensors, {"model_type": "llama", "num_hidden_layers": 4})
    (folder / name / "generation_config.json").write_text('{"a": 1}')
    (folder / name / "modeling.py").write_text("raise SystemExit")
    hub.publish(f"org/{name}", folder / name)
    return folder / name


@pytest.fixture
def models(hub: HubServer, tmp_path: Path) -> dict[str, Path]:
    """Local folders by the id that they are published under."""
    return {f"org/{name}": publish(hub, tmp_path, name, seed) for seed, name in enumerate("ab")}


def recipe(first: object, second: object, path: Path) -> Path:
    document = {
        "merge_method": "slerp",
        "base_model": str(first),
        "models": [{"model": str(second)}],
        "parameters": {"t": 0.3},
    }
    path.write_text(yaml.safe_dump(document))
    return path


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture
def expected(models: dict[str, Path], tmp_path: Path) -> bytes:
    path = recipe(models["org/a"], models["org/b"], tmp_path / "local.yml")
    lazymerge.run(lazymerge.plan(path), tmp_path / "local", fsync=False)
    return weights(tmp_path / "local")


def facts(plan: Any) -> dict[str, str]:
    return dict(plan.facts())


def test_a_merge(models: dict[str, Path], hub: HubServer, tmp_path: Path, expected: bytes) -> None:
    path = recipe("org/a", "org/b@main", tmp_path / "hub.yml")
    plan = lazymerge.plan(path)
    cached = [p.name for p in (tmp_path / "cache").rglob("*") if p.name.endswith(".safetensors")]
    assert cached == []
    assert " files of org/a, org/b (" in facts(plan)["download"]
    out = tmp_path / "out"
    lazymerge.run(plan, out, fsync=False)
    assert weights(out) == expected
    assert (out / "generation_config.json").read_text() == '{"a": 1}'
    assert not (out / "modeling.py").exists()
    manifest = json.loads((out / "lazymerge.json").read_text())
    commits = {model["reference"]: model["hub"]["commit"] for model in manifest["models"]}
    assert all(len(commit) == 40 for commit in commits.values())
    assert "base_model:\n- org/a\n- org/b" in (out / "README.md").read_text()
    everything = "".join(p.read_text(errors="replace") for p in out.glob("*.json"))
    assert TOKEN not in everything
    assert "download" not in facts(lazymerge.plan(path))
    assert lazymerge.verify(out, recompute=4).problems == ()


def test_a_branch_that_moves_between_runs(
    models: dict[str, Path], hub: HubServer, tmp_path: Path, expected: bytes
) -> None:
    """What was begun goes on with the commits that it was begun with."""
    path = recipe("org/a", "org/b", tmp_path / "hub.yml")
    plan = lazymerge.plan(path)
    plan.save(tmp_path / "plan.json")

    class Stopper(Silent):
        def finished(self, _: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, tmp_path / "out", fsync=False, observer=Stopper())
    publish(hub, tmp_path / "later", "b", 7)
    other = lazymerge.plan(path)
    assert other.fingerprint != plan.fingerprint
    with pytest.raises(InputError, match="org/b"):
        run_plan(other, tmp_path / "out", fsync=False)
    assert lazymerge.resume(tmp_path / "out").resumed_tensors >= 1
    assert weights(tmp_path / "out") == expected
    run_plan(lazymerge.plan(tmp_path / "plan.json"), tmp_path / "saved", fsync=False)
    assert weights(tmp_path / "saved") == expected


def test_offline(
    models: dict[str, Path],
    hub: HubServer,
    tmp_path: Path,
    expected: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = recipe("org/a", "org/b", tmp_path / "hub.yml")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        lazymerge.plan(path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    lazymerge.run(lazymerge.plan(path), tmp_path / "once", fsync=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    plan = lazymerge.plan(path)
    assert plan.notices == ()
    lazymerge.run(plan, tmp_path / "out", fsync=False)
    assert weights(tmp_path / "out") == expected


def test_a_download_that_breaks_off_leaves_no_output(
    models: dict[str, Path], hub: HubServer, tmp_path: Path
) -> None:
    plan = lazymerge.plan(recipe("org/a", "org/b", tmp_path / "hub.yml"))
    hub.answers["org/b/model.safetensors"] = (403, "")
    with pytest.raises(LazymergeError, match="may not be read"):
        lazymerge.run(plan, tmp_path / "out", fsync=False)
    assert not (tmp_path / "out").exists()


def test_a_local_folder_goes_first(models: dict[str, Path], hub: HubServer, tmp_path: Path) -> None:
    here = Path.cwd() / "org"
    here.mkdir()
    (here / "a").symlink_to(models["org/b"])
    plan = lazymerge.plan(recipe("org/a", "org/b", tmp_path / "hub.yml"))
    assert plan.checkpoints["org/a"].hub is None
    assert plan.checkpoints["org/b"].hub is not None


def test_a_merge_that_others_use(
    models: dict[str, Path], hub: HubServer, tmp_path: Path, expected: bytes
) -> None:
    """Written by itself from the commits that the whole was planned with."""
    recipe("org/a", "org/b", tmp_path / "inner.yml")
    last = {"merge_method": "slerp", "base_model": "org/a", "models": [{"model": "inner"}]}
    documents = [
        {"name": "inner", **yaml.safe_load((tmp_path / "inner.yml").read_text())},
        {**last, "parameters": {"t": 0.5}},
    ]
    path = tmp_path / "hub.yml"
    path.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    plan = lazymerge.plan(path)
    publish(hub, tmp_path / "later", "b", 7)
    part = lazymerge.plan_intermediate(plan, "inner")
    assert " files of org/a, org/b (" in facts(part)["download"]
    run_plan(part, tmp_path / "out-inner", fsync=False)
    assert weights(tmp_path / "out-inner") == expected
    assert (tmp_path / "out-inner" / "generation_config.json").is_file()
    assert lazymerge.verify(tmp_path / "out-inner", recompute=4).problems == ()


def test_a_model_in_torch_files(hub: HubServer, tmp_path: Path) -> None:
    """It is planned by ranges, and fetched to be merged; where a Hub sends none it is fetched to be
    planned, and the notice says why."""
    generator = torch.Generator().manual_seed(4)
    tensors = {key: torch.randn(400, 300, generator=generator) for key in NAMES}
    folder = tmp_path / "old"
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    hub.publish("org/old", folder)
    hub.publish("org/whole", folder)
    results = []
    for name, model in (("hub", "org/old"), ("whole", "org/whole"), ("local", str(folder))):
        path = tmp_path / f"{name}.yml"
        entry = {"model": model, "parameters": {"weight": 0.5}}
        document = {"merge_method": "linear", "models": [entry]}
        path.write_text(yaml.safe_dump(document))
        hub.ignores_ranges = name == "whole"
        plan = lazymerge.plan(path)
        if name == "hub":
            assert " in 1 file of org/old (" in facts(plan)["download"]
            assert hub.fetched("org/old") == ["config.json"]
        if name == "whole":
            assert any("'pytorch_model.bin' lie stands at" in n for n in plan.notices)
            assert "download" not in facts(plan)
            assert not any("downloaded" in notice for notice in lazymerge.plan(path).notices)
        lazymerge.run(plan, tmp_path / name, fsync=False)
        assert lazymerge.verify(tmp_path / name, recompute=4).problems == ()
        results.append(weights(tmp_path / name))
    assert results[0] == results[1] == results[2]


def test_torch_files_that_an_index_lists(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    torch.save({"a": torch.ones(3)}, folder / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    hub.publish("org/shards", folder)
    assert list(lazymerge.inspect("org/shards").checkpoint.tensors) == ["a"]
    assert hub.fetched("org/shards") == ["pytorch_model.bin.index.json"]


def test_torch_files_that_are_streamed(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    torch.save({"a": torch.ones(300), "b": torch.zeros(5)}, folder / "pytorch_model.bin")
    hub.publish("org/old", folder)
    found = lazymerge.inspect("org/old", scan=True, stream=True)
    assert found.scans is not None
    assert [scan.zeros for scan in found.scans] == [0, 5]
    assert lazymerge.diff("org/old", folder, stream=True).is_same
    assert not hub.fetched("org/old")
    with pytest.raises(InputError, match="with --stream, or download them first"):
        lazymerge.inspect("org/old", scan=True)


class TestAdapters:
    @pytest.fixture
    def adapter(self, hub: HubServer, tmp_path: Path) -> Path:
        generator = torch.Generator().manual_seed(5)
        folder = tmp_path / "adapter"
        folder.mkdir()
        save_file(
            {
                f"base_model.model.{name.removesuffix('.w')}.w.lora_{part}.weight": torch.randn(
                    *shape, generator=generator
                )
                for name in NAMES
                for part, shape in (("A", (2, 30)), ("B", (40, 2)))
            },
            folder / "adapter_model.safetensors",
        )
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        hub.publish("org/adapter", folder)
        return folder

    @pytest.fixture
    def weighted(self, hub: HubServer, tmp_path: Path) -> Path:
        """A model whose tensors are layers' weights, as adapters expect."""
        generator = torch.Generator().manual_seed(6)
        tensors = {f"{key}.weight": torch.randn(40, 30, generator=generator) for key in NAMES}
        write_checkpoint(tmp_path / "w", tensors, {"model_type": "llama"})
        hub.publish("org/w", tmp_path / "w")
        return tmp_path / "w"

    def plan(self, model: str, path: Path) -> Any:
        entry = {"model": model, "parameters": {"weight": 1.0}}
        path.write_text(yaml.safe_dump({"merge_method": "linear", "models": [entry]}))
        return lazymerge.plan(path)

    @pytest.mark.parametrize("place", ["both", "adapter", "model", "pinned"])
    def test_folded_in(
        self, adapter: Path, weighted: Path, hub: HubServer, tmp_path: Path, place: str
    ) -> None:
        lazymerge.run(self.plan(f"{weighted}+{adapter}", tmp_path / "l.yml"), tmp_path / "local")
        commit = hub.publish("org/adapter", adapter)
        reference = {
            "both": "org/w+org/adapter",
            "adapter": f"{weighted}+org/adapter@main",
            "model": f"org/w+{adapter}",
            "pinned": f"hf://org/w+hf://org/adapter@{commit}",
        }[place]
        plan = self.plan(reference, tmp_path / "h.yml")
        if place != "model":
            assert not [*(tmp_path / "cache").rglob("adapter_model*")]
            assert "org/adapter" in facts(plan)["download"]
        plan.save(tmp_path / "plan.json")
        out = tmp_path / "out"
        lazymerge.run(plan, out, fsync=False)
        assert weights(out) == weights(tmp_path / "local")
        assert lazymerge.verify(out, recompute=2).problems == ()
        model = json.loads((out / "lazymerge.json").read_text())["models"][0]
        assert model["adapter"].get("hub", {}).get("commit", commit) == commit
        lazymerge.run(lazymerge.plan(tmp_path / "plan.json"), tmp_path / "saved", fsync=False)
        assert weights(tmp_path / "saved") == weights(out)

    def test_goes_on_with_the_commit_that_it_was_begun_with(
        self, adapter: Path, weighted: Path, hub: HubServer, tmp_path: Path
    ) -> None:
        plan = self.plan("org/w+org/adapter", tmp_path / "h.yml")

        class Stopper(Silent):
            def finished(self, _: str) -> None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_plan(plan, tmp_path / "out", fsync=False, observer=Stopper())
        config = json.loads((adapter / "adapter_config.json").read_text()) | {"lora_alpha": 99}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        hub.publish("org/adapter", adapter)
        other = self.plan("org/w+org/adapter", tmp_path / "h.yml")
        assert other.fingerprint != plan.fingerprint
        assert lazymerge.resume(tmp_path / "out").resumed_tensors >= 1
        run_plan(plan, tmp_path / "whole", fsync=False)
        assert weights(tmp_path / "out") == weights(tmp_path / "whole")

    def test_a_repository_that_is_no_adapter(
        self, weighted: Path, hub: HubServer, tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match=r"adapter 'org/w' of the Hub: org/w: holds no"):
            self.plan("org/w+org/w", tmp_path / "h.yml")
        with pytest.raises(InputError, match="is no local folder, and the Hub"):
            self.plan("org/w+org/absent", tmp_path / "h.yml")


class TestStreamed:
    """Read by ranges while they are merged; nothing of the weights comes into the cache."""

    def test_a_merge(
        self, models: dict[str, Path], hub: HubServer, tmp_path: Path, expected: bytes
    ) -> None:
        path = recipe("org/a", "org/b@main", tmp_path / "hub.yml")
        plan = lazymerge.plan(path, stream=True)
        downloaded = lazymerge.plan(path)
        assert plan.fingerprint == downloaded.fingerprint
        assert [file.name for file in plan.missing_files] == ["generation_config.json"]
        assert facts(plan)["network"].endswith("nothing of it is kept")
        plan.save(tmp_path / "plan.json")
        lazymerge.run(plan, tmp_path / "out", fsync=False)
        assert weights(tmp_path / "out") == expected
        assert (tmp_path / "out" / "generation_config.json").read_text() == '{"a": 1}'
        assert lazymerge.verify(tmp_path / "out", recompute=2).problems == ()
        lazymerge.run(lazymerge.plan(tmp_path / "plan.json"), tmp_path / "saved", fsync=False)
        assert weights(tmp_path / "saved") == expected
        assert not [*(tmp_path / "cache").rglob("*.safetensors")]
        assert not [name for name in hub.fetched() if name.endswith(".safetensors")]

    def test_what_is_in_the_cache_is_read_there(
        self, models: dict[str, Path], hub: HubServer, tmp_path: Path, expected: bytes
    ) -> None:
        path = recipe("org/a", "org/b", tmp_path / "hub.yml")
        lazymerge.run(lazymerge.plan(path), tmp_path / "once", fsync=False)
        hub.log.clear()
        plan = lazymerge.plan(path, stream=True)
        assert plan.remote_inputs == {}
        lazymerge.run(plan, tmp_path / "out", fsync=False)
        assert weights(tmp_path / "out") == expected

    def test_ranges_that_are_kept(
        self,
        models: dict[str, Path],
        hub: HubServer,
        tmp_path: Path,
        expected: bytes,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        key = tmp_path / "ranges.key"
        monkeypatch.setattr("lazymerge.checkpoint.cached_pieces._key_path", lambda: key)
        path = recipe("org/a", "org/b", tmp_path / "hub.yml")
        for number in range(2):
            plan = lazymerge.plan(path, stream=True, cache=tmp_path / "ranges")
            hub.log.clear()
            lazymerge.run(plan, tmp_path / str(number), fsync=False)
            assert weights(tmp_path / str(number)) == expected
        assert hub.log == []

    def test_connections_that_break(
        self,
        models: dict[str, Path],
        hub: HubServer,
        tmp_path: Path,
        expected: bytes,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("lazymerge.checkpoint.transport.FIRST_PAUSE_SECONDS", 0.01)
        plan = lazymerge.plan(recipe("org/a", "org/b", tmp_path / "hub.yml"), stream=True)
        hub.cut["org/b/model.safetensors"] = [0, 10, 4000]
        lazymerge.run(plan, tmp_path / "out", fsync=False)
        assert weights(tmp_path / "out") == expected
        assert not hub.cut["org/b/model.safetensors"]

    def test_an_interrupted_run_goes_on_streaming(
        self, models: dict[str, Path], hub: HubServer, tmp_path: Path, expected: bytes
    ) -> None:
        plan = lazymerge.plan(recipe("org/a", "org/b", tmp_path / "hub.yml"), stream=True)

        class Stopper(Silent):
            def finished(self, _: str) -> None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_plan(plan, tmp_path / "out", fsync=False, observer=Stopper())
        assert lazymerge.resume(tmp_path / "out").resumed_tensors >= 1
        assert weights(tmp_path / "out") == expected
        assert not [*(tmp_path / "cache").rglob("*.safetensors")]

    def test_what_may_not_be_read(
        self, models: dict[str, Path], hub: HubServer, tmp_path: Path
    ) -> None:
        plan = lazymerge.plan(recipe("org/a", "org/b", tmp_path / "hub.yml"), stream=True)
        hub.answers["org/b/model.safetensors"] = (403, "")
        with pytest.raises(LazymergeError, match="may not be read") as caught:
            lazymerge.run(plan, tmp_path / "out", fsync=False)
        assert TOKEN not in str(caught.value)
        hub.answers.clear()
        hub.ignores_ranges = True
        with pytest.raises(InputError, match="sends no ranges of files"):
            lazymerge.run(plan, tmp_path / "out", fsync=False)
