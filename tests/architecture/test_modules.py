"""Parts of models with several layer stacks, and what stands before and after layers."""

from __future__ import annotations

import pytest
from lazymerge.architecture import find_layer_stacks
from lazymerge.architecture.modules import is_before_layers, split_into_modules

LLAVA = [
    "language_model.lm_head.weight",
    "language_model.model.embed_tokens.weight",
    *(f"language_model.model.layers.{n}.mlp.weight" for n in range(3)),
    "multi_modal_projector.linear_1.weight",
    "vision_tower.embeddings.patch_embedding.weight",
    *(f"vision_tower.encoder.layers.{n}.mlp.weight" for n in range(2)),
]
QWEN = [
    "lm_head.weight",
    "model.embed_tokens.weight",
    *(f"model.layers.{n}.mlp.weight" for n in range(3)),
    *(f"visual.blocks.{n}.mlp.weight" for n in range(2)),
    "visual.merger.ln_q.weight",
]
T5 = [
    *(f"decoder.block.{n}.layer.0.weight" for n in range(2)),
    *(f"encoder.block.{n}.layer.0.weight" for n in range(2)),
    "encoder.final_layer_norm.weight",
    "shared.weight",
]


def split(names: list[str], *modules: str) -> dict[str, list[str]]:
    found = split_into_modules(names, find_layer_stacks(names), modules)
    return {module: own for module, (own, _) in found.items()}


@pytest.mark.parametrize(
    ("names", "modules"),
    [
        (LLAVA, ["text_decoder", "vision_tower", "multi_modal_projector"]),
        (LLAVA, ["language_model.model.layers", "vision_tower.encoder.layers", "linear_1"]),
        (QWEN, ["text_decoder", "vision_tower", "multi_modal_projector"]),
        (QWEN, ["visual", "model.layers"]),
        (T5, ["encoder", "decoder", "shared"]),
    ],
)
def test_every_tensor_has_one_place(names: list[str], modules: list[str]) -> None:
    found = split(names, *modules)
    assert [*found] == [*dict.fromkeys(found)]
    assert sorted(name for own in found.values() for name in own) == sorted(names)


def test_whose_is_what() -> None:
    found = split(QWEN, "text_decoder", "vision_tower", "multi_modal_projector")
    assert found["multi_modal_projector"] == ["visual.merger.ln_q.weight"]
    assert found["text_decoder"] == [n for n in QWEN if not n.startswith("visual")]
    assert "encoder.final_layer_norm.weight" in split(T5, "encoder")["encoder"]
    assert split(T5[2:], "default")["default"]


@pytest.mark.parametrize("module", ["nothing", "block", "default"])
def test_names_that_fit_nothing_or_several(module: str) -> None:
    with pytest.raises(KeyError):
        split(T5, module)
    with pytest.raises(KeyError):
        split(T5, "encoder", "encoder.block")


@pytest.mark.parametrize(
    ("name", "is_before"),
    [
        ("model.embed_tokens.weight", True),
        ("transformer.wpe.weight", True),
        ("embeddings.LayerNorm.bias", True),
        ("model.encoder.conv1.weight", True),
        ("vision_model.layernorm_pre.weight", True),
        ("shared.weight", True),
        ("model.norm.weight", False),
        ("lm_head.weight", False),
        ("embed_out.weight", False),
        ("transformer.ln_f.bias", False),
        ("score.weight", False),
        ("backbone.norm_f.weight", False),
        ("cls.predictions.decoder.weight", False),
    ],
)
def test_before_and_after_the_layers(name: str, is_before: bool) -> None:
    assert is_before_layers(name) is is_before
