"""LoRA adapters as PEFT writes them: a folder with adapter_config.json and safetensors.

    base_model.model.<module>.lora_A.weight   (r × in)       W + factor · B A
    base_model.model.<module>.lora_B.weight   (out × r)
    …lora_magnitude_vector                    (out)          DoRA: every row scaled to this length
    …lora_embedding_A, …lora_embedding_B      (r × V, d × r) of embeddings: W + factor · (B A)ᵀ
    base_model.model.<name>                   (any)          modules_to_save: replaces the model's

`.default` may stand after lora_A and the like. Source: the behaviour of PEFT, tuners/lora.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import InputError
from .folder import open_checkpoint
from .header import read_header
from .json_file import read_json_mapping
from .tensor import DTYPES, Checkpoint, FileInfo, LowRank, TensorInfo
from .wording import quoted

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_LIMIT_BYTES = 10_000_000
CONFIG_LIMIT_VALUES = 100_000
PREFIX = "base_model.model."
PATTERN_LIMIT = 200
"""Characters of a pattern for ranks or alphas: they are regular expressions."""

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector)(\.default)?(\.weight)?"
)
_UNSUPPORTED = {
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "aLoRA",
    "trainable_token_indices": "trainable tokens",
    "layer_replication": "replicated layers",
    "target_parameters": "adapted parameters that are no modules' weights",
}
"""Settings under which a weight is not W + factor · B A."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on disk.

    folder: absolute. file: its weights. tensors: by name, without the prefix.
    config: of adapter_config.json.
    """

    folder: str
    file: FileInfo
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, object]
    header_bytes_read: int


def split_reference(reference: str) -> tuple[str, str] | None:
    """Model and adapter of a `model+adapter`; None if it is a model's alone. A path that is there
    is one, whatever its name."""
    if "+" not in reference or os.path.lexists(os.path.expanduser(reference)):
        return None
    places = [place for place, character in enumerate(reference) if character == "+"]
    there = (p for p in places if os.path.lexists(os.path.expanduser(reference[:p])))
    place = next(there, places[0])
    return reference[:place], reference[place + 1 :]


def open_adapter(reference: str) -> Adapter:
    """An adapter's config and header; no tensor is read.

    reference: a local folder; `~` is expanded.

    Raises:
        InputError: it is none, or of a kind that cannot be folded into weights.
    """
    folder = Path(os.path.realpath(os.path.expanduser(reference)))
    if not folder.is_dir():
        raise InputError(
            f"adapter {quoted(reference)}: is no folder (resolved to {folder}). Name the folder "
            f"that holds {CONFIG_NAME}; adapters of the Hub are to be downloaded first."
        )
    if not (folder / WEIGHTS_NAME).exists():
        raise InputError(
            f"{folder}: has no {WEIGHTS_NAME}; adapters in other formats are not read. Load it "
            "with peft and save it again."
        )
    config, config_bytes = read_json_mapping(
        folder / CONFIG_NAME, CONFIG_LIMIT_BYTES, limit_values=CONFIG_LIMIT_VALUES
    )
    _check_config(config, folder / CONFIG_NAME)
    header = read_header(folder / WEIGHTS_NAME, WEIGHTS_NAME)
    tensors = {tensor.name.removeprefix(PREFIX): tensor for tensor in header.tensors}
    return Adapter(str(folder), header.file, tensors, config, header.bytes_read + config_bytes)


def with_adapter(model: Checkpoint, adapter: Adapter, reference: str) -> Checkpoint:
    """The model with an adapter's products beside its tensors.

    reference: as the recipe writes both.

    Raises:
        InputError: the adapter is not one of this model.
    """
    path = os.path.join(adapter.folder, WEIGHTS_NAME)
    parts: dict[str, dict[str, TensorInfo]] = {}
    saved: dict[str, TensorInfo] = {}
    for name, tensor in adapter.tensors.items():
        match = _PART.fullmatch(name)
        if match:
            parts.setdefault(match["module"], {})[match["part"]] = tensor
        else:
            saved[name.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")] = (
                tensor
            )
    tensors = dict(model.tensors)
    for name, tensor in saved.items():
        before = tensors.get(name)
        if before is None or before.shape != tensor.shape:
            raise InputError(
                f"{path}: holds {quoted(tensor.name)} of shape {list(tensor.shape)}, and "
                f"{model.reference} has "
                + ("no such tensor" if before is None else f"one of shape {list(before.shape)}")
                + ". The adapter is of another model."
            )
        tensors[name] = replace(tensor, folder=adapter.folder)
    for module, own in parts.items():
        name = f"{module}.weight"
        if name not in tensors:
            raise InputError(
                f"{path}: adapts {quoted(module)}, and {model.reference} has no tensor "
                f"{quoted(name)}. The adapter is of another model."
            )
        tensors[name] = replace(
            tensors[name], low_rank=_low_rank(module, own, tensors[name], adapter, path)
        )
    file = replace(adapter.file, path=path)
    return replace(
        model,
        reference=reference,
        tensors=tensors,
        files=(*model.files, file),
        header_bytes_read=model.header_bytes_read + adapter.header_bytes_read,
        notices=(
            *model.notices,
            f"with the adapter {adapter.folder}: rank {_ranks(tensors)}, {len(parts)} weights"
            + (f"; {len(saved)} tensors are the adapter's own" if saved else ""),
        ),
    )


def open_model(reference: str) -> Checkpoint:
    """A model, or a model with an adapter (`model+adapter`); as `open_checkpoint`, `open_adapter`
    and `with_adapter`."""
    parts = split_reference(reference)
    if parts is None:
        return open_checkpoint(reference)
    return with_adapter(open_checkpoint(parts[0]), open_adapter(parts[1]), reference)


def _check_config(config: Mapping[str, object], path: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"{path}: peft_type is {str(kind)[:40]!r}; only LORA adapters can be folded into "
            "weights. Merge it with peft first."
        )
    bias = config.get("bias", "none")
    if bias != "none":
        raise InputError(
            f"{path}: bias is {str(bias)[:40]!r}: the adapter changes biases, which is not "
            "supported. Merge it with peft first."
        )
    for key, words in _UNSUPPORTED.items():
        if config.get(key):
            raise InputError(
                f"{path}: {words} ({key}) are not supported. Merge it with peft first."
            )
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if type(value) not in (int, float) or not math.isfinite(float(str(value))):
            raise InputError(f"{path}: {key} is {str(value)[:40]!r}, not a number. Save it again.")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(
            len(name) <= PATTERN_LIMIT and type(value) in (int, float)
            for name, value in patterns.items()
        ):
            raise InputError(f"{path}: {key} is not a mapping of short names to numbers.")


def _low_rank(
    module: str,
    parts: Mapping[str, TensorInfo],
    weight: TensorInfo,
    adapter: Adapter,
    path: str,
) -> LowRank:
    is_embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
    missing = [name for name in names if name not in parts]
    if missing:
        raise InputError(f"{path}: {module} has no {missing[0]}. Download the adapter again.")
    a, b = (parts[name] for name in names)
    magnitude = parts.get("lora_magnitude_vector")
    is_turned = is_embedding or adapter.config.get("fan_in_fan_out") is True
    rows, columns = (*weight.shape, 0, 0)[:2]
    expected = (columns, rows) if is_turned else (rows, columns)
    fits = (
        len(weight.shape) == len(a.shape) == len(b.shape) == 2
        and a.shape[0] == b.shape[1] > 0
        and (b.shape[0], a.shape[1]) == expected
        and all(DTYPES[part.dtype].is_float for part in (weight, a, b))
    )
    if not fits:
        raise InputError(
            f"{path}: {module}: A of {list(a.shape)} and B of {list(b.shape)} do not fit a weight "
            f"of {list(weight.shape)}. The adapter is of another model, or of a kind that is not "
            "supported (convolutions, experts in one tensor): merge it with peft first."
        )
    if magnitude is not None and (is_turned or magnitude.element_count != rows):
        raise InputError(
            f"{path}: {module}: DoRA of embeddings or transposed weights is not supported. Merge "
            "it with peft first."
        )
    return LowRank(
        adapter.folder,
        a,
        b,
        _factor(module, a.shape[0], adapter.config, path),
        is_turned,
        magnitude,
    )


def _factor(module: str, rank: int, config: Mapping[str, object], path: str) -> float:
    """alpha / r, or alpha / √r."""
    wanted = _of_pattern(config.get("rank_pattern"), module, config["r"], path)
    if wanted != rank:
        raise InputError(
            f"{path}: {module} has rank {rank}, {CONFIG_NAME} says {wanted:g}. Download the "
            "adapter again."
        )
    alpha = _of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"], path)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)


def _of_pattern(patterns: object, module: str, default: object, path: str) -> float:
    """A module's number: that of the first pattern that is the end of its name, at a dot."""
    for pattern, value in (patterns if isinstance(patterns, dict) else {}).items():
        if module == pattern or module.endswith(f".{pattern}") or _matches(pattern, module, path):
            return float(value)
    return float(str(default))


def _matches(pattern: str, module: str, path: str) -> bool:
    """Patterns are regular expressions. One repetition may stand in them, of no group: no name can
    make that slow.

    Raises:
        InputError: it is more than that.
    """
    repetitions = len(re.findall(r"[*+?{]", pattern))
    is_plain = re.fullmatch(r"[\w.\\|()\[\]^$*+-]*", pattern) is not None
    try:
        if is_plain and repetitions <= 1 and not re.search(r"\)[*+]", pattern):
            return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
    except re.error:
        pass
    raise InputError(
        f"{path}: the pattern {quoted(pattern)} in {CONFIG_NAME} is not supported: names, "
        "alternatives and one repetition are. Merge the adapter with peft first."
    )


def _ranks(tensors: Mapping[str, TensorInfo]) -> str:
    ranks = {t.low_rank.a.shape[0] for t in tensors.values() if t.low_rank is not None}
    return f"{min(ranks)} to {max(ranks)}" if len(ranks) > 1 else str(next(iter(ranks), 0))
