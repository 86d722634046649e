"""What a config says of layers, for an output whose layers were put together from others.

Two things are said of layers: how many there are, under whatever name, and of which kind each is,
in one of the forms of layer_rules. Both are written anew; everything else stays. What has been
written is read back, and layers of which it says something else are named: a model loaded with
such a config would compute something else there, or begin with random numbers.

A checkpoint may hold more layers than its config counts: those beyond predict further tokens, and
num_nextn_predict_layers says how many they are. Where they stand at the end of the output, too,
they are counted as they were; everywhere else they are layers like the others.

    config: 61 layers, 1 beyond; file: 62        slices [0, 61] [30, 62]
    output: 93 layers                            config: 92 layers, 1 beyond
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import InputError
from .config import configs_within
from .layer_rules import KEYS_OF_KINDS, TYPES_BY_LAYER, Rule, rules_of
from .layers import LayerStack
from .roles import is_optional

Config = Mapping[str, object]

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "num_blocks")
_ENCODER_COUNTS = ("encoder_layers", "num_encoder_layers", "num_hidden_layers", "num_layers")
_DECODER_COUNTS = ("decoder_layers", "num_decoder_layers")
_SIGHT = frozenset({"vision_tower", "vision_model", "visual", "vision"})
_LANGUAGE = frozenset({"language_model", "text_model", "llm"})
_SOUND = frozenset({"audio_tower", "audio_model", "audio"})

_LAYERS_BEYOND = ("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules")
"""How many layers of the checkpoint stand after those that the config counts."""

_ONLY_LISTS = (*TYPES_BY_LAYER, "hybrid_override_pattern")
"""What says how many layers there are where nothing else does (nemotron-h)."""

_MASKS = (".attn.bias", ".attention.bias")
"""Buffers, whose names look like those of weights (gpt2, gpt-neox)."""

_WORDS_FOR_COUNTS = ("layer", "block", "depth")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a config says how many layers a stack has.

    path: of the config within the config. keys: of the number; none where only lists say it.
    count: what it says. beyond: keys that say how many more the checkpoint has.
    is_stated: it does say so; otherwise the key is to be added.
    """

    path: str
    inner: dict[str, object]
    keys: tuple[str, ...]
    count: int
    beyond: tuple[str, ...] = ()
    is_stated: bool = True


def with_layers(
    config: Config,
    stack: LayerStack,
    origins: Sequence[tuple[Config | None, int]],
    *,
    names_before: Iterable[str] = (),
    names_after: Iterable[str] = (),
) -> tuple[dict[str, object], list[str]]:
    """The config of a model whose layers have been put together anew.

    config: of the main model. stack: its layers, as they were.
    origins: for every layer of the output the config of the model it is from, and its number there.
    names_before, names_after: of the tensors of the main model and of the output. If they are
        given, layers are looked for that have other tensors than the config says.

    Returns the config, and a sentence for each thing that it cannot say.

    Raises:
        InputError: the number of layers has changed, and the config does not say it anywhere.
    """
    result = copy.deepcopy(dict(config))
    place = _place(result, stack)
    if place is None:
        if len(origins) == stack.layer_count:
            return result, []
        raise InputError(
            f"config.json does not say that {stack.prefix} has {stack.layer_count} layers, so that "
            f"it cannot say that the merge has {len(origins)}, and the merge would not load; write "
            "their number into the base model's config.json, or take that away: without one, only "
            "tensors are merged"
        )
    inner = place.inner
    others = [(_inner_of(other, place.path), number) for other, number in origins]
    counts = [_count_of(other, place) for other, _ in others]
    are_beyond = [
        count is not None and number >= count
        for (_, number), count in zip(others, counts, strict=True)
    ]
    count, said = len(origins), []
    if not place.is_stated:
        said.append(
            f"num_hidden_layers, {count}, was added to config.json, which does not say how many "
            f"layers {stack.prefix} has"
        )
    if place.beyond:
        while count and are_beyond[count - 1]:
            count -= 1
        for key in place.beyond:
            inner[key] = len(origins) - count
    if True in are_beyond[:count]:
        said.append(
            f"{_layers(n for n in range(count) if are_beyond[n])} of {stack.prefix} are from "
            "beyond the layers that their model's config.json counts, and count as layers like "
            "the others now"
        )
    is_encoder = "encoder" in stack.prefix.split(".")
    rules = [
        rule
        for rule in rules_of(inner, {place.count, stack.layer_count})
        if not rule.key.startswith("decoder_" if is_encoder else "encoder_")
    ]
    for key in place.keys:
        inner[key] = count
    unsaid: set[int] = set()
    for rule in rules:
        said += _rewrite(rule, inner, others, counts, count, stack, unsaid)
    told = [_told(rules, place.inner, n, count) for n in range(len(origins))]
    before = dict(configs_within(config))[place.path]
    told_before = [_told(rules, before, n, place.count) for n in range(stack.layer_count)]
    kinds = _tensors(names_after, stack.prefix)
    kinds_before = _tensors(names_before, stack.prefix)
    wrong = _unlike(kinds, kinds_before, told, told_before)
    wrong = [layer for layer in wrong if layer not in unsaid]
    if wrong:
        said.append(
            f"{_layers(wrong)} of {stack.prefix} may have other tensors than config.json says; "
            "look whether it does before the model is used"
        )
    return result, said


