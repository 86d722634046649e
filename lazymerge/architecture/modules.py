"""The parts of a model that has several layer stacks, and what recipes call them.

A tensor belongs to the stack that shares the longest beginning of its name with it; heads and
projectors share none. Recipes name parts in words of their own ("text_decoder"); the tables below
say which words of tensors' names these stand for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from .layers import LayerStack, LayerStacks
from .roles import Role, tensor_role

_SIGHT = ("vision_tower", "vision_model", "visual", "vision", "image_encoder", "vit")
_SOUND = ("audio_tower", "audio_model", "audio_encoder", "audio")
_LANGUAGE = ("language_model", "text_model", "llm", "language")

_STACK_WORDS: Mapping[str, Sequence[str]] = {
    "text_decoder": _LANGUAGE,
    "language_model": _LANGUAGE,
    "text_model": _LANGUAGE,
    "vision_tower": _SIGHT,
    "vision_model": _SIGHT,
    "visual": _SIGHT,
    "audio_tower": _SOUND,
}
"""Words of a stack's prefix that a module's name stands for."""

_LOOSE_WORDS: Mapping[str, Sequence[str]] = {
    "multi_modal_projector": (
        "multi_modal_projector",
        "mm_projector",
        "merger",
        "deepstack_merger_list",
        "connector",
    ),
}
"""The same for modules without a stack."""

_BEFORE = re.compile(
    r"emb|wte|wpe|shared|patch|position|class_token|cls_token|conv[0-9]|conv_stem|ln_pre|"
    r"layernorm_pre|pre_layer|slopes|inv_freq|token_type|merger|projector",
    re.IGNORECASE,
)
"""What stands before the layers, if it is no output head."""


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside the layers is applied before them: embeddings and the like."""
    return (
        tensor_role(name, (1,) if name.endswith(".bias") else (1, 1)) is not Role.OUTPUT_HEAD
        and "embed_out" not in name
        and _BEFORE.search(name) is not None
    )


def split_into_modules(
    names: Collection[str], stacks: LayerStacks, modules: Iterable[str]
) -> dict[str, tuple[list[str], LayerStack | None]]:
    """The tensors of each module, and its layer stack if it has one.

    names: of all tensors, in order. stacks: of the model. modules: as the recipe names them.

    Raises:
        KeyError: a module's name that fits no part, or several alike.
    """
    owners = {name: owner(name, stacks) for name in names}
    found: dict[str, tuple[list[str], LayerStack | None]] = {}
    rest = dict.fromkeys(names)
    chosen: dict[str, LayerStack] = {}
    loose = []
    for module in modules:
        stack = _stack_of(module, stacks)
        if stack is None:
            loose.append(module)
        elif stack in chosen.values():
            raise KeyError(module)
        else:
            chosen[module] = stack
    for module in loose:  # they may lie within another module's part
        words = _LOOSE_WORDS.get(module, (module,))
        own = [name for name in rest if any(word in name.split(".") for word in words)]
        if not own:
            raise KeyError(module)
        found[module] = own, None
        for name in own:
            del rest[name]
    for module, stack in chosen.items():
        own = [name for name in rest if owners[name] == stack]
        found[module] = own, stack
        for name in own:
            del rest[name]
    _give_heads([name for name in rest if owners[name] is None], found)
    for module, (own, stack) in found.items():
        members = set(own)
        found[module] = [name for name in names if name in members], stack
    return found


def _give_heads(
    rest: Iterable[str], found: Mapping[str, tuple[list[str], LayerStack | None]]
) -> None:
    """Output heads that share their name's beginning with nothing are the language model's."""
    writers = [
        module
        for module, (_, stack) in found.items()
        if stack is not None and not _has_word(stack, (*_SIGHT, *_SOUND, "encoder"))
    ]
    if len(writers) != 1:
        return
    for name in rest:
        if not is_before_layers(name) and "." in name and not name.startswith("model."):
            found[writers[0]][0].append(name)


def owner(name: str, stacks: LayerStacks) -> LayerStack | None:
    """The stack with which a name has most words in common; None where it has none, or two."""
    words = name.split(".")
    best, most, is_tie = None, 0, False
    for stack in stacks:
        common = 0
        for word, other in zip(words, stack.prefix.split("."), strict=False):
            if word != other:
                break
            common += 1
        if common > most:
            best, most, is_tie = stack, common, False
        elif common == most:
            is_tie = True
    return None if is_tie else best


def _stack_of(module: str, stacks: LayerStacks) -> LayerStack | None:
    """The stack that a module's name stands for; None if it stands for none.

    Raises:
        KeyError: it may stand for several.
    """
    if module == "default" and len(stacks) == 1:
        return next(iter(stacks))
    words = _STACK_WORDS.get(module, (module,))
    fitting = [s for s in stacks if s.prefix == module or _has_word(s, words)]
    if not fitting and module in ("text_decoder", "language_model", "text_model", "decoder"):
        fitting = [s for s in stacks if not _has_word(s, (*_SIGHT, *_SOUND, "encoder"))]
    if len(fitting) > 1:
        raise KeyError(module)
    return fitting[0] if fitting else None


def _has_word(stack: LayerStack, words: Collection[str]) -> bool:
    return any(word in stack.prefix.split(".") for word in words)
