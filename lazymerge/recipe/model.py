"""A recipe as a value: what the user's YAML says, validated, with nothing resolved yet.

Parameter values stay settings (scalar, gradient or conditions) here; `evaluate` turns a setting
into the value for one tensor. No file but the recipe is opened, and no torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..errors import Position, Problem
from .signature import Scalar
from .tokenizer import TokenizerSettings


@dataclass(frozen=True, slots=True)
class Gradient:
    """Values spread evenly over the layers, the first at layer 0 and the last at the last layer."""

    values: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class Condition:
    """A value for the tensors whose name contains `filter`; None or "*" matches every tensor."""

    value: Scalar | Gradient
    filter: str | None = None


@dataclass(frozen=True, slots=True)
class Conditions:
    """Tried in order; the first that matches a tensor gives its value."""

    entries: tuple[Condition, ...]


Setting = Scalar | Gradient | Conditions


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One entry of the recipe's `models` list.

    model: the model reference as written.
    parameters: settings of this entry.
    layer_range: first layer and the one after the last, of a slice's source; None: all.
    position: where the entry's reference stands.
    parameter_positions: where each parameter's key stands.
    """

    model: str
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    layer_range: tuple[int, int] | None = None
    position: Position | None = field(default=None, compare=False)
    parameter_positions: Mapping[str, Position] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of the output's layers, merged from as many layers of each of its sources.

    sources: with a layer range each, all of one length; no model twice.
    base_model: in place of the recipe's; None: that one.
    parameters: settings of this slice.
    """

    sources: tuple[ModelEntry, ...]
    base_model: str | None = None
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    position: Position | None = field(default=None, compare=False)

    @property
    def layer_count(self) -> int:
        start, stop = self.sources[0].layer_range or (0, 0)
        return stop - start


@dataclass(frozen=True, slots=True)
class Module:
    """A part of the output with a layer stack of its own, or none.

    name: as written.
    models: merged as wholes, if there are no slices.
    slices: the module's layers, one run after the other.
    parameters: settings of this module.
    """

    name: str
    models: tuple[ModelEntry, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    position: Position | None = field(default=None, compare=False)

    @property
    def entries(self) -> tuple[ModelEntry, ...]:
        """All entries of models and sources, in the order of the recipe."""
        return (*self.models, *(source for piece in self.slices for source in piece.sources))


@dataclass(frozen=True, slots=True)
class Recipe:
    """A validated recipe. Of models, slices and modules one is given.

    merge_method: name of a known method.
    models: in recipe order, as written; a base that is not listed is not among them.
    slices: of the output's layers, one after the other.
    modules: parts of the output, in recipe order.
    base_model: reference of the base, or None.
    parameters: top-level settings.
    dtype, out_dtype: torch dtype names (float32, bfloat16, float16, float64 …) or None.
    seed: of random methods; `--seed` takes its place.
    tokenizer: what the vocabulary of the output is to be; None: the base's, or the first model's.
    chat_template: `auto`, a known name, or Jinja text; None: as it is.
    name: under which other recipes of the file use what comes of it as a model.
    merges: recipes of the file whose results are among its models, directly or by way of others;
        each after those that it needs itself. They have no merges of their own.
    part_of: the recipe that uses what comes of this one, where this one is to be written by itself.
        Its seed is what the numbers of both are drawn by.
    text: the YAML as read, byte for byte (decoded as UTF-8).
    path: where it was read from, for messages.
    base_position, method_position, name_position: where the values of base_model, merge_method
        and name stand.
    parameter_positions: where each top-level parameter's key stands.
    warnings: what is allowed and probably not meant, in the order of the file.
    """

    merge_method: str
    models: tuple[ModelEntry, ...]
    base_model: str | None = None
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    seed: int = 0
    tokenizer: TokenizerSettings | None = None
    chat_template: str | None = None
    name: str | None = None
    merges: tuple[Recipe, ...] = ()
    part_of: Recipe | None = None
    text: str = field(default="", compare=False)
    path: str = field(default="recipe", compare=False)
    base_position: Position | None = field(default=None, compare=False)
    method_position: Position | None = field(default=None, compare=False)
    name_position: Position | None = field(default=None, compare=False)
    parameter_positions: Mapping[str, Position] = field(default_factory=dict, compare=False)
    warnings: tuple[Problem, ...] = field(default=(), compare=False)
    slices: tuple[Slice, ...] = ()
    modules: tuple[Module, ...] = ()

    @property
    def entries(self) -> tuple[ModelEntry, ...]:
        """All entries of models and sources, in the order of the recipe."""
        whole = Module("", self.models, self.slices)
        return (*whole.entries, *(e for module in self.modules for e in module.entries))

    @property
    def references(self) -> tuple[str, ...]:
        """All models, each once: the base, and the others in the order of the recipe. Results of
        other merges are among them, by name."""
        slices = [*self.slices, *(piece for module in self.modules for piece in module.slices)]
        bases = [piece.base_model for piece in slices if piece.base_model is not None]
        return tuple(dict.fromkeys([*self.members, *bases]))

    @property
    def members(self) -> tuple[str, ...]:
        """The models whose vocabularies count, each once: the base, and those of the entries. Bases
        of slices that are not among them have part in nothing."""
        named = [self.base_model, *(entry.model for entry in self.entries)]
        return tuple(dict.fromkeys(name for name in named if name is not None))

    @property
    def models_read(self) -> tuple[str, ...]:
        """All models that are read, by this merge and by those that it needs, each once; the main
        model first."""
        made = {merge.name for merge in self.merges}
        wanted = [self.main_model, *self.references]
        wanted += [reference for merge in self.merges for reference in merge.references]
        return tuple(dict.fromkeys(name for name in wanted if name not in made))

    @property
    def asks_for_tokenizer(self) -> bool:
        """Whether it, or a merge that it needs, says something of the tokenizer."""
        return any(
            merge.tokenizer is not None or merge.chat_template is not None
            for merge in (self, *self.merges)
        )

    @property
    def main_model(self) -> str:
        """The model that config and tokenizer come from, and whose names the output has."""
        made = {merge.name: merge for merge in self.merges}
        reference = self.references[0]
        while reference in made:
            reference = made[reference].references[0]
        return reference

    def with_seed(self, seed: int) -> Recipe:
        """The recipe with another seed, for all of its merges; the same if it is its own."""
        if seed == self.seed:
            return self
        return replace(
            self, seed=seed, merges=tuple(merge.with_seed(seed) for merge in self.merges)
        )


def evaluate(setting: Setting, tensor_name: str, depth: float) -> Scalar | None:
    """The value of a setting for one tensor.

    tensor_name: what the filters are matched against (substring).
    depth: the layer's position in its stack, 0.0 (first) to 1.0 (last); 0.0 for tensors
        outside the layers.

    Returns None when no condition matches: the next scope, then the default, decides.

    A gradient of numbers is interpolated linearly, never beyond the two values it passes
    between; one of booleans or strings selects the value at or before the position.
    """
    if isinstance(setting, Conditions):
        for condition in setting.entries:
            if condition.filter in (None, "*") or str(condition.filter) in tensor_name:
                return evaluate(condition.value, tensor_name, depth)
        return None
    if isinstance(setting, Gradient):
        values = setting.values
        position = depth * (len(values) - 1)
        lower = int(position)
        if any(isinstance(value, (bool, str)) for value in values):
            return values[lower]
        upper = min(len(values) - 1, lower + 1)
        fraction = position - lower
        start, end = float(values[lower]), float(values[upper])
        value = (1 - fraction) * start + fraction * end
        # Rounding must not turn a constant density of 0.9 into one that keeps an element less.
        return min(max(value, min(start, end)), max(start, end))
    return setting
