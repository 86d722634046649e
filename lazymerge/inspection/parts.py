"""What a model's parameters are for, from names alone: embeddings, attention, experts …"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..architecture.config import TEXT_CONFIGS
from ..architecture.roles import Role, tensor_role
from ..checkpoint.tensor import Checkpoint, TensorInfo

PARTS = ("embeddings", "attention", "MLP", "experts", "router", "norms", "head", "other")

_NORM = re.compile(r"(^|[._])(ln(_\w+|\d*)|\w*norm\w*)([._]|$)", re.IGNORECASE)
_EXPERT = re.compile(r"\.experts\.(?:(\d{1,6})\.)?")
_ROUTER = re.compile(r"(^|\.)(gate|router|gate_proj_router)(\.\w+)?\.(weight|bias|wg\.weight)$")
_DENSE_GATE = re.compile(r"shared_expert_gate|gate_proj|gate_up_proj")
_ATTENTION = re.compile(r"attn|attention|(^|\.)[qkvo]_proj", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|feed_forward|ffn|(^|\.)(fc|w|lin)\d|shared_expert|dense_h_to|intermediate|output\.dense"
    r"|DenseReluDense",
    re.IGNORECASE,
)
_POSITIONS = re.compile(r"position_embedding|(^|\.)wpe\.|token_type_embedding|patch_embed")

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")

MOST_EXPERTS = 1_000_000


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors of a model that do the same.

    name: one of PARTS. tensors: how many. parameters: elements of all.
    active: elements that one token is computed with; None: not known.
    """

    name: str
    tensors: int
    parameters: int
    size_bytes: int
    active: int | None


def part_of(name: str, shape: tuple[int, ...]) -> str:
    """The part that a tensor belongs to."""
    role = tensor_role(name, shape)
    if role is Role.INPUT_EMBEDDING or _POSITIONS.search(name):
        return "embeddings"
    if role is Role.OUTPUT_HEAD:
        return "head"
    if _NORM.search(name):
        return "norms"
    if _EXPERT.search(name):
        return "experts"
    if _ROUTER.search(name) and not _DENSE_GATE.search(name):
        return "router"
    if _ATTENTION.search(name):
        return "attention"
    return "MLP" if _MLP.search(name) else "other"


def parts_of(checkpoint: Checkpoint) -> tuple[Part, ...]:
    """A model's parts, in the order of PARTS; those that it has not are left out."""
    grouped: dict[str, list[TensorInfo]] = {}
    for name, tensor in checkpoint.tensors.items():
        grouped.setdefault(part_of(name, tensor.shape), []).append(tensor)
    share = _active_share(checkpoint.config or {}, grouped.get("experts", ()))
    return tuple(_part(name, grouped[name], share) for name in PARTS if name in grouped)


def active_parameters(parts: Iterable[Part]) -> int | None:
    """Elements that one token is computed with; None where there are no experts, or where it is
    not known how many of them are used."""
    parts = list(parts)
    if not any(part.name == "experts" for part in parts):
        return None
    known = [part.active for part in parts if part.active is not None]
    return sum(known) if len(known) == len(parts) else None


def whole_number(config: Mapping[str, object], *keys: str) -> int | None:
    """The first of some keys that is a whole number above 0, in a config or its text config."""
    inner = [config, *(config.get(key) for key in TEXT_CONFIGS)]
    for each in inner:
        if isinstance(each, dict):
            for key in keys:
                value = each.get(key)
                if type(value) is int and 0 < value < 1 << 53:
                    return value
    return None


def _part(name: str, tensors: list[TensorInfo], share: float | None) -> Part:
    parameters = sum(tensor.element_count for tensor in tensors)
    active: int | None = parameters
    if name == "experts":
        active = None if share is None else round(parameters * share)
    size = sum(tensor.size_bytes for tensor in tensors)
    return Part(name, len(tensors), parameters, size, active)


def _active_share(config: Mapping[str, object], experts: Iterable[TensorInfo]) -> float | None:
    """The share of the experts that one token passes through."""
    used = whole_number(config, *_EXPERTS_PER_TOKEN)
    numbers = {match[1] for tensor in experts if (match := _EXPERT.search(tensor.name))} - {None}
    count = len(numbers) or whole_number(config, *_EXPERT_COUNTS)
    if used is None or count is None or not 0 < used <= count <= MOST_EXPERTS:
        return None
    return used / count
