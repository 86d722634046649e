"""Which tensors a merge gives, and which tensors of its models each is merged from: by names alone.

    models       every name that any of them has; a name means the same everywhere
    slices       layers, counted anew: layer i of the output is layer first + i of every source;
                 what stands before the layers comes from the first slice's sources, what stands
                 after them from the last's
    modules      each part of the model in one of these ways

All problems are gathered and raised once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..architecture import LayerStack, LayerStacks, find_layer_stacks
from ..architecture.modules import is_before_layers, owner, split_into_modules
from ..checkpoint.tensor import Checkpoint
from ..errors import InputError, InputErrors
from ..recipe.model import ModelEntry, Module, Recipe, Setting, Slice
from ..recipe.signature import BaseModel

OF_THE_STACK = ("relative_attention_bias.weight",)
"""Ends of names of tensors that stand in a stack's first layer and are used by all (t5): the first
layer of the output has them, from the first layers of its sources, wherever the slices begin."""

LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")

Scopes = tuple[Mapping[str, Setting], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A model in the role it plays in a merge.

    place: among the models that are not the base; masks of random methods depend on it.
    """

    model: str
    checkpoint: Checkpoint
    settings: Mapping[str, Setting]
    is_base: bool
    place: int


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of the output.

    inputs: every model that should have part in it, the base first, and what the tensor is called
        there.
    scopes: `parameters` that hold for all of them, the nearest first.
    depth: where gradients are evaluated, 0.0 to 1.0.
    base: the base model that the recipe names for it, whatever the method makes of one; it need
        not be among the inputs.
    is_copied: there is nothing to merge it with, whatever the method.
    """

    name: str
    inputs: tuple[tuple[Source, str], ...]
    scopes: Scopes
    depth: float
    base: str | None = None
    is_copied: bool = False


LayerOrigins = Mapping[LayerStack, tuple[tuple[str, int], ...]]
"""For stacks that are made of slices, by the stack as the main model has it: the model and the
layer that every layer of the output has its config from."""


@dataclass(frozen=True, slots=True)
class Targets:
    """All tensors of the output, in natural order of their names.

    origins: of layers. left_out: names of tensors that no module and no slice of the recipe has.
    """

    targets: tuple[Target, ...]
    origins: LayerOrigins = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def find_targets(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], base: BaseModel) -> Targets:
    """The tensors of a recipe's output.

    checkpoints: by model reference. base: what its method makes of a base.

    Raises:
        InputErrors: slices ask for layers that models have not, or modules for parts.
    """
    return _Finder(recipe, checkpoints, base).find()


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key under which layers.2 comes before layers.10; no two names have the same.

    Numbers are compared by length, then as text: names may hold digits that int() refuses.
    """
    key = []
    for place, part in enumerate(re.split(r"([0-9]+)", name)):
        digits = part.lstrip("0")
        key.append((len(digits), digits) if place % 2 else (-1, part))
    return [*key, (-2, name)]