def _rewrite(
    rule: Rule,
    inner: dict[str, object],
    others: Sequence[tuple[Config, int]],
    counts: Sequence[int | None],
    count: int,
    stack: LayerStack,
    unsaid: set[int],
) -> list[str]:
    """Has a config say by a rule of which kind its layers are; what it cannot say.

    unsaid: layers that it is wrong about are added.
    """
    is_as_long = _length(inner, rule) == stack.layer_count
    kinds: list[object] = []
    for (other, number), own_count in zip(others, counts, strict=True):
        kinds.append(rule.kind(other, number, own_count or stack.layer_count))
    # of layers beyond, a list says something only if it did before
    if not is_as_long or None in kinds[count:]:
        kinds = kinds[:count]
    if None in kinds:
        return [f"{rule.key} in config.json has no entry for some of the layers"]
    said = rule.write(inner, kinds)
    wrong = [n for n, kind in enumerate(kinds) if rule.kind(inner, n, count) != kind]
    if wrong:
        unsaid.update(wrong)
        said.append(
            f"{_layers(wrong)} of {stack.prefix} are of another kind than {rule.key} in "
            "config.json makes of them: loaded with it, the model is another"
        )
    return said


# where the number of layers stands


def _place(config: dict[str, object], stack: LayerStack) -> _Place | None:
    words = set(stack.prefix.split("."))
    ranked = _in_order(config, words)
    likely = [(path, inner) for rank, path, inner in ranked if rank < _UNLIKELY]
    every = likely if words & _LANGUAGE else [(path, inner) for _, path, inner in ranked]
    return (
        _equal(likely, words, stack)
        or _with_beyond(likely, words, stack)
        or _equal(every, words, stack)
        or _by_lists(every, stack)
        or _of_other_name(likely, stack)
        or _below(ranked, words, stack)
        or _unstated(ranked, words, stack)
    )


_Inner = Sequence[tuple[str, dict[str, object]]]


def _equal(found: _Inner, words: set[str], stack: LayerStack) -> _Place | None:
    for path, inner in found:
        for keys in _keys(words):
            fitting = tuple(key for key in keys if inner.get(key) == stack.layer_count)
            if fitting:
                return _Place(path, inner, fitting, stack.layer_count)
    return None


def _with_beyond(found: _Inner, words: set[str], stack: LayerStack) -> _Place | None:
    """Layers that are counted, and as many beyond as the config says."""
    for path, inner in found:
        for more in _LAYERS_BEYOND:
            number = inner.get(more)
            if not isinstance(number, int) or not 0 < number < stack.layer_count:
                continue
            counted = LayerStack(stack.prefix, stack.layer_count - number)
            place = _equal([(path, inner)], words, counted) or _by_lists([(path, inner)], counted)
            if place is not None:
                return _Place(path, inner, place.keys, place.count, (more,))
    return None


def _by_lists(found: _Inner, stack: LayerStack) -> _Place | None:
    """Nothing but lists with an entry for each layer."""
    for path, inner in found:
        for key in _ONLY_LISTS:
            value = inner.get(key)
            if isinstance(value, list | str) and len(value) == stack.layer_count:
                return _Place(path, inner, (), stack.layer_count)
    return None


def _of_other_name(found: _Inner, stack: LayerStack) -> _Place | None:
    """The only number of that size whose name has to do with layers."""
    for path, inner in found:
        fitting = [
            key
            for key, value in inner.items()
            if value == stack.layer_count and _may_be_count(key, value)
        ]
        if len(fitting) == 1 and stack.layer_count > 1:
            return _Place(path, inner, tuple(fitting), stack.layer_count)
    return None


def _below(
    ranked: Sequence[tuple[int, str, dict[str, object]]], words: set[str], stack: LayerStack
) -> _Place | None:
    """Fewer layers than there are, if that is the only number: what the others are is not said."""
    is_of_kind = bool(words & (_SIGHT | _SOUND))
    for rank, path, inner in ranked:
        if rank >= _UNLIKELY or (is_of_kind and rank):
            continue
        for keys in _keys(words):
            stated = [(key, value) for key in keys if isinstance(value := inner.get(key), int)]
            others = [key for key, value in inner.items() if _may_be_count(key, value)]
            others = [key for key in others if key not in dict(stated)]
            if len(stated) == 1 and not others and 0 < stated[0][1] < stack.layer_count:
                return _Place(path, inner, (stated[0][0],), stated[0][1])
            if stated:
                return None
    return None


