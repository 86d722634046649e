"""What an adapter's tensors are called, and which tensor of the model each is for.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
    └─ wrapper ─────┘└─ module ─────────────────────┘└ part ┘

Versions of PEFT differ: `lora_A.weight` is also `lora_A.default.weight`, after the adapter's name.
The wrapper and what else stands before names is the business of architecture/layouts.py.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST, SECOND, MAGNITUDE, WHOLE = "A", "B", "magnitude", "whole"
"""What a tensor of an adapter is: a factor, the lengths of DoRA, or a tensor of the model."""

PARTS: tuple[tuple[str, str, bool], ...] = (
    ("lora_A", FIRST, False),
    ("lora_B", SECOND, False),
    ("lora_embedding_A", FIRST, True),
    ("lora_embedding_B", SECOND, True),
    ("lora_magnitude_vector", MAGNITUDE, False),
)
"""Words of names; whether they are of an embedding."""

WRAPPERS_OF_WHOLES: tuple[str, ...] = ("modules_to_save", "base_layer")
"""Words between a module's name and its tensor's: the module was wrapped while it was trained."""

ADAPTER_NAME = "default."
"""What an adapter is called unless it is given a name. Those who save it leave the name out."""

UNKNOWN_SIGNS: tuple[str, ...] = ("lora_", "trainable_tokens", "token_adapter")
"""In names of tensors that belong to kinds of adapters that are not known."""

WEIGHT = "weight"


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of an adapter.

    target: name of the tensor that it changes or is, as the adapter would write it.
    kind: FIRST, SECOND, MAGNITUDE or WHOLE.
    is_embedding: of a matrix whose rows are inputs.
    """

    target: str
    kind: str
    is_embedding: bool = False


def part_of(name: str) -> Part | None:
    """What a tensor of an adapter is; None for something that is not known."""
    for word, kind, is_embedding in PARTS:
        module, found, rest = name.rpartition(f".{word}")
        # the adapter's name, and `weight`: each may be there or not
        names = rest.split(".")
        if found and names[0] == "" and len(names) <= 3 and names[-1] != "bias":
            if len(names) == 3 and names[-1] != WEIGHT:
                return None
            return Part(f"{module}.{WEIGHT}", kind, is_embedding)
    if any(sign in name for sign in UNKNOWN_SIGNS):
        return None
    return Part(_unwrapped(name), WHOLE)


def _unwrapped(name: str) -> str:
    for word in WRAPPERS_OF_WHOLES:
        module, found, rest = name.partition(f".{word}.")
        if found:
            return f"{module}.{rest.removeprefix(ADAPTER_NAME)}"
    return name
