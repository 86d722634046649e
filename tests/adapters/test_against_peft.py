"""Adapters folded in by lazymerge and by peft's merge_and_unload, kind by kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from merging import plan_of, run

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what peft and transformers think of each other
]

WIDTH, ROWS = 32, 90


def llama() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=ROWS,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=2, n_head=4, vocab_size=ROWS, n_positions=16
    )
    return transformers.GPT2LMHeadModel(config)


PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
LAYERS = ["c_attn", "c_proj", "c_fc"]

KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (llama, {"target_modules": PROJECTIONS, "r": 4, "lora_alpha": 12}),
    "rank patterns": (
        llama,
        {
            "target_modules": PROJECTIONS,
            "r": 4,
            "lora_alpha": 12,
            "rank_pattern": {"v_proj": 2, "^model.layers.1.self_attn.q_proj": 7},
            "alpha_pattern": {"layers.0.mlp.down_proj": 3, "v_proj": 5},
        },
    ),
    "rslora": (llama, {"target_modules": PROJECTIONS, "r": 5, "use_rslora": True}),
    "dora": (llama, {"target_modules": PROJECTIONS, "r": 4, "use_dora": True}),
    "embeddings": (llama, {"target_modules": ["embed_tokens", "lm_head"], "r": 3}),
    "dora of embeddings": (llama, {"target_modules": ["embed_tokens"], "r": 3, "use_dora": True}),
    "modules to save": (
        llama,
        {"target_modules": PROJECTIONS, "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "biases": (llama, {"target_modules": PROJECTIONS, "bias": "all"}),
    "biases of its layers": (llama, {"target_modules": PROJECTIONS, "bias": "lora_only"}),
    "fan in fan out": (gpt2, {"target_modules": LAYERS, "fan_in_fan_out": True, "r": 4}),
    "fan in fan out, square ones": (
        gpt2,
        {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True, "r": 4},
    ),
    "dora, fan in fan out": (
        gpt2,
        {"target_modules": LAYERS, "fan_in_fan_out": True, "use_dora": True, "r": 4},
    ),
    "orthogonal": (llama, {"target_modules": PROJECTIONS, "init_lora_weights": "orthogonal"}),
}


def trained(model: Any, settings: dict[str, Any]) -> Any:
    """A model with an adapter whose tensors are what training might make of them."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "original_module" not in name:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data = parameter.data * 1.1 + noise.to(parameter.dtype)
    return adapted


@pytest.mark.parametrize("name", KINDS)
def test_folded_as_peft_folds_it(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, settings = KINDS[name]
    make().save_pretrained(tmp_path / "base")
    model = type(make()).from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = trained(model, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    before = load_file(tmp_path / "base" / "model.safetensors")
    adapted.merge_and_unload().save_pretrained(tmp_path / "peft")
    expected = load_file(tmp_path / "peft" / "model.safetensors")

    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": f"base+{tmp_path / 'adapter'}"}],
    }
    plan = plan_of(tmp_path, recipe, {})
    merged = run(plan, tmp_path / "merged")
    assert plan.memory.libraries == "numpy"
    assert merged.keys() == before.keys()
    changed = [n for n in before if n in expected and not torch.equal(before[n], expected[n])]
    assert changed
    for tensor in merged:
        if tensor in expected:
            torch.testing.assert_close(merged[tensor], expected[tensor], rtol=2e-6, atol=2e-7)
    (checkpoint,) = plan.checkpoints.values()
    assert checkpoint.adapter is not None
    assert checkpoint.adapter.changed + checkpoint.adapter.replaced >= len(changed)
