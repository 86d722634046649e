"""Pairing float8 weights with their scales, and every scale that is not understood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lazymerge.checkpoint import open_checkpoint
from lazymerge.checkpoint.block_scales import dequantised_config
from lazymerge.checkpoint.tensor import BlockScale
from lazymerge.errors import InputError

from conftest import write_checkpoint

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 64]},
    "hidden_size": 3,
}

FLOAT8 = torch.float8_e4m3fn
W, S = "model.layers.0.q_proj.weight", "model.layers.0.q_proj.weight_scale_inv"


def weight(*shape: int) -> torch.Tensor:
    return torch.ones(shape).to(FLOAT8)


def sound() -> dict[str, torch.Tensor]:
    return {
        W: weight(129, 128),
        S: torch.ones(2, 2),
        "model.norm.weight": torch.ones(3),
        "model.layers.0.scale": torch.ones(3),  # a layer's own
        "logit_scale": torch.ones(()),
    }


def test_scales_go_with_their_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, sound(), CONFIG, shards=2)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.tensors.keys() == sound().keys() - {S}
    scale = checkpoint.tensors[W].scale
    assert isinstance(scale, BlockScale)
    assert (scale.tensor.name, scale.tensor.shape, scale.block) == (S, (2, 2), (128, 64))
    assert scale.tensor.file != checkpoint.tensors[W].file
    assert checkpoint.tensors[W].value_dtype == "BF16"
    assert checkpoint.tensors[W].stored.scale is None
    assert checkpoint.parameter_count == 129 * 128 + 3 + 3 + 1
    assert dequantised_config(checkpoint) == {"model_type": "deepseek_v3", "hidden_size": 3}
    assert checkpoint.notices == (
        "dequantises 1 float8 tensor while reading, to be taken as bfloat16",
    )


def test_float8_without_scales_is_what_it_is(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {W: weight(4, 4), "norm.scale": torch.ones(2)}, {"a": 1})
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.tensors[W].scale is None
    assert checkpoint.tensors[W].value_dtype == "F8_E4M3"
    assert dequantised_config(checkpoint) == {"a": 1}
    assert not checkpoint.notices


def test_scales_of_models_that_are_not_float8_are_tensors_like_others(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(2, 2), "a.weight_scale": torch.ones(2)}
    write_checkpoint(tmp_path, tensors)
    assert open_checkpoint(str(tmp_path)).tensors.keys() == tensors.keys()


def quantization(**changes: Any) -> dict[str, Any]:
    return {**CONFIG, "quantization_config": {**CONFIG["quantization_config"], **changes}}


P = W.removesuffix("weight")
BROKEN: dict[str, tuple[dict[str, torch.Tensor], Any, str]] = {
    "no config": (sound(), None, "blocks whose size is not known"),
    "no quantization": (sound(), {"model_type": "x"}, "blocks whose size is not known"),
    "quantization of a kind": (sound(), {"quantization_config": 3}, "size is not known"),
    "other method": (sound(), quantization(quant_method="gptq"), "size is not known"),
    "no size": (sound(), quantization(weight_block_size=None), "size is not known"),
    "three sizes": (sound(), quantization(weight_block_size=[1, 2, 3]), "size is not known"),
    "size of zero": (sound(), quantization(weight_block_size=[0, 1]), "size is not known"),
    "size of a truth": (sound(), quantization(weight_block_size=[True, 1]), "size is not known"),
    "huge size": (sound(), quantization(weight_block_size=[2**70, 1]), "size is not known"),
    "other size": (sound(), quantization(weight_block_size=[64, 64]), "need [3, 2]"),
    "scale alone": ({S: torch.ones(2, 2)}, CONFIG, "has no float8 tensor"),
    "scale of bfloat16": (
        {**sound(), W: torch.ones(129, 128).bfloat16()}, CONFIG, "has no float8 tensor"),
    "weight alone": ({W: weight(4, 4)}, CONFIG, "though config.json says that it is quantised"),
    "a second weight alone": (
        {**sound(), "x.weight": weight(4, 4)}, CONFIG, "'x.weight' is float8, and has no"),
    "scale of other shape": ({**sound(), S: torch.ones(2, 3)}, CONFIG, "has shape [2, 3]"),
    "transposed scale": (
        {W: weight(256, 64), S: torch.ones(1, 2)}, CONFIG, "need [2, 1]"),
    "one scale": ({**sound(), S: torch.ones(())}, CONFIG, "only floats for matrices"),
    "integer scale": ({**sound(), S: torch.ones(2, 2).int()}, CONFIG, "only floats for matrices"),
    "float8 scale": ({**sound(), S: weight(2, 2)}, CONFIG, "only floats for matrices"),
    "vector": ({W: weight(4), S: torch.ones(1)}, CONFIG, "only floats for matrices"),
    "experts in one": (
        {W: weight(2, 4, 4), S: torch.ones(2, 1, 1)}, CONFIG, "only floats for matrices"),
    "per tensor": ({W: weight(4, 4), f"{P}weight_scale": torch.ones(())}, None, "is not known"),
    "of activations": ({**sound(), f"{P}input_scale": torch.ones(())}, CONFIG, "is not known"),
    "ComfyUI": ({W: weight(4, 4), f"{P}scale_weight": torch.ones(())}, None, "is not known"),
    "bare": ({W: weight(4, 4), f"{P}scale": torch.ones(())}, None, "is not known"),
    "of experts": (
        {"e.down_proj": weight(4, 4), "e.down_proj_scale": torch.ones(1)}, None, "is not known"),
    "at the top": ({"weight": weight(4, 4), "weight_scale": torch.ones(1)}, None, "is not known"),
    "zero points": ({W: weight(4, 4), f"{P}zero_point": torch.ones(1)}, None, "is not known"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_understood_is_an_error(name: str, tmp_path: Path) -> None:
    tensors, config, expected = BROKEN[name]
    write_checkpoint(tmp_path, tensors)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as error:
        open_checkpoint(str(tmp_path))
    message = str(error.value)
    assert message.startswith(f"{tmp_path}: tensor '")
    assert expected in message
    assert message.endswith(".")
    assert "\n" not in message
