"""Block-quantised float8 tensors, as DeepSeek-V3 ships them, paired with their scales.

    X.weight             F8_E4M3, shape (R, C)
    X.weight_scale_inv   F32, shape (⌈R/r⌉, ⌈C/c⌉): a number for each block of r × c elements
    config.json          quantization_config: {quant_method: fp8, weight_block_size: [r, c]}

    w = weight × scale of its block

The name says inverse and means the factor that dequantises. A paired scale is no tensor of the
model any more: it goes with its weight (TensorInfo.scale), and the weight counts as bfloat16.

Whatever else looks like a scale of float8 weights (per tensor, per channel, of activations) is an
error: weights merged without their scales would be wrong without a word.

Source: DeepSeek-V3, README_WEIGHTS.md and inference/fp8_cast_bf16.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import InputError
from .tensor import DTYPES, BlockScale, Checkpoint, TensorInfo
from .wording import quoted, shown

SUFFIX = "_scale_inv"
CONFIG_KEY = "quantization_config"
METHOD = "fp8"

_SIGNS = ("scale", "zero_point")
"""In the last part of a name: of what quantisers keep beside weights."""

_BLOCK_LIMIT = 1 << 20
"""Rows or columns of a block. In use are 128, and 32 and 64 here and there."""

_REMEDY = "Dequantise the model first, or take its unquantised version."


def with_block_scales(
    tensors: dict[str, TensorInfo], config: Mapping[str, object] | None, folder: Path
) -> dict[str, TensorInfo]:
    """The tensors with scales gone to the weights that they belong to.

    config: the model's, None where it has none. folder: for messages.

    Raises InputError naming a scale that is not understood, or a weight that lacks its own.
    """
    weights = {name for name, tensor in tensors.items() if _is_float8(tensor)}
    if not weights and not any(name.endswith(SUFFIX) for name in tensors):
        return tensors
    paired: dict[str, TensorInfo] = {}
    scales: set[str] = set()
    for name, tensor in tensors.items():
        if name.endswith(SUFFIX):
            weight = tensors.get(name.removesuffix(SUFFIX))
            paired[name.removesuffix(SUFFIX)] = _paired(weight, tensor, config, folder)
            scales.add(name)
        elif _belongs_to(name, weights):
            raise InputError(
                f"{folder}: tensor {quoted(name)} scales float8 weights in a way that is not known "
                f"to this version; known are {SUFFIX} of blocks. {_REMEDY}"
            )
    if _method(config) == METHOD:
        bare = [name for name in tensors if name in weights and name not in paired]
        if bare:
            raise InputError(
                f"{folder}: tensor {quoted(bare[0])} is float8, and has no "
                f"{quoted(bare[0] + SUFFIX)} though config.json says that it is quantised. "
                "Download the model again."
            )
    return {n: paired.get(n, tensor) for n, tensor in tensors.items() if n not in scales}


def dequantised_notices(tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """What a person should know of a model with block scales."""
    count = sum(tensor.scale is not None for tensor in tensors.values())
    if not count:
        return ()
    noun = "tensor" if count == 1 else "tensors"
    return (f"dequantises {count} float8 {noun} while reading, to be taken as bfloat16",)


def dequantised_config(checkpoint: Checkpoint) -> dict[str, object] | None:
    """The config of what a checkpoint's tensors are once they are read: without what says how they
    are quantised, if they were."""
    config = checkpoint.config
    if config is None or all(tensor.scale is None for tensor in checkpoint.tensors.values()):
        return config
    return {key: value for key, value in config.items() if key != CONFIG_KEY}


def _is_float8(tensor: TensorInfo) -> bool:
    return tensor.dtype.startswith("F8_")


def _belongs_to(name: str, weights: set[str]) -> bool:
    """Whether a tensor is beside a float8 weight and called like a scale."""
    prefix, _, last = name.rpartition(".")
    if not any(sign in last for sign in _SIGNS) or name in weights:
        return False
    stem = f"{prefix}." if prefix else ""
    owners = {f"{stem}weight", *(f"{stem}{last.split(f'_{sign}')[0]}" for sign in _SIGNS)}
    return not owners.isdisjoint(weights)


def _paired(
    weight: TensorInfo | None,
    scale: TensorInfo,
    config: Mapping[str, object] | None,
    folder: Path,
) -> TensorInfo:
    """The weight with its scale."""
    where = f"{folder}: tensor {quoted(scale.name)}"
    if weight is None or not _is_float8(weight):
        raise InputError(
            f"{where} has no float8 tensor {quoted(scale.name.removesuffix(SUFFIX))} to scale. "
            f"{_REMEDY}"
        )
    block = _block_size(config)
    if block is None:
        raise InputError(
            f"{where} scales blocks whose size is not known: {CONFIG_KEY} of config.json must say "
            f"quant_method {METHOD} and a weight_block_size of two numbers. Put the model's own "
            "config.json beside its weights."
        )
    if len(weight.shape) != 2 or not (
        DTYPES[scale.dtype].is_float and not _is_float8(scale) and len(scale.shape) == 2
    ):
        raise InputError(
            f"{where} is {scale.dtype} of shape {shown(list(scale.shape))} for a weight of shape "
            f"{shown(list(weight.shape))}; only floats for matrices are known. {_REMEDY}"
        )
    expected = tuple(-(-n // size) for n, size in zip(weight.shape, block, strict=True))
    if scale.shape != expected:
        raise InputError(
            f"{where} has shape {shown(list(scale.shape))}; blocks of {block[0]} × {block[1]} of a "
            f"weight of shape {shown(list(weight.shape))} need {shown(list(expected))}. "
            "Download the model again, config.json included."
        )
    place = (weight.file, weight.start, weight.stop_exclusive)
    scales = BlockScale(scale, block)
    return TensorInfo(weight.name, weight.dtype, weight.shape, *place, scale=scales)


def _method(config: Mapping[str, object] | None) -> object:
    quantization = (config or {}).get(CONFIG_KEY)
    return quantization.get("quant_method") if isinstance(quantization, dict) else None


def _block_size(config: Mapping[str, object] | None) -> tuple[int, int] | None:
    """Rows and columns of a block, None where the config does not say."""
    quantization = (config or {}).get(CONFIG_KEY)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        return None
    size = quantization.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2:
        return None
    if not all(type(n) is int and 0 < n <= _BLOCK_LIMIT for n in size):
        return None
    return size[0], size[1]