class _Finder:
    def __init__(
        self, recipe: Recipe, checkpoints: Mapping[str, Checkpoint], base: BaseModel
    ) -> None:
        self.recipe = recipe
        self.checkpoints = checkpoints
        self.uses_base = base is not BaseModel.UNUSED
        self.problems: list[str] = []
        self.origins: dict[LayerStack, tuple[tuple[str, int], ...]] = {}
        self.layers: dict[tuple[str, str], dict[int, dict[str, str]]] = {}
        self.first = recipe.references[0]
        """What config and names of the output come from: a model, or another merge's result."""
        self.main = checkpoints[self.first]

    def find(self) -> Targets:
        recipe = self.recipe
        left_out: list[str] = []
        if recipe.modules:
            targets = self._modules(left_out)
        elif recipe.slices:
            stacks = find_layer_stacks(self.main.tensors)
            stack = self._main_stack(stacks)
            scopes: Scopes = (recipe.parameters,)
            if stack is None:
                targets = []
            elif len(stacks) == 1:
                targets = self._sliced(recipe.slices, stack, scopes, None)
            else:
                members = [n for n in self._names() if owner(n, stacks) in (None, stack)]
                targets = self._sliced(recipe.slices, stack, scopes, members)
                targets += self._copied(members, left_out)
        else:
            targets = self._whole(recipe.models, (recipe.parameters,), None)
        if self.problems:
            raise InputErrors(self.problems)
        targets.sort(key=lambda target: natural_order(target.name))
        return Targets(tuple(targets), self.origins, tuple(sorted(left_out, key=natural_order)))

    # models as wholes

    def _whole(
        self, entries: Sequence[ModelEntry], scopes: Scopes, members: Iterable[str] | None
    ) -> list[Target]:
        """members: the names that count; None: all."""
        sources = self._sources(entries, self.recipe.base_model, is_listed=False)
        names = dict.fromkeys(name for s in sources for name in s.checkpoint.tensors)
        stacks = find_layer_stacks(names)
        if members is not None:
            chosen = set(members)
            names = {name: None for name in names if name in chosen}
        return [
            Target(
                name,
                tuple((s, name) for s in sources),
                scopes,
                stacks.depth(name),
                self.recipe.base_model,
            )
            for name in names
        ]

    def _sources(
        self, entries: Sequence[ModelEntry], base: str | None, *, is_listed: bool
    ) -> tuple[Source, ...]:
        """The models of a list in their roles, the base first.

        is_listed: the base has part only if it is listed.
        """
        base = base if self.uses_base else None
        settings = {entry.model: entry.parameters for entry in entries}
        if base is not None and is_listed and base not in settings:
            base = None
        others = [model for model in settings if model != base]
        sources = [
            Source(model, self.checkpoints[model], settings[model], False, place)
            for place, model in enumerate(others)
        ]
        if base is None:
            return tuple(sources)
        return (Source(base, self.checkpoints[base], settings.get(base, {}), True, 0), *sources)

    # slices

    def _main_stack(self, stacks: LayerStacks) -> LayerStack | None:
        """The stack that slices without a module are of."""
        found: list[LayerStack] = [*stacks]
        config = self.main.config or {}
        if len(found) > 1 and not config.get("is_encoder_decoder"):
            counts = [config.get(key) for key in LAYER_COUNT_KEYS]
            found = [stack for stack in found if stack.layer_count in counts] or found
        if len(found) == 1:
            return found[0]
        model = self.first
        if not found:
            self.problems.append(f"{model} has no layers that slices could be cut from")
        else:
            named = ", ".join(f"{stack.prefix} ({stack.layer_count})" for stack in stacks)
            self.problems.append(
                f"{model} has several layer stacks, {named}; say of which the slices are: "
                f"modules: {{{found[0].prefix}: {{slices: ...}}}}"
            )
        return None

    def _sliced(
        self,
        slices: Sequence[Slice],
        stack: LayerStack,
        scopes: Scopes,
        members: Iterable[str] | None,
    ) -> list[Target]:
        """members: names of the module's tensors in the main model; None: all count."""
        targets: list[Target] = []
        origins: list[tuple[str, int]] = []
        layers_of_main = self._layers(self.first, stack.prefix)
        shared = [
            suffix
            for suffix in layers_of_main.get(0, {})
            if suffix.endswith(OF_THE_STACK)
            and all(suffix not in layer for place, layer in layers_of_main.items() if place)
        ]
        for number, piece in enumerate(slices):
            base = piece.base_model or self.recipe.base_model
            sources = self._sources(piece.sources, base, is_listed=True)
            starts = {entry.model: entry.layer_range or (0, 0) for entry in piece.sources}
            if not all(self._has_layers(s.model, stack, starts[s.model], number) for s in sources):
                continue
            for place in range(piece.layer_count):
                depth = place / (piece.layer_count - 1) if piece.layer_count > 1 else 1.0
                layers = [
                    (s, self._layers(s.model, stack.prefix)[starts[s.model][0] + place])
                    for s in sources
                ]
                for suffix in dict.fromkeys(suffix for _, layer in layers for suffix in layer):
                    if suffix in shared:
                        continue
                    prefix = f"{stack.prefix}.{len(origins)}"
                    inputs = tuple(
                        (s, f"{stack.prefix}.{starts[s.model][0] + place}.{suffix}")
                        for s, _ in layers
                    )
                    own = (piece.parameters, *scopes)
                    targets.append(Target(f"{prefix}.{suffix}", inputs, own, depth, base))
                if not origins:
                    names = [f"{stack.prefix}.0.{suffix}" for suffix in shared]
                    own = (piece.parameters, *scopes)
                    targets += [
                        Target(name, tuple((s, name) for s in sources), own, depth, base)
                        for name in names
                    ]
                origins.append((sources[0].model, starts[sources[0].model][0] + place))
        self.origins[stack] = tuple(origins)
        for piece, is_before in ((slices[0], True), (slices[-1], False)):
            targets += self._outside(piece, stack, scopes, members, is_before=is_before)
        return targets

    def _outside(
        self,
        piece: Slice,
        stack: LayerStack,
        scopes: Scopes,
        members: Iterable[str] | None,
        *,
        is_before: bool,
    ) -> list[Target]:
        """What stands before a stack's layers, or after them."""
        base = piece.base_model or self.recipe.base_model
        sources = self._sources(piece.sources, base, is_listed=True)
        chosen = None if members is None else set(members)
        names = dict.fromkeys(
            name
            for s in sources
            for name in s.checkpoint.tensors
            if not _is_in(name, stack)
            and is_before_layers(name) == is_before
            and (chosen is None or name in chosen)
        )
        return [
            Target(name, tuple((s, name) for s in sources), (piece.parameters, *scopes), 0.0, base)
            for name in names
        ]

    def _has_layers(
        self, model: str, stack: LayerStack, wanted: tuple[int, int], number: int
    ) -> bool:
        layers = self._layers(model, stack.prefix)
        missing = [layer for layer in range(*wanted) if layer not in layers]
        if missing:
            has = f"it has {len(layers)}" if layers else "it has none of that name"
            self.problems.append(
                f"{self.recipe.path}: slice {number + 1} takes layers {wanted[0]} to "
                f"{wanted[1] - 1} of {stack.prefix} from {model}; {has}, and no layer {missing[0]}"
            )
        return not missing

    def _layers(self, model: str, prefix: str) -> dict[int, dict[str, str]]:
        """A model's layers: names by suffix, by the layer's number."""
        key = (model, prefix)
        if key not in self.layers:
            found: dict[int, dict[str, str]] = {}
            inside = re.compile(re.escape(prefix) + r"\.(0|[1-9][0-9]{0,5})\.(.+)", re.DOTALL)
            for name in self.checkpoints[model].tensors:
                match = inside.fullmatch(name)
                if match:
                    found.setdefault(int(match[1]), {})[match[2]] = name
            self.layers[key] = found
        return self.layers[key]

    # modules

    def _modules(self, left_out: list[str]) -> list[Target]:
        names = self._names()
        stacks = find_layer_stacks(self.main.tensors)
        try:
            parts = split_into_modules(names, stacks, [m.name for m in self.recipe.modules])
        except KeyError as error:
            known = ", ".join(stack.prefix for stack in stacks) or "none"
            raise InputError(
                f"{self.recipe.path}: module {error} fits no part of {self.first}, or "
                f"several; its layer stacks, which modules may be named after: {known}"
            ) from None
        targets: list[Target] = []
        for module in self.recipe.modules:
            targets += self._module(module, *parts[module.name])
        members = [name for own, _ in parts.values() for name in own]
        return targets + self._copied(members, left_out)

    def _names(self) -> dict[str, None]:
        """Those of all models' tensors."""
        return dict.fromkeys(
            name
            for reference in self.recipe.references
            for name in self.checkpoints[reference].tensors
        )

    def _copied(self, members: Iterable[str], left_out: list[str]) -> list[Target]:
        """What is no member of any part that is merged, as the first model has it."""
        merged = set(members)
        rest = [name for name in self.main.tensors if name not in merged]
        left_out += rest
        main = Source(self.first, self.main, {}, False, 0)
        return [Target(name, ((main, name),), (), 0.0, is_copied=True) for name in rest]

    def _module(
        self, module: Module, members: Sequence[str], stack: LayerStack | None
    ) -> list[Target]:
        scopes: Scopes = (module.parameters, self.recipe.parameters)
        if not module.slices:
            return self._whole(module.models, scopes, members)
        if stack is None:
            self.problems.append(
                f"{self.recipe.path}: module {module.name} has no layers that slices could be "
                "cut from; give it 'models'"
            )
            return []
        return self._sliced(module.slices, stack, scopes, members)


def _is_in(name: str, stack: LayerStack) -> bool:
    """Whether a name is that of a tensor in one of a stack's layers, however many there are."""
    rest = name.removeprefix(f"{stack.prefix}.")
    return rest != name and rest.partition(".")[0].isdigit()