def _unstated(
    ranked: Sequence[tuple[int, str, dict[str, object]]], words: set[str], stack: LayerStack
) -> _Place | None:
    """No number that could be that of layers: the default of the model's class holds (llava)."""
    if words & {"encoder", "decoder"}:
        return None
    is_of_kind = bool(words & (_SIGHT | _SOUND))
    rank, path, inner = ranked[0]
    if rank > (0 if is_of_kind else 1):
        return None
    if any(_may_be_count(key, value) for key, value in inner.items()):
        return None
    return _Place(path, inner, _COUNTS[:1], stack.layer_count, is_stated=False)


def _may_be_count(key: str, value: object) -> bool:
    return (
        isinstance(value, int)
        and not isinstance(value, bool)
        and value > 0
        and key not in _LAYERS_BEYOND
        and key not in KEYS_OF_KINDS
        and any(word in key for word in _WORDS_FOR_COUNTS)
    )


def _keys(words: set[str]) -> Iterator[tuple[str, ...]]:
    if "decoder" in words:
        yield _DECODER_COUNTS
    elif "encoder" in words and not words & (_SIGHT | _SOUND):
        yield _ENCODER_COUNTS
    yield _COUNTS


_UNLIKELY = 3


def _in_order(
    config: dict[str, object], words: set[str]
) -> list[tuple[int, str, dict[str, object]]]:
    """The config and those within it, those first that a stack of these words would have."""
    of_kind = {"vision": bool(words & _SIGHT), "audio": bool(words & _SOUND)}

    def rank(path: str) -> int:
        kind = next((kind for kind in of_kind if kind in path), None)
        if kind is not None:
            return 0 if of_kind[kind] else _UNLIKELY
        if any(of_kind.values()):
            return 2
        return 0 if "text" in path or "llm" in path or "language" in path else 1

    found = [(rank(path), path, inner) for path, inner in configs_within(config)]
    return sorted(found, key=lambda item: item[0])


def _inner_of(config: Config | None, path: str) -> Config:
    if config is None:
        return {}
    return dict(configs_within(config)).get(path, {})


def _count_of(config: Config, place: _Place) -> int | None:
    """How many layers another model's config counts."""
    for key in place.keys:
        value = config.get(key)
        if isinstance(value, int):
            return value
    for key in _ONLY_LISTS:
        value = config.get(key)
        if isinstance(value, list | str):
            return len(value)
    return None


def _length(config: Config, rule: Rule) -> int | None:
    value = config.get(rule.key)
    return len(value) if isinstance(value, list | str) else None


# layers that have other tensors than the config says


def _told(rules: Sequence[Rule], config: Config, layer: int, count: int) -> str:
    """All that a config says of a layer."""
    kinds = [rule.kind(config, layer, count) for rule in rules]
    return repr((layer >= count, kinds))


def _tensors(names: Iterable[str], prefix: str) -> dict[int, frozenset[str]]:
    """What the tensors of each layer are called there; buffers apart."""
    found: dict[int, set[str]] = {}
    for name in names:
        rest = name.removeprefix(f"{prefix}.")
        number, _, suffix = rest.partition(".")
        is_buffer = name.endswith(_MASKS) or (is_optional(name) and not name.endswith(".bias"))
        if rest != name and number.isdecimal() and len(number) < 7 and not is_buffer:
            found.setdefault(int(number), set()).add(suffix)
    return {layer: frozenset(suffixes) for layer, suffixes in found.items()}


def _unlike(
    kinds: Mapping[int, frozenset[str]],
    kinds_before: Mapping[int, frozenset[str]],
    told: Sequence[str],
    told_before: Sequence[str],
) -> list[int]:
    """The layers with other tensors than the main model's of which its config says the same.

    kinds: tensors of the output's layers. told: what its config says of them.

    Where the main model's layers differ though the same is said of them, something else decides
    that is not known here. A layer that has what the main model's has in the same place is right
    then; a layer after the main model's last may be. The first layer may be unlike all others
    (t5's has the position biases) and says nothing of them.
    """
    expected: dict[str, set[frozenset[str]]] = {}
    for layer, tensors in kinds_before.items():
        if layer and layer < len(told_before):
            expected.setdefault(told_before[layer], set()).add(tensors)
    wrong = []
    for layer in sorted(kinds):
        tensors, own = kinds[layer], kinds_before.get(layer)
        if layer >= len(told):
            continue
        is_told_alike = layer < len(told_before) and told[layer] == told_before[layer]
        known = expected.get(told[layer], set())
        if is_told_alike and tensors == own:
            continue
        if layer == 0 and not is_told_alike:
            continue
        if layer == 0 or len(known) > 1 or (known and tensors not in known):
            wrong.append(layer)
    return wrong


def _layers(numbers: Iterable[int]) -> str:
    """layer 3; layers 3 and 4; layers 3, 4, 5 and 9 more."""
    found = list(numbers)
    if len(found) == 1:
        return f"layer {found[0]}"
    shown, more = (found, 0) if len(found) <= 6 else (found[:5], len(found) - 5)
    last = f"{more} more" if more else str(shown.pop())
    return f"layers {', '.join(map(str, shown))} and {last}"
