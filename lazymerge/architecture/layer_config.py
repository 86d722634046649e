"""What a config says of layers, for an output whose layers were put together from others.

Three kinds of entries: the number of layers, under whatever name; lists with an entry for each
layer (layer_types and the like); lists of layers' numbers. Everything else stays.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from .config import configs_within
from .layers import LayerStack

Config = Mapping[str, object]

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "num_blocks")
_ENCODER_COUNTS = ("encoder_layers", "num_encoder_layers", "num_hidden_layers", "num_layers")
_DECODER_COUNTS = ("decoder_layers", "num_decoder_layers")
_SIGHT = frozenset({"vision_tower", "vision_model", "visual", "vision"})
_SOUND = frozenset({"audio_tower", "audio_model", "audio"})

_NUMBERS_OF_LAYERS = frozenset({"mlp_only_layers", "full_attention_layers", "attn_layer_indices"})
"""Lists of the numbers of layers that are of a kind."""

_LEADING_LAYERS = frozenset({"first_k_dense_replace"})
"""How many layers at the beginning are of a kind."""

_NOT_BY_LAYER = frozenset(
    {
        "architectures",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "suppress_tokens",
        "begin_suppress_tokens",
        "mrope_section",
        "image_grid_pinpoints",
        "keys_to_ignore_at_inference",
    }
)
"""Lists that may happen to be as long as there are layers."""


def with_layers(
    config: Config,
    stack: LayerStack,
    origins: Sequence[tuple[Config | None, int]],
) -> tuple[dict[str, object], list[str]]:
    """The config of a model whose layers have been put together anew.

    config: of the main model. stack: its layers, as they were.
    origins: for every layer of the output the config of the model it is from, and its number there.

    Returns the config, and a sentence for each thing that it cannot say.
    """
    result = copy.deepcopy(dict(config))
    place = _place(result, stack)
    if place is None:
        return result, [f"config.json does not say how many layers {stack.prefix} has"]
    path, inner, keys = place
    for key in keys:
        inner[key] = len(origins)
    others = [_inner_of(other, path) for other, _ in origins]
    said = []
    for key in list(inner):
        value = inner[key]
        if key in _LEADING_LAYERS and isinstance(value, int):
            leading = [_is_leading(o, key, n) for o, (_, n) in zip(others, origins, strict=True)]
            inner[key] = leading.index(False) if False in leading else len(leading)
            if True in leading[cast(int, inner[key]) :]:
                said.append(f"{key} in config.json counts leading layers, and later ones are alike")
        elif not isinstance(value, list) or key in _NOT_BY_LAYER:
            continue
        elif key in _NUMBERS_OF_LAYERS:
            inner[key] = [
                place
                for place, (other, (_, number)) in enumerate(zip(others, origins, strict=True))
                if number in _list(other, key)
            ]
        elif len(value) == stack.layer_count > 1:
            entries = [_entry(o, key, n) for o, (_, n) in zip(others, origins, strict=True)]
            if None in entries:
                said.append(f"{key} in config.json has no entry for some of the layers")
            else:
                inner[key] = [found for entry in entries if entry for found in entry]
    return result, said


def _place(
    config: dict[str, object], stack: LayerStack
) -> tuple[str, dict[str, object], list[str]] | None:
    """Where a config says how many layers a stack has: path and config there, and the keys."""
    words = set(stack.prefix.split("."))
    for path, inner in _in_order(config, words):
        for keys in _keys(words):
            fitting = [key for key in keys if inner.get(key) == stack.layer_count]
            if fitting:
                return path, inner, fitting
    return None


def _keys(words: set[str]) -> Iterator[tuple[str, ...]]:
    if "decoder" in words:
        yield _DECODER_COUNTS
    elif "encoder" in words and not words & (_SIGHT | _SOUND):
        yield _ENCODER_COUNTS
    yield _COUNTS


def _in_order(
    config: dict[str, object], words: set[str]
) -> Iterator[tuple[str, dict[str, object]]]:
    """The config and those within it, those first that a stack of these words would have."""
    found = list(configs_within(config))
    of_kind = {"vision": bool(words & _SIGHT), "audio": bool(words & _SOUND)}

    def rank(path: str) -> int:
        kind = next((kind for kind in of_kind if kind in path), None)
        if kind is not None:
            return 0 if of_kind[kind] else 3
        if any(of_kind.values()):
            return 2
        return 0 if "text" in path or "llm" in path or "language" in path else 1

    return iter(sorted(found, key=lambda item: rank(item[0])))


def _inner_of(config: Config | None, path: str) -> Config:
    if config is None:
        return {}
    return dict(configs_within(config)).get(path, {})


def _list(config: Config, key: str) -> list[object]:
    value = config.get(key)
    return value if isinstance(value, list) else []


def _entry(config: Config, key: str, number: int) -> tuple[object] | None:
    values = _list(config, key)
    return (values[number],) if number < len(values) else None


def _is_leading(config: Config, key: str, number: int) -> bool:
    count = config.get(key)
    return isinstance(count, int) and number < count
