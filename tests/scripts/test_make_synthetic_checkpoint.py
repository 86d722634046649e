"""The checkpoints that tests and benchmarks are fed with are what they claim to be."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_synthetic_checkpoint.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[SCRIPT.stem] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


synthetic = load_script()

TINY = synthetic.LlamaShape(
    hidden=32, intermediate=48, layers=2, heads=4, kv_heads=2, vocabulary=300
)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def disk_bytes(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.iterdir())


def test_sparse_13b_takes_no_disk_and_has_the_real_shapes(tmp_path: Path) -> None:
    shape = synthetic.SHAPES["llama2-13b"]
    data_bytes = synthetic.make_checkpoint(tmp_path, shape, dtype="float16", shards=3, sparse=True)

    assert data_bytes == 2 * 13_015_864_320  # the parameter count of Llama 2 13B
    assert disk_bytes(tmp_path) < 10_000_000
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)
    ]
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) < 1.1 * min(sizes)

    shapes: dict[str, list[int]] = {}
    weight_map: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (the handle is no mapping)
                tensor = opened.get_slice(name)
                assert tensor.get_dtype() == "F16"
                shapes[name] = tensor.get_shape()
                weight_map[name] = file.name
    assert len(shapes) == 3 + 40 * 9
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == [32000, 5120]
    assert shapes["model.norm.weight"] == [5120]
    for layer in range(40):
        prefix = f"model.layers.{layer}"
        for projection in "qkvo":
            assert shapes[f"{prefix}.self_attn.{projection}_proj.weight"] == [5120, 5120]
        assert shapes[f"{prefix}.mlp.gate_proj.weight"] == [13824, 5120]
        assert shapes[f"{prefix}.mlp.up_proj.weight"] == [13824, 5120]
        assert shapes[f"{prefix}.mlp.down_proj.weight"] == [5120, 13824]
        assert shapes[f"{prefix}.input_layernorm.weight"] == [5120]
        assert shapes[f"{prefix}.post_attention_layernorm.weight"] == [5120]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": data_bytes}, "weight_map": weight_map}


def test_sparse_data_reads_as_zeros(tmp_path: Path) -> None:
    synthetic.make_checkpoint(tmp_path, TINY, dtype="bfloat16", sparse=True)
    for tensor in load_all(tmp_path).values():
        assert torch.count_nonzero(tensor) == 0


@pytest.mark.parametrize("shards", [1, 3])
def test_random_checkpoint_loads_in_transformers(tmp_path: Path, shards: int) -> None:
    transformers = pytest.importorskip("transformers")
    synthetic.make_checkpoint(
        tmp_path, TINY, dtype="float32", shards=shards, seed=1, tokenizer=True
    )
    model, loading = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert model.dtype == torch.float32
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "héllo wörld \n 你好"
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(tokens[0], skip_special_tokens=True) == text
    with torch.no_grad():
        logits = model(tokens).logits
    assert logits.shape == (1, tokens.shape[1], TINY.vocabulary)
    assert torch.isfinite(logits).all()


def test_random_values_have_the_moments_asked_for(tmp_path: Path) -> None:
    shape = synthetic.LlamaShape(256, 512, 1, 4, 4, 1024)
    synthetic.make_checkpoint(tmp_path, shape, dtype="float32", scale=0.05, seed=3)
    tensors = load_all(tmp_path)
    embedding = tensors["model.embed_tokens.weight"].double()
    # 2^18 samples: four standard errors of the mean and of the deviation.
    assert abs(embedding.mean().item()) < 4 * 0.05 / 2**9
    assert embedding.std().item() == pytest.approx(0.05, abs=4 * 0.05 / 2**9.5)
    assert tensors["model.norm.weight"].mean().item() == pytest.approx(1, abs=4 * 0.05 / 2**4)


def test_every_tensor_and_seed_has_values_of_its_own(tmp_path: Path) -> None:
    synthetic.make_checkpoint(tmp_path / "one", TINY, dtype="float32", seed=1)
    synthetic.make_checkpoint(tmp_path / "two", TINY, dtype="float32", seed=2)
    one, two = load_all(tmp_path / "one"), load_all(tmp_path / "two")
    flat = [tensor.flatten()[:32] for tensors in (one, two) for tensor in tensors.values()]
    assert len({tuple(values.tolist()) for values in flat}) == len(flat)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float8_e4m3fn"])
def test_bytes_depend_on_the_seed_alone(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "BLOCK_ELEMENTS", 1 << 10)  # several blocks per tensor
    for name, seed, threads in (("one", 5, 1), ("again", 5, 4), ("other", 6, 1)):
        synthetic.make_checkpoint(
            tmp_path / name, TINY, dtype=dtype, shards=2, seed=seed, threads=threads
        )
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    file_name = "model-00001-of-00002.safetensors"
    one, other = ((tmp_path / name / file_name).read_bytes() for name in ("one", "other"))
    assert len(one) == len(other)
    assert one != other


def test_perturbation_adds_a_small_difference_to_every_float(tmp_path: Path) -> None:
    base_folder, tuned_folder = tmp_path / "base", tmp_path / "tuned"
    synthetic.make_checkpoint(base_folder, TINY, dtype="float32", seed=1, tokenizer=True)
    synthetic.perturb_checkpoint(tuned_folder, base_folder, scale=0.001, seed=2, shards=2)
    base, tuned = load_all(base_folder), load_all(tuned_folder)
    assert base.keys() == tuned.keys()
    differences = torch.cat([(tuned[name] - base[name]).flatten() for name in base])
    assert differences.std().item() == pytest.approx(0.001, rel=0.05)
    assert differences.abs().max().item() < 0.001 * 7
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tuned_folder / name).read_bytes() == (base_folder / name).read_bytes()


def test_perturbation_converts_dtype_and_copies_integers(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base_folder = tmp_path / "base"
    base_folder.mkdir()
    stored = {"weight": torch.ones(5, 3), "ids": torch.arange(7), "empty": torch.zeros(0, 4)}
    save_file(stored, base_folder / "model.safetensors")
    (base_folder / "config.json").write_text('{"torch_dtype": "float32"}')
    synthetic.perturb_checkpoint(tmp_path / "out", base_folder, dtype="float16", scale=0.0)
    out = load_all(tmp_path / "out")
    assert torch.equal(out["ids"], stored["ids"])
    assert torch.equal(out["weight"], stored["weight"].half())
    assert out["empty"].shape == (0, 4)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float16"


@pytest.mark.parametrize("count", [1, 2, 5, 20, 21])
def test_shards_cover_all_tensors_in_order_and_none_is_empty(count: int) -> None:
    tensors = synthetic.llama_tensors(TINY, "float16")
    shards = synthetic.split_into_shards(tensors, count)
    assert len(shards) == count
    assert all(shards)
    assert [tensor for shard in shards for tensor in shard] == tensors


def test_finished_model_is_replaced_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path), "--random", "--hidden=8", "--intermediate=8", "--layers=1"]
    arguments += ["--heads=2", "--kv-heads=1", "--vocabulary=16", "--shards"]
    assert synthetic.main([*arguments, "3"]) == 0
    assert synthetic.main([*arguments, "1"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert synthetic.main([*arguments, "1", "--overwrite"]) == 0
    # No shard and no index of the earlier model is left to be mistaken for the new one's.
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--random", "--shape=llama-0.1b", "--heads=7"], "no multiple of heads"),
        (["--sparse", "--shape=llama-0.1b", "--kv-heads=5"], "no multiple of kv_heads"),
        (["--sparse", "--shape=llama-0.1b", "--layers=0"], "layers must be at least 1"),
        (["--sparse", "--shape=llama-0.1b", "--shards=1000"], "shards must be between"),
        (["--sparse", "--shape=llama-0.1b", "--vocabulary=9", "--tokenizer"], "no room"),
        (["--perturb-of=nowhere"], "nowhere: no config.json"),
    ],
)
def test_models_that_make_no_sense_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert synthetic.main([str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()
