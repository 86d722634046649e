"""Adapters folded in by lazymerge and by peft's merge_and_unload, kind by kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lazymerge.adapters import open_model
from lazymerge.errors import InputError
from safetensors.torch import load_file, save_file

from merging import plan_of, run

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what peft and transformers think of each other
]

WIDTH, ROWS = 32, 90
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def llama(*, is_tied: bool = False) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=ROWS,
        attention_bias=True,
        tie_word_embeddings=is_tied,
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


FACTORS_OF_HEAD = {"target_modules": ["lm_head", "q_proj"], "r": 3}
SAVED_EMBEDDING = {"modules_to_save": ["embed_tokens"], "target_modules": PROJECTIONS}

TIED: dict[str, tuple[dict[str, Any], bool]] = {
    "the embedding": ({"target_modules": ["embed_tokens", "q_proj"], "r": 3}, True),
    "the head": (FACTORS_OF_HEAD, True),
    "dora of the embedding": ({"target_modules": ["embed_tokens"], "use_dora": True}, True),
    "dora of the head": ({"target_modules": ["lm_head"], "use_dora": True}, True),
    "saved head": ({"modules_to_save": ["lm_head"], "target_modules": PROJECTIONS}, False),
    "saved embedding": (SAVED_EMBEDDING, False),
    "both saved": (SAVED_EMBEDDING | {"modules_to_save": ["lm_head", "embed_tokens"]}, False),
    "saved embedding, and the head": (SAVED_EMBEDDING | FACTORS_OF_HEAD, False),
    "saved and kept tied": (SAVED_EMBEDDING | {"ensure_weight_tying": True}, True),
    "none of the two": ({"target_modules": PROJECTIONS}, True),
}
"""Settings, and whether the result is tied."""


@pytest.mark.parametrize("stores_head", [False, True])
@pytest.mark.parametrize("name", TIED)
def test_models_that_tie_head_and_embedding(name: str, stores_head: bool, tmp_path: Path) -> None:
    """As with peft, where both are one matrix; a copy of it that is stored is none of it."""
    torch.manual_seed(0)
    settings, is_tied = TIED[name]
    if "ensure_weight_tying" in settings:
        pytest.importorskip("peft", "0.18")
    base, file = llama(is_tied=True), tmp_path / "base" / "model.safetensors"
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base", dtype=torch.float32)
    if stores_head:
        stored = load_file(file)
        save_file(stored | {HEAD: stored[EMBEDDING].clone()}, file, metadata={"format": "pt"})
    adapted = trained(model, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.merge_and_unload().state_dict()

    entries = [{"model": f"base+{tmp_path / 'adapter'}"}]
    plan = plan_of(tmp_path, {"merge_method": "passthrough", "models": entries}, {})
    merged = run(plan, tmp_path / "merged")
    assert plan.config is not None
    assert plan.config["tie_word_embeddings"] is is_tied
    assert (HEAD in merged) is not is_tied
    for tensor, value in expected.items():
        found = merged[EMBEDDING] if is_tied and tensor == HEAD else merged[tensor]
        torch.testing.assert_close(found, value, rtol=2e-6, atol=2e-7)
    words = "trained with" if not is_tied else "which is the output head too: both change"
    assert any(words in notice for notice in plan.notices) is (name != "none of the two")


def test_factors_of_a_tied_head_and_its_embedding(tmp_path: Path) -> None:
    """They would be added to one matrix."""
    llama(is_tied=True).save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    settings = {"target_modules": ["lm_head", "embed_tokens"], "r": 3}
    trained(model, settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="both change one matrix"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
