"""Layer stacks, found from tensor names alone.

A layer stack is a run of names `prefix.{0..n-1}.suffix`, numbered from 0 without a gap. Names
carry other numbers too, and the rules below say which of them count layers:

    model.layers.7.mlp.experts.3.w1.weight      layers, not experts: the outermost wins
    encoder.block.2.layer.0.SelfAttention.q     block, not layer: the outermost wins
    projector.0.weight, projector.2.weight      none: a gap (an nn.Sequential with an activation)
    to_out.0.weight                             none: one number is no run
    embedders.0.text_model.layers.5.fc1.bias    layers, not embedders: the embedders are unlike,
    embedders.1.model.resblocks.5.ln_1.bias     they have no suffix in common

Some prefixes end in a word for layers (`layers`, `block`, gpt2's `h`). Under such a word, a run
may have one layer (`layers.0.…` of a one-layer model): elsewhere a lone 0 is nearly always an
nn.Sequential whose other members have no weights. The layers may be unlike, too: dense and sparse
ones, attention and state space ones. And numbers that do not count from 0 without a gap (a part of
a model) make no stack there, and nothing inside them does: experts are never taken for layers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

# No leading zeros; at most a million layers: a hostile name cannot make int() slow.
_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,5})(?=\.)")

_WORDS_FOR_LAYERS = ("layers", "layer", "blocks", "block", "stages", "stage")
"""Ends of the component before the number: encoder.layer, down_blocks, resblocks, conv_layers."""

_NAMES_FOR_LAYERS = frozenset({"h"})
"""Whole components: gpt2's transformer.h."""


@dataclass(frozen=True, slots=True, order=True)
class LayerStack:
    """A run of layers.

    prefix: what stands before the layer's number, without the dot ("model.layers").
    layer_count: layers are numbered 0 to layer_count - 1.
    """

    prefix: str
    layer_count: int


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """Where a tensor stands in its stack.

    suffix: what follows the layer's number and a dot ("mlp.up_proj.weight").
    """

    stack: LayerStack
    index: int
    suffix: str

    @property
    def depth(self) -> float:
        """0.0 at the first layer to 1.0 at the last; 1.0 in a stack of one layer."""
        last = self.stack.layer_count - 1
        return self.index / last if last else 1.0


@dataclass(frozen=True, slots=True)
class LayerStacks:
    """The layer stacks of a model, by prefix in the order of first appearance."""

    by_prefix: Mapping[str, LayerStack] = field(default_factory=dict)

    def __iter__(self) -> Iterator[LayerStack]:
        return iter(self.by_prefix.values())

    def __len__(self) -> int:
        return len(self.by_prefix)

    def locate(self, name: str) -> LayerPlace | None:
        """The tensor's stack, layer and suffix; None for a tensor outside the stacks."""
        for prefix, index, stop in _numbers(name):
            stack = self.by_prefix.get(prefix)
            if stack is not None and index < stack.layer_count:
                return LayerPlace(stack, index, name[stop + 1 :])
        return None

    def depth(self, name: str) -> float:
        """The position that gradients are evaluated at, 0.0 to 1.0.

        index / (layer count - 1); 1.0 where the stack has one layer, 0.0 outside the stacks:
        what mergekit 0.1.5 does, so that gradients mean the same.
        """
        place = self.locate(name)
        return 0.0 if place is None else place.depth


def find_layer_stacks(names: Iterable[str]) -> LayerStacks:
    """Find the layer stacks of a model in the names of its tensors.

    The result does not depend on the order of names, except for the order of the stacks.
    """
    names = dict.fromkeys(names)  # walked twice, and a name given twice counts once
    indices: dict[str, set[int]] = {}
    for name in names:
        for prefix, index, _ in _numbers(name):
            if prefix in indices:
                indices[prefix].add(index)
            else:
                indices[prefix] = {index}

    worded = {prefix for prefix in indices if _is_word_for_layers(prefix)}
    unworded_runs = {
        prefix
        for prefix, found in indices.items()
        if prefix not in worded
        and len(found) > 1
        and _counts_from_zero(found)
        and not _has_any(_outer(prefix), worded)
    }
    alike = _with_a_common_suffix(unworded_runs, names, indices)
    no_stack_inside = worded | alike
    return LayerStacks(
        {
            prefix: LayerStack(prefix, len(found))
            for prefix, found in indices.items()
            if (prefix in worded and _counts_from_zero(found)) or prefix in alike
            if not _has_any(_outer(prefix), no_stack_inside)
        }
    )


def _with_a_common_suffix(
    prefixes: set[str], names: Iterable[str], indices: Mapping[str, set[int]]
) -> set[str]:
    """Those prefixes under which every number has a tensor of the same suffix."""
    if not prefixes:
        return set()
    counts = Counter(
        (prefix, name[stop:])
        for name in names
        for prefix, _, stop in _numbers(name)
        if prefix in prefixes
    )
    return {prefix for (prefix, _), count in counts.items() if count == len(indices[prefix])}


def _numbers(name: str) -> Iterator[tuple[str, int, int]]:
    """The numeric components with something before and after: prefix, number, its end in name."""
    for match in _NUMBER.finditer(name):
        start = match.start() - 1
        if start > 0:
            yield name[:start], int(match.group()), match.end()


def _outer(prefix: str) -> list[str]:
    """The prefixes of the numbers within a prefix, outermost first."""
    return [outer for outer, _, _ in _numbers(prefix + ".")]


def _has_any(prefixes: list[str], known: set[str]) -> bool:
    return any(prefix in known for prefix in prefixes)


def _is_word_for_layers(prefix: str) -> bool:
    word = prefix[prefix.rfind(".") + 1 :]
    return word.endswith(_WORDS_FOR_LAYERS) or word in _NAMES_FOR_LAYERS


def _counts_from_zero(indices: set[int]) -> bool:
    return max(indices) == len(indices) - 1
