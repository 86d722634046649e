"""Models with LoRA adapters: what is merged is what the formula says, whoever computes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lazymerge
import pytest
import torch
import yaml
from lazymerge.adapters import open_model, split_reference
from lazymerge.engine.report import Silent
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.errors import InputError
from safetensors.torch import load_file, save_file

from conftest import write_checkpoint

Q, K = (f"model.layers.0.self_attn.{word}_proj" for word in "qk")
EMBED, NORM = "model.embed_tokens", "model.norm"
SHAPES = {f"{Q}.weight": (60, 40), f"{K}.weight": (20, 40), f"{EMBED}.weight": (50, 40)}
SHAPES |= {f"{NORM}.weight": (40,)}
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none"}

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(8)


@pytest.fixture
def models(tmp_path: Path, generator: torch.Generator) -> dict[str, Tensors]:
    """base and tuned, by name; both on disk, in bfloat16."""
    made = {}
    for name in ("base", "tuned"):
        made[name] = {
            key: torch.randn(shape, generator=generator).bfloat16() for key, shape in SHAPES.items()
        }
        write_checkpoint(tmp_path / name, made[name], {"model_type": "llama"})
    return made


def write_adapter(folder: Path, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir()
    save_file(
        {f"base_model.model.{k}": t.contiguous() for k, t in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def factors(generator: torch.Generator, rows: int, columns: int, rank: int = 4) -> Tensors:
    a = torch.randn((rank, columns), generator=generator)
    return {"A": a, "B": torch.randn((rows, rank), generator=generator)}


def lora(module: str, made: Tensors, default: str = "") -> Tensors:
    return {f"{module}.lora_{part}{default}.weight": tensor for part, tensor in made.items()}


def double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float64)


def product(made: Tensors) -> torch.Tensor:
    return double(made["B"]) @ double(made["A"])


def recipe(tmp_path: Path, model: str, method: str = "task_arithmetic") -> Path:
    document = {
        "merge_method": method,
        "base_model": str(tmp_path / "base"),
        "models": [{"model": model, "parameters": {"weight": 0.7}}],
        "out_dtype": "float32",
    }
    if method == "slerp":
        document["models"] = [{"model": model}]
        document["parameters"] = {"t": 0.4}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(document))
    return tmp_path / "recipe.yml"


def check(tmp_path: Path, models: dict[str, Tensors], adapted: Tensors, adapter: Path) -> None:
    """adapted: float64 weights that are not those of `tuned`."""
    plan = lazymerge.plan(recipe(tmp_path, f"{tmp_path}/tuned+{adapter}"))
    outputs = []
    for workers, kernels, mode in ((1, None, "pread"), (3, "torch", "mmap")):
        out = tmp_path / f"out {workers}"
        run_plan(plan.with_resources(Resources(4 << 30, workers, mode, kernels)), out, fsync=False)
        outputs.append((out / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]
    found = load_file(tmp_path / "out 1" / "model.safetensors")
    for name in SHAPES:
        base, tuned = double(models["base"][name]), double(models["tuned"][name])
        exact = base + 0.7 * (adapted.get(name, tuned) - base)
        torch.testing.assert_close(double(found[name]), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("default", ["", ".default"])
def test_plain(
    tmp_path: Path, models: dict[str, Tensors], generator: torch.Generator, default: str
) -> None:
    q, k = factors(generator, 60, 40), factors(generator, 20, 40)
    adapter = write_adapter(tmp_path / "lora", {**lora(Q, q, default), **lora(K, k, default)})
    adapted = {
        f"{module}.weight": double(models["tuned"][f"{module}.weight"]) + 6 / 4 * product(made)
        for module, made in ((Q, q), (K, k))
    }
    check(tmp_path, models, adapted, adapter)


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"use_rslora": True}, 6 / 2),
        ({"alpha_pattern": {"q_proj": 16}}, 4),
        ({"alpha_pattern": {r"layers\.0\.self_attn\.(q|v)_proj": 2}}, 0.5),
        ({"alpha_pattern": {"proj": 16}, "rank_pattern": {"v_proj": 9}}, 6 / 4),
        ({"alpha_pattern": {r"layers\.[02]\.self_attn\..*": 16}}, 4),
        ({"r": 9, "rank_pattern": {"q_proj": 4}}, 6 / 4),
    ],
)
def test_factors(
    tmp_path: Path,
    models: dict[str, Tensors],
    generator: torch.Generator,
    config: dict[str, Any],
    factor: float,
) -> None:
    q = factors(generator, 60, 40)
    adapter = write_adapter(tmp_path / "lora", lora(Q, q), **config)
    name = f"{Q}.weight"
    check(tmp_path, models, {name: double(models["tuned"][name]) + factor * product(q)}, adapter)


def test_dora(tmp_path: Path, models: dict[str, Tensors], generator: torch.Generator) -> None:
    q = factors(generator, 60, 40)
    lengths = torch.rand(60, generator=generator) + 0.5
    tensors = {**lora(Q, q), f"{Q}.lora_magnitude_vector": lengths}
    adapter = write_adapter(tmp_path / "lora", tensors, use_dora=True)
    name = f"{Q}.weight"
    whole = double(models["tuned"][name]) + 1.5 * product(q)
    whole *= (double(lengths) / whole.norm(dim=1))[:, None]
    check(tmp_path, models, {name: whole}, adapter)


def test_embeddings(tmp_path: Path, models: dict[str, Tensors], generator: torch.Generator) -> None:
    a, b = torch.randn((4, 50), generator=generator), torch.randn((40, 4), generator=generator)
    tensors = {f"{EMBED}.lora_embedding_A": a, f"{EMBED}.lora_embedding_B": b}
    adapter = write_adapter(tmp_path / "lora", tensors)
    name = f"{EMBED}.weight"
    whole = double(models["tuned"][name]) + 1.5 * (double(b) @ double(a)).T
    check(tmp_path, models, {name: whole}, adapter)


def test_an_embedding_that_was_saved_and_adapted(
    tmp_path: Path, models: dict[str, Tensors], generator: torch.Generator
) -> None:
    """As PEFT writes embeddings that it adapts."""
    a, b = torch.randn((4, 50), generator=generator), torch.randn((40, 4), generator=generator)
    own = torch.randn((50, 40), generator=generator)
    tensors = {
        f"{EMBED}.lora_embedding_A": a,
        f"{EMBED}.lora_embedding_B": b,
        f"{EMBED}.base_layer.weight": own,
    }
    adapter = write_adapter(tmp_path / "lora", tensors)
    whole = double(own) + 1.5 * (double(b) @ double(a)).T
    check(tmp_path, models, {f"{EMBED}.weight": whole}, adapter)


def test_transposed_weights(
    tmp_path: Path, models: dict[str, Tensors], generator: torch.Generator
) -> None:
    """fan_in_fan_out: the layer's inputs are the weight's rows."""
    q = factors(generator, 40, 60)
    adapter = write_adapter(tmp_path / "lora", lora(Q, q), fan_in_fan_out=True)
    name = f"{Q}.weight"
    check(tmp_path, models, {name: double(models["tuned"][name]) + 1.5 * product(q).T}, adapter)


def test_saved_modules(
    tmp_path: Path, models: dict[str, Tensors], generator: torch.Generator
) -> None:
    norm = torch.randn(40, generator=generator)
    embed = torch.randn((50, 40), generator=generator)
    tensors = {
        f"{NORM}.weight": norm,
        f"{EMBED}.modules_to_save.default.weight": embed,
        **lora(Q, factors(generator, 60, 40)),
    }
    adapter = write_adapter(tmp_path / "lora", tensors, modules_to_save=["norm", "embed_tokens"])
    q = {"A": tensors[f"{Q}.lora_A.weight"], "B": tensors[f"{Q}.lora_B.weight"]}
    name = f"{Q}.weight"
    adapted = {
        f"{NORM}.weight": double(norm),
        f"{EMBED}.weight": double(embed),
        name: double(models["tuned"][name]) + 1.5 * product(q),
    }
    check(tmp_path, models, adapted, adapter)


def test_saved_plans_and_going_on(
    tmp_path: Path, models: dict[str, Tensors], generator: torch.Generator
) -> None:
    adapter = write_adapter(tmp_path / "lora", lora(Q, factors(generator, 60, 40)))
    path = recipe(tmp_path, f"{tmp_path}/tuned+{adapter}", "slerp")
    plan = lazymerge.plan(path)
    assert "LoRA, rank 4, 400 parameters, changes 1 tensor" in plan.summary()
    plan.save(tmp_path / "plan.json")

    class Stopper(Silent):
        def finished(self, tensor: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, tmp_path / "out", fsync=False, observer=Stopper())
    assert lazymerge.resume(tmp_path / "out").resumed_tensors >= 1
    run_plan(lazymerge.plan(tmp_path / "plan.json"), tmp_path / "again", fsync=False)
    assert lazymerge.verify(tmp_path / "out", recompute=9).problems == ()
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        tmp_path / "again/model.safetensors"
    ).read_bytes()
    (adapter / "adapter_config.json").write_text(json.dumps({**CONFIG, "lora_alpha": 7}))
    assert lazymerge.plan(path).fingerprint != plan.fingerprint
    with pytest.raises(InputError):
        lazymerge.verify(tmp_path / "out", recompute=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: c.update(peft_type="LOHA"), "only LORA is known"),
        (lambda t, c: c.update(bias="some"), "known are none"),
        (lambda t, c: c.update(r="x"), "no number"),
        (lambda t, c: c.update(r=8), "is of rank 4, adapter_config.json says r: 8"),
        (lambda t, c: c.update(layer_replication=[[0, 1]]), "repeats layers"),
        (lambda t, c: c.update(rank_pattern=[1]), "no mapping"),
        (lambda t, c: c.update(alpha_pattern={"(q)" * 100: 1}), "holds the regular expression"),
        (lambda t, c: c.update(alpha_pattern={"(a+)+b": 1}), "holds the regular expression"),
        (lambda t, c: c.update(alpha_pattern={".*.*q": 1}), "holds the regular expression"),
        (lambda t, c: c.update(alpha_pattern={"(q": 1}), "holds the regular expression"),
        (lambda t, c: t.pop(f"{Q}.lora_B.weight"), "has no lora_B"),
        (lambda t, c: t.update({f"{Q}.lora_B.weight": torch.ones(59, 4)}), "do not fit"),
        (lambda t, c: t.update({"x.lora_A.weight": torch.ones(4, 4)}), "is for 'x.weight'"),
        (lambda t, c: t.update({"x.weight": torch.ones(4)}), "is neither a factor nor"),
        (lambda t, c: t.update({f"{NORM}.weight": torch.ones(4)}), "is neither a factor nor"),
    ],
)
def test_what_cannot_be_folded_is_refused(
    tmp_path: Path,
    models: dict[str, Tensors],
    generator: torch.Generator,
    change: Callable[[Tensors, dict[str, Any]], Any],
    message: str,
) -> None:
    tensors, config = lora(Q, factors(generator, 60, 40)), dict(CONFIG)
    change(tensors, config)
    adapter = write_adapter(tmp_path / "lora", tensors, **config)
    with pytest.raises(InputError, match=message):
        open_model(f"{tmp_path}/tuned+{adapter}")


def test_adapters_that_are_not_there(tmp_path: Path, models: dict[str, Tensors]) -> None:
    with pytest.raises(InputError, match="not found"):
        open_model(f"{tmp_path}/tuned+{tmp_path}/nothing")
    with pytest.raises(InputError, match=r"holds no adapter_config\.json"):
        open_model(f"{tmp_path}/tuned+{tmp_path}/base")


def test_names_with_a_plus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a+b", "c"):
        (tmp_path / name).mkdir()
    assert split_reference("a+b") == ("a+b", None)
    assert split_reference("a+b+c") == ("a+b", "c")
    assert split_reference("c+d+e") == ("c", "d+e")
    assert split_reference("org/x@main+c") == ("org/x@main", "c")
    assert split_reference("c") == ("c", None)
