"""From a recipe's YAML to a `Recipe`, with everything that is wrong with it said at once.

The recipe is checked against the signatures of the merge methods and nothing else: no model is
looked up and no file but the recipe is opened.

How models are counted against a signature's `min_models` and `max_models`:

- base REQUIRED: the listed models and the base, which counts once whether it is listed or not
  (slerp of a base and one other model is a merge of two).
- base OPTIONAL: the models other than the base. Where there is one, it is the origin the others
  are seen from and not itself merged, listed or not.
- base UNUSED: the listed models. A base that is only named decides config and tokenizer.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from ..errors import Position, Problem, RecipeError
from .documents import joined
from .model import Condition, Conditions, Gradient, ModelEntry, Module, Recipe, Setting, Slice
from .signature import BaseModel, Parameter, Scalar, Scope, Signature
from .source import (
    PROBLEM_LIMIT,
    SIZE_LIMIT_BYTES,
    Entry,
    ListNode,
    MapNode,
    Node,
    ScalarNode,
    decode_source,
    describe,
    number_text,
    quote,
    read_source,
    recipe_error,
)
from .tokenizer import TokenizerReader

FLOAT_DTYPE_NAMES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
"""What `dtype` and `out_dtype` may say: the torch names of the element types that can be merged.

`torch.` may stand before the name, as in mergekit.
"""

_DTYPE_NICKNAMES = {
    "fp64": "float64",
    "f64": "float64",
    "double": "float64",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "single": "float32",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp8": "float8_e4m3fn",
    "float8": "float8_e4m3fn",
}
"""Not accepted, as in mergekit, but understood well enough to name the right word."""

TOP_LEVEL_KEYS = (
    "merge_method",
    "models",
    "slices",
    "modules",
    "base_model",
    "dtype",
    "out_dtype",
    "parameters",
    "seed",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
)
CONTENT_KEYS = ("models", "slices", "modules")
"""One of them says what is merged."""
MODEL_KEYS = ("model", "parameters")
SOURCE_KEYS = ("model", "layer_range", "parameters")
SLICE_KEYS = ("sources", "base_model", "parameters")
MODULE_KEYS = ("models", "slices", "parameters")
CONDITION_KEYS = ("value", "filter")

MOST_LAYERS = 1_000_000
"""No stack has more: lazymerge.architecture.layers."""

# Python's float() takes more than YAML's and JSON's numbers (nan, 1_0, other alphabets' digits).
LARGEST_NUMBER = 1e100
"""Of a parameter: sums of more, and products of two, would not be finite in float64."""

_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""A module's name that needs no quotes in a message."""

BOOLEAN_WORDS: dict[str, bool] = {
    spelling: value
    for word, value in (
        ("true", True),
        ("yes", True),
        ("on", True),
        ("false", False),
        ("no", False),
        ("off", False),
    )
    for spelling in (word, word.capitalize(), word.upper())
}
"""YAML's booleans, which are booleans in quotes too."""

_TYPE_WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}


def load_recipe(path: Path | str, signatures: Mapping[str, Signature]) -> Recipe:
    """The recipe in a file.

    signatures: of the known merge methods, by name.

    Raises RecipeError as `parse_recipe` does, and when the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(SIZE_LIMIT_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RecipeError(path, [Problem(f"cannot read the recipe: {reason}")]) from None
    return parse_recipe(decode_source(data, str(path)), str(path), signatures)


def parse_recipe(text: str, path: str, signatures: Mapping[str, Signature]) -> Recipe:
    """The recipe in a YAML text.

    path: where the text is from, for messages.
    signatures: of the known merge methods, by name.

    Raises RecipeError with everything that is wrong, each at its line and column. Text that is
    not YAML, or not a mapping, is reported alone: what it would have meant is a guess.
    """
    source = read_source(text, path)
    problems: list[Problem] = []
    recipes = []
    for root in (source.root, *source.others):
        try:
            recipes.append(_Parser(root, text, path, signatures).recipe())
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise recipe_error(path, problems)
    return recipes[0] if len(recipes) == 1 else joined(recipes)


@dataclass(slots=True)
class _Settings:
    """A `parameters` block.

    settings, positions: of the parameters that are right, by name.
    mentioned: names the user has given a value, rightly or not, here or in the wrong place: no
        use in complaining that they are missing.
    """

    settings: dict[str, Setting] = field(default_factory=dict)
    positions: dict[str, Position] = field(default_factory=dict)
    mentioned: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _ModelItem:
    """One item of a list of models or sources as far as it could be read.

    place: where it stands, in words ("models[0]").
    reference: None where it is missing or wrong.
    position: of the reference, or of the item.
    layer_range: None where it is missing, wrong or has no place.
    """

    place: str
    reference: str | None
    position: Position
    block: _Settings
    layer_range: tuple[int, int] | None = None

    def entry(self) -> ModelEntry:
        return ModelEntry(
            str(self.reference),
            self.block.settings,
            self.layer_range,
            self.position,
            self.block.positions,
        )


@dataclass(frozen=True, slots=True)
class _Group:
    """Models that are merged with each other.

    place: where they are listed, in words; position: of that.
    base: their base, or None.
    blocks: `parameters` that hold for all of them, the nearest first.
    lists_base: the base must be among the items.
    """

    place: str
    position: Position
    items: list[_ModelItem]
    base: str | None
    blocks: tuple[_Settings, ...]
    lists_base: bool = False


@dataclass(slots=True)
class _Content:
    """What a recipe, or one of its modules, says is merged."""

    models: list[_ModelItem] = field(default_factory=list)
    slices: list[Slice] = field(default_factory=list)
    groups: list[_Group] = field(default_factory=list)


class _Parser:
    def __init__(
        self, root: MapNode, text: str, path: str, signatures: Mapping[str, Signature]
    ) -> None:
        self._root = root
        self._text = text
        self._path = path
        self._signatures = signatures
        self._signature: Signature | None = None
        self._problems: list[Problem] = []
        self._warnings: list[Problem] = []

    def recipe(self) -> Recipe:
        entries = self._root.entries
        self._signature = self._merge_method()
        top = self._parameters(entries.get("parameters"))
        self._top_level_keys(top)
        base = self._base_model()
        content = _Content()
        modules: list[Module] = []
        key = self._content_key(self._root, "", CONTENT_KEYS)
        if key == "modules":
            modules = self._modules(entries[key].node, base, top, content)
        elif key is not None:
            self._content(entries[key], key, "", base, (top,), content)
        dtype = self._dtype("dtype")
        out_dtype = self._dtype("out_dtype")
        seed = self._seed()
        reader = TokenizerReader(self._root, self._report, self._reference)
        tokenizer, chat_template = reader.tokenizer(), reader.chat_template()
        entry = entries.get("name")
        is_named = entry is not None and not _is_null(entry.node)
        name = self._text_of(entry.node, "name") if entry is not None and is_named else None
        if self._signature is not None:
            self._check_base(self._signature, base, content.groups)
            for group in content.groups:
                self._check_count(self._signature, group)
                self._check_required(self._signature, group)
        if self._problems:
            raise recipe_error(self._path, self._problems)
        assert self._signature is not None
        return Recipe(
            merge_method=self._signature.name,
            models=tuple(item.entry() for item in content.models),
            slices=tuple(content.slices) if not modules else (),
            modules=tuple(modules),
            base_model=base,
            parameters=top.settings,
            dtype=dtype,
            out_dtype=out_dtype,
            seed=seed,
            tokenizer=tokenizer,
            chat_template=chat_template,
            name=name,
            text=self._text,
            path=self._path,
            base_position=entries["base_model"].node.position if base is not None else None,
            method_position=entries["merge_method"].node.position,
            name_position=entries["name"].node.position if name is not None else None,
            parameter_positions=top.positions,
            warnings=tuple(sorted(self._warnings, key=lambda w: w.position or Position(0, 0))),
        )

    # Reading, from the top down

    def _top_level_keys(self, top: _Settings) -> None:
        for key, entry in self._root.entries.items():
            if key in TOP_LEVEL_KEYS:
                continue
            self._stray_key(key, entry, TOP_LEVEL_KEYS, top)

    def _merge_method(self) -> Signature | None:
        entry = self._root.entries.get("merge_method")
        known = ", ".join(self._signatures)
        if entry is None or _is_null(entry.node):
            if not self._is_misspelt("merge_method"):
                self._report(
                    f"no merge_method is given; known methods: {known}",
                    entry.node.position if entry else self._root.position,
                )
            return None
        name = self._text_of(entry.node, "merge_method")
        if name is None:
            return None
        signature = self._signatures.get(name)
        if signature is None:
            hint = _suggest(name, self._signatures) or f"known methods: {known}"
            self._report(f"unknown merge_method {quote(name)}; {hint}", entry.node.position)
        return signature

    def _base_model(self) -> str | None:
        entry = self._root.entries.get("base_model")
        if entry is None or _is_null(entry.node):
            return None
        return self._reference(entry.node, "base_model")

    def _content_key(self, node: MapNode, place: str, keys: tuple[str, ...]) -> str | None:
        """Which of models, slices and modules is given; None, reported, unless it is one alone."""
        present = [key for key in keys if key in node.entries]
        given = [key for key in present if not _is_null(node.entries[key].node)] or present[:1]
        if len(given) > 1:
            first, second = (node.entries[key] for key in given[:2])
            self._report(
                f"{given[0]!r} (line {first.key_position.line}) and {given[1]!r} cannot stand "
                "beside each other: say what is merged once",
                second.key_position,
            )
            return None
        if given:
            return given[0]
        if place:
            self._report(f"{place} has neither 'models' nor 'slices'", node.position)
        elif not any(self._is_misspelt(key) for key in keys):
            self._report(
                "no models are given; list them: models: [{model: <path>}, ...]", node.position
            )
        return None

    def _modules(
        self, node: Node, base: str | None, top: _Settings, content: _Content
    ) -> list[Module]:
        if not isinstance(node, MapNode) or not node.entries:
            self._report(
                "'modules' must be a mapping (name: {models: ...} or name: {slices: ...}), "
                f"not {describe(node)}",
                node.position,
            )
            return []
        modules = []
        for name, entry in node.entries.items():
            place = f"modules.{name if _PLAIN_NAME.fullmatch(name) else quote(name)}"
            if not isinstance(entry.node, MapNode):
                self._report(
                    f"{place} must be a mapping with 'models' or 'slices', "
                    f"not {describe(entry.node)}",
                    entry.node.position,
                )
                continue
            block = self._parameters(entry.node.entries.get("parameters"), place)
            for key, stray in entry.node.entries.items():
                if key not in MODULE_KEYS:
                    self._stray_key(key, stray, MODULE_KEYS, block, place)
            own = _Content()
            own_key = self._content_key(entry.node, place, ("models", "slices"))
            if own_key is not None:
                self._content(entry.node.entries[own_key], own_key, place, base, (block, top), own)
            content.groups += own.groups
            modules.append(
                Module(
                    name,
                    tuple(item.entry() for item in own.models),
                    tuple(own.slices),
                    block.settings,
                    entry.key_position,
                )
            )
        return modules

    def _content(
        self,
        entry: Entry,
        key: str,
        module: str,
        base: str | None,
        blocks: tuple[_Settings, ...],
        content: _Content,
    ) -> None:
        """Reads `models` or `slices`.

        entry: of the key. module: whose they are, in words; empty for the recipe itself.
        blocks: `parameters` that hold here.
        """
        place = f"{module}.{key}" if module else key
        if key == "slices":
            self._slices(entry.node, place, base, blocks, content)
            return
        items = self._items(entry.node, place, base, MODEL_KEYS)
        if items is not None:
            content.models = items
            content.groups.append(_Group(place, entry.key_position, items, base, blocks))

    def _slices(
        self,
        node: Node,
        place: str,
        base: str | None,
        blocks: tuple[_Settings, ...],
        content: _Content,
    ) -> None:
        if not isinstance(node, ListNode):
            self._report(
                f"{place!r} must be a list (- sources: ...), not {describe(node)}", node.position
            )
            return
        if not node.items:
            self._report(f"{place!r} is empty; at least one slice is needed", node.position)
        for index, item in enumerate(node.items):
            self._slice(item, f"{place}[{index}]", base, blocks, content)

    def _slice(
        self,
        node: Node,
        place: str,
        base: str | None,
        blocks: tuple[_Settings, ...],
        content: _Content,
    ) -> None:
        if not isinstance(node, MapNode):
            self._report(
                f"{place} must be a mapping with 'sources', not {describe(node)}", node.position
            )
            return
        own_base = None
        entry = node.entries.get("base_model")
        if entry is not None and not _is_null(entry.node):
            own_base = self._reference(entry.node, "base_model")
        block = self._parameters(node.entries.get("parameters"), place)
        for key, stray in node.entries.items():
            if key == "residual_weight":
                if not _is_null(stray.node):
                    self._report(
                        "'residual_weight' does nothing, in mergekit neither; remove it",
                        stray.key_position,
                    )
            elif key not in SLICE_KEYS:
                self._stray_key(key, stray, SLICE_KEYS, block, place)
        entry = node.entries.get("sources")
        if entry is None:
            self._report(f"{place} has no 'sources'", node.position)
            return
        of_slice = own_base or base
        items = self._items(entry.node, f"{place}.sources", of_slice, SOURCE_KEYS)
        if items is None:
            return
        self._check_lengths(items)
        content.groups.append(
            _Group(
                f"{place}.sources",
                entry.key_position,
                items,
                of_slice,
                (block, *blocks),
                lists_base=True,
            )
        )
        content.slices.append(
            Slice(tuple(item.entry() for item in items), own_base, block.settings, node.position)
        )

    def _check_lengths(self, items: list[_ModelItem]) -> None:
        """All sources of a slice must have as many layers."""
        known = [item for item in items if item.layer_range is not None]
        lengths = [stop - start for start, stop in (item.layer_range or (0, 0) for item in known)]
        for item, length in zip(known, lengths, strict=True):
            if length != lengths[0]:
                self._report(
                    f"{item.place} has {_layers_text(length)}, {known[0].place} "
                    f"{_layers_text(lengths[0])}; the sources of a slice must have as many",
                    item.position,
                )

    def _items(
        self, node: Node, place: str, base: str | None, keys: tuple[str, ...]
    ) -> list[_ModelItem] | None:
        """A list of models or sources; None where it is wrong as a whole.

        keys: what an item may hold.
        """
        if not isinstance(node, ListNode):
            self._report(
                f"{place!r} must be a list (- model: <path> ...), not {describe(node)}",
                node.position,
            )
            return None
        if not node.items:
            self._report(f"{place!r} is empty; at least one model is needed", node.position)
            return None
        items = [
            self._model(item, f"{place}[{index}]", base, keys)
            for index, item in enumerate(node.items)
        ]
        first_lines: dict[str, int] = {}
        for item in items:
            if item.reference is None:
                continue
            if item.reference in first_lines:
                self._report(
                    f"{quote(item.reference)} is listed twice, first in line "
                    f"{first_lines[item.reference]}; a model's parameters are found by its name, "
                    "so each may stand here once: give the weight it should have in one entry",
                    item.position,
                )
            else:
                first_lines[item.reference] = item.position.line
        return items

    def _model(self, node: Node, place: str, base: str | None, keys: tuple[str, ...]) -> _ModelItem:
        if not isinstance(node, MapNode):
            hint = ""
            if isinstance(node, ScalarNode) and isinstance(node.value, str):
                hint = f"; write: model: {quote(node.value)}"
            self._report(
                f"{place} must be a mapping with the key 'model', not {describe(node)}{hint}",
                node.position,
            )
            everything = _Settings(mentioned=self._all_parameters())
            return _ModelItem(place, None, node.position, everything)
        entry = node.entries.get("model")
        reference = None
        position = node.position
        if entry is None:
            few = islice(node.entries, PROBLEM_LIMIT)
            if not any(_suggestion(key, keys) == "model" for key in few):
                self._report(f"{place} has no 'model: <path>'", position)
        else:
            position = entry.node.position
            reference = self._reference(entry.node, "model")
        block = self._parameters(
            node.entries.get("parameters"),
            place,
            is_entry=True,
            is_base=reference is not None and reference == base,
        )
        for key, stray in node.entries.items():
            if key in keys:
                continue
            if key == "layer_range":
                self._report(
                    "'layer_range' has its place in the sources of slices: "
                    "slices: [{sources: [{model: <path>, layer_range: [0, 8]}]}]",
                    stray.key_position,
                )
                continue
            self._stray_key(key, stray, keys, block, place, is_entry=True)
        layer_range = self._layer_range(node, place) if "layer_range" in keys else None
        return _ModelItem(place, reference, position, block, layer_range)

    def _layer_range(self, node: MapNode, place: str) -> tuple[int, int] | None:
        entry = node.entries.get("layer_range")
        if entry is None:
            self._report(f"{place} has no 'layer_range: [first, stop]'", node.position)
            return None
        items = entry.node.items if isinstance(entry.node, ListNode) else ()
        numbers = [_convert(item.value, int) for item in items if isinstance(item, ScalarNode)]
        if len(items) != 2 or len(numbers) != 2 or None in numbers:
            self._report(
                "'layer_range' must be two whole numbers, [first, stop], "
                f"not {describe(entry.node)}",
                entry.node.position,
            )
            return None
        start, stop = (int(number or 0) for number in numbers)
        if not 0 <= start < stop <= MOST_LAYERS:
            self._report(
                f"'layer_range' [{number_text(start)}, {number_text(stop)}] holds no layers: the "
                "first is counted from 0, the second comes after the last",
                entry.node.position,
            )
            return None
        return start, stop

    def _reference(self, node: Node, key: str) -> str | None:
        """A model reference, as written; a mapping is put into words."""
        if isinstance(node, MapNode):
            return self._spelt_out_reference(node, key)
        return self._text_of(node, key)

    def _spelt_out_reference(self, node: MapNode, key: str) -> str | None:
        """`{model: {path: a, revision: b}, lora: {path: c}}` as `a@b+c`."""
        paths = []
        for part in ("model", "lora"):
            entry = node.entries.get(part)
            if part == "lora" and (entry is None or _is_null(entry.node)):
                continue
            path = None if entry is None else self._place_of(entry.node, f"{key}.{part}")
            if entry is None:
                self._report(f"{key!r} has no 'model: {{path: <path>}}'", node.position)
            if path is None:
                return None
            paths.append(path)
        for stray, entry in node.entries.items():
            if _is_null(entry.node):
                continue
            if stray == "override_architecture":
                self._warn(
                    "'override_architecture' is not looked at: tensors are found by their names",
                    entry.key_position,
                )
            elif stray not in ("model", "lora"):
                self._report(f"unknown key {quote(stray)} in {key!r}", entry.key_position)
        return "+".join(paths)

    def _place_of(self, node: Node, key: str) -> str | None:
        """A path, or `{path: a, revision: b}` as `a@b`."""
        if not isinstance(node, MapNode):
            return self._text_of(node, key)
        entry = node.entries.get("path")
        if entry is None:
            self._report(f"{key!r} has no 'path'", node.position)
            return None
        path = self._text_of(entry.node, f"{key}.path")
        revision = node.entries.get("revision")
        if path is None or revision is None or _is_null(revision.node):
            return path
        at = self._text_of(revision.node, f"{key}.revision")
        return None if at is None else f"{path}@{at}"

    def _dtype(self, key: str) -> str | None:
        entry = self._root.entries.get(key)
        if entry is None or _is_null(entry.node):
            return None
        name = self._text_of(entry.node, key)
        if name is None:
            return None
        bare = name.removeprefix("torch.")
        if bare in FLOAT_DTYPE_NAMES:
            return bare
        nickname = _DTYPE_NICKNAMES.get(bare.lower())
        hint = f"did you mean {nickname!r}?" if nickname else _suggest(bare, FLOAT_DTYPE_NAMES)
        if not hint:
            hint = "it must be one of " + ", ".join(FLOAT_DTYPE_NAMES)
        self._report(f"unknown {key} {quote(name)}; {hint}", entry.node.position)
        return None

    def _seed(self) -> int:
        entry = self._root.entries.get("seed")
        if entry is None or _is_null(entry.node):
            return 0
        node = entry.node
        value = node.value if isinstance(node, ScalarNode) else None
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        self._report(f"'seed' must be a whole number, not {describe(node)}", node.position)
        return 0

    # Parameters

    def _parameters(
        self,
        entry: Entry | None,
        place: str = "",
        *,
        is_entry: bool = False,
        is_base: bool = False,
    ) -> _Settings:
        """The settings of a `parameters` block.

        entry: of the key `parameters`, if it is there.
        place: whose block it is; empty for the top level.
        is_entry: it is that of a model. is_base: and that model is the base.
        """
        block = _Settings()
        if entry is None or _is_null(entry.node):
            return block
        node = entry.node
        if not isinstance(node, MapNode):
            self._report(
                f"'parameters' must be a mapping (name: value), not {describe(node)}", node.position
            )
            block.mentioned = self._all_parameters()
            return block
        for name, setting_entry in node.entries.items():
            parameter = self._parameter(
                name, setting_entry, block, is_entry=is_entry, is_base=is_base
            )
            setting = self._setting(setting_entry.node, name, parameter)
            if parameter is not None and setting is not None:
                block.settings[name] = setting
                block.positions[name] = setting_entry.key_position
        return block

    def _parameter(
        self, name: str, entry: Entry, block: _Settings, *, is_entry: bool, is_base: bool
    ) -> Parameter | None:
        """The parameter a key in a `parameters` block names; None, reported, if it cannot."""
        signature = self._signature
        if signature is None:
            return None  # the method is unknown, so its parameters are
        block.mentioned.add(name)
        parameter = signature.by_name.get(name)
        if parameter is None:
            near = _suggestion(name, signature.by_name)
            if near is not None:
                block.mentioned.add(near)
            message = f"{signature.name} has no parameter {quote(name)}"
            self._report(message + self._elsewhere(name, signature, near), entry.key_position)
            return None
        if is_entry and parameter.scope is Scope.GLOBAL:
            self._report(
                f"{name!r} is one value for the whole merge, not one per model; "
                "move it to the top-level 'parameters'",
                entry.key_position,
            )
            return None
        if is_base and parameter.scope is Scope.NON_BASE:
            self._warn(f"{name!r} has no effect on the base model", entry.key_position)
        return parameter

    def _elsewhere(self, name: str, signature: Signature, near: str | None) -> str:
        """What to say of a name that is no parameter of the method."""
        if near is not None:
            return f"; did you mean {near!r}?"
        if name in TOP_LEVEL_KEYS:
            return "; it belongs at the top level of the recipe"
        methods = [other.name for other in self._signatures.values() if name in other.by_name]
        if methods:
            more = f" and {len(methods) - 4} more" if len(methods) > 4 else ""
            return f"; it is a parameter of {', '.join(methods[:4])}{more}" + _known(signature)
        return _known(signature)

    def _setting(self, node: Node, name: str, parameter: Parameter | None) -> Setting | None:
        """The value of a parameter in any of its forms; None, reported, if it is none."""
        if isinstance(node, ScalarNode):
            return self._scalar(node, name, parameter)
        if isinstance(node, MapNode):
            condition = self._condition(node, name, parameter)
            return None if condition is None else Conditions((condition,))
        if any(isinstance(item, MapNode) for item in node.items):
            return self._conditions(node, name, parameter)
        return self._gradient(node, name, parameter)

    def _conditions(
        self, node: ListNode, name: str, parameter: Parameter | None
    ) -> Conditions | None:
        conditions: list[Condition] = []
        complete = True
        catch_all: Position | None = None
        for item in node.items:
            if not isinstance(item, MapNode):
                self._report(
                    f"{name!r} mixes {describe(item)} with {{value, filter}} entries; "
                    "a list holds either plain values (a gradient) or such entries",
                    item.position,
                )
                complete = False
                continue
            if catch_all is not None:
                self._warn(
                    f"this entry of {name!r} is never used: the entry in line {catch_all.line} "
                    "has no filter and matches every tensor; move that one to the end",
                    item.position,
                )
            condition = self._condition(item, name, parameter)
            if condition is None:
                complete = False
                continue
            if condition.filter in (None, "*") and catch_all is None:
                catch_all = item.position
            conditions.append(condition)
        return Conditions(tuple(conditions)) if complete else None

    def _condition(self, node: MapNode, name: str, parameter: Parameter | None) -> Condition | None:
        problems_before = len(self._problems)
        for key, entry in node.entries.items():
            if key not in CONDITION_KEYS:
                hint = _suggest(key, CONDITION_KEYS) or "known here: value, filter"
                self._report(f"unknown key {quote(key)} in {name!r}; {hint}", entry.key_position)
        value: Scalar | Gradient | None = None
        value_entry = node.entries.get("value")
        if value_entry is None:
            if len(self._problems) == problems_before:
                self._report(f"this entry of {name!r} has no 'value'", node.position)
        elif isinstance(value_entry.node, MapNode):
            self._report(
                f"the value of an entry of {name!r} must be a value or a list of values, "
                "not a mapping",
                value_entry.node.position,
            )
        elif isinstance(value_entry.node, ListNode):
            value = self._gradient(value_entry.node, name, parameter)
        else:
            value = self._scalar(value_entry.node, name, parameter)
        name_filter: str | None = None
        filter_entry = node.entries.get("filter")
        if filter_entry is not None and not _is_null(filter_entry.node):
            filter_node = filter_entry.node
            if isinstance(filter_node, ScalarNode) and isinstance(filter_node.value, str):
                name_filter = filter_node.value
            else:
                quotes = "; put it in quotes" if isinstance(filter_node, ScalarNode) else ""
                self._report(
                    "'filter' must be text, a part of tensor names, "
                    f"not {describe(filter_node)}{quotes}",
                    filter_node.position,
                )
        if value is None or len(self._problems) > problems_before:
            return None
        return Condition(value, name_filter)

    def _gradient(self, node: ListNode, name: str, parameter: Parameter | None) -> Gradient | None:
        if not node.items:
            self._report(f"the list for {name!r} is empty", node.position)
            return None
        if parameter is not None and parameter.type is int:
            self._report(
                f"{name!r} is a whole number, which a gradient would pass through fractions; "
                "give one value",
                node.position,
            )
            return None
        values: list[Scalar] = []
        for item in node.items:
            if not isinstance(item, ScalarNode):
                self._report(
                    f"a list for {name!r} holds plain values (one gradient over the layers), "
                    f"not {describe(item)}",
                    item.position,
                )
                continue
            value = self._scalar(item, name, parameter)
            if value is not None:
                values.append(value)
        return Gradient(tuple(values)) if len(values) == len(node.items) else None

    def _scalar(self, node: ScalarNode, name: str, parameter: Parameter | None) -> Scalar | None:
        value = node.value
        if value is None:
            self._report(f"{name!r} has no value; remove it or give one", node.position)
            return None
        if parameter is None:
            if isinstance(value, (bool, int, float, str)):
                return value
            self._report(f"{name!r} cannot be {describe(node)}", node.position)
            return None
        converted = _convert(value, parameter.type)
        if converted is None:
            kind = _TYPE_WORDS[parameter.type]
            if isinstance(value, float) and not math.isfinite(value) and parameter.type is float:
                kind = "a finite number"
            elif _is_too_large(value):
                kind = f"at most {LARGEST_NUMBER:g} in magnitude"
            hint = "; put it in quotes" if parameter.type is str else ""
            self._report(
                f"{name!r} must be {kind}, not {describe(node)}{hint}",
                node.position,
            )
            return None
        if not isinstance(converted, (bool, str)) and not _in_range(converted, parameter):
            self._report(
                f"{name!r} must be {range_text(parameter)}, not {number_text(converted)}",
                node.position,
            )
            return None
        return converted

    # What concerns more than one place

    def _stray_key(
        self,
        key: str,
        entry: Entry,
        known: tuple[str, ...],
        block: _Settings,
        place: str = "",
        *,
        is_entry: bool = False,
    ) -> None:
        """Reports a key that does not belong where it stands, and says where it does."""
        signature = self._signature
        names = signature.by_name if signature is not None else self._all_parameters()
        if key in names:
            block.mentioned.add(key)
            scope = signature.by_name[key].scope if signature is not None else None
            target = (
                "the top-level 'parameters'"
                if not place or (is_entry and scope is Scope.GLOBAL)
                else f"the 'parameters' of {place}"
            )
            self._report(f"{key!r} is a parameter; move it under {target}", entry.key_position)
            return
        hint = _suggest(key, known)
        if hint is None and place and key in TOP_LEVEL_KEYS:
            self._report(
                f"{key!r} belongs at the top level of the recipe, not in {place}",
                entry.key_position,
            )
            return
        if hint is None and (near := _suggestion(key, names)) is not None:
            block.mentioned.add(near)
            hint = f"did you mean {near!r}, under 'parameters'?"
        if hint is None and signature is not None:
            methods = [other.name for other in self._signatures.values() if key in other.by_name]
            if methods:
                hint = f"it is a parameter of {', '.join(methods[:4])}, not of {signature.name}"
        if hint is None:
            hint = "known here: " + ", ".join(known)
        where = place or "the top level"
        self._report(f"unknown key {quote(key)} at {where}; {hint}", entry.key_position)

    def _check_base(self, signature: Signature, base: str | None, groups: list[_Group]) -> None:
        if signature.base is not BaseModel.REQUIRED or base is not None or not groups:
            return
        if all(group.base is not None for group in groups):
            return  # slices that have their own
        entry = self._root.entries.get("base_model")
        if entry is not None and not _is_null(entry.node):
            return  # given, and reported as wrong
        if self._is_misspelt("base_model"):
            return
        self._report(
            f"{signature.name} needs a base model; add at the top level: base_model: <path>",
            entry.node.position if entry else self._root.entries["merge_method"].node.position,
        )

    def _check_count(self, signature: Signature, group: _Group) -> None:
        base = group.base
        if signature.base is BaseModel.REQUIRED and base is None:
            return  # reported; the count depends on it
        if any(item.reference is None for item in group.items):
            return
        references = dict.fromkeys(item.reference for item in group.items)
        note = ""
        if signature.base is BaseModel.REQUIRED:
            if group.lists_base and base not in references:
                self._report(
                    f"the base model {quote(str(base))} is not among {group.place}; "
                    "list it there, with its layer_range",
                    group.position,
                )
                return
            references[base] = None
            note = ", the base included"
        elif signature.base is BaseModel.OPTIONAL and base is not None:
            references.pop(base, None)
            note = ", not counting the base"
        count = len(references)
        low, high = signature.min_models, signature.max_models
        if count >= low and (high is None or count <= high):
            return
        if high is None:
            wanted = f"at least {_models_text(low)}"
        elif low == high:
            wanted = f"exactly {_models_text(low)}"
        else:
            wanted = f"{low} to {_models_text(high)}"
        self._report(
            f"{signature.name} merges {wanted}{note}; here there {_are_text(count)}",
            group.position,
        )

    def _check_required(self, signature: Signature, group: _Group) -> None:
        """A required parameter must have a setting somewhere for every model it belongs to.

        Whether its filters cover every tensor is seen when the tensors are known.
        """
        base, items = group.base, group.items
        method_position = self._root.entries["merge_method"].node.position
        uses_base = signature.base is not BaseModel.UNUSED and base is not None
        base_is_listed = any(item.reference == base for item in items)
        for parameter in signature.parameters:
            name = parameter.name
            if not parameter.required or any(name in block.mentioned for block in group.blocks):
                continue
            if parameter.scope is Scope.GLOBAL:
                if any(name in item.block.mentioned for item in items):
                    continue  # reported, with the place to move it to
                self._report(
                    f"{signature.name} needs the parameter {name!r}; "
                    "give it under the top-level 'parameters'",
                    method_position,
                )
                continue
            for item in items:
                is_base = uses_base and item.reference == base
                if name in item.block.mentioned or (is_base and parameter.scope is Scope.NON_BASE):
                    continue
                who = item.place + (f" ({quote(item.reference)})" if item.reference else "")
                self._report(
                    f"{who} has no {name!r}, which {signature.name} needs for every model; give "
                    "it under this model's 'parameters', or for all under the top-level ones",
                    item.position,
                )
            if (
                parameter.scope is Scope.MODEL
                and uses_base
                and not base_is_listed
                and not group.lists_base
            ):
                self._report(
                    f"the base model has no {name!r}, which {signature.name} needs for every "
                    "model; list the base under 'models' with its 'parameters', or give "
                    f"{name!r} for all under the top-level 'parameters'",
                    self._root.entries["base_model"].node.position,
                )

    # Small things

    def _has(self, key: str) -> bool:
        entry = self._root.entries.get(key)
        return entry is not None and not _is_null(entry.node)

    def _is_misspelt(self, wanted: str) -> bool:
        """Whether a key of the top level, itself reported, was meant to be this one."""
        strays = (key for key in self._root.entries if key not in TOP_LEVEL_KEYS)
        few = islice(strays, PROBLEM_LIMIT)
        return any(_suggestion(key, TOP_LEVEL_KEYS) == wanted for key in few)

    def _all_parameters(self) -> set[str]:
        if self._signature is not None:
            return set(self._signature.by_name)
        return {name for signature in self._signatures.values() for name in signature.by_name}

    def _text_of(self, node: Node, key: str) -> str | None:
        if isinstance(node, ScalarNode) and isinstance(node.value, str):
            if node.value.strip():
                return node.value
            self._report(f"{key!r} is empty", node.position)
            return None
        quotes = ""
        if isinstance(node, ScalarNode) and node.value is not None:
            quotes = "; put it in quotes if it is a name"
        self._report(f"{key!r} must be text, not {describe(node)}{quotes}", node.position)
        return None

    def _report(self, message: str, position: Position) -> None:
        self._problems.append(Problem(message, position))
        if len(self._problems) > PROBLEM_LIMIT:
            raise recipe_error(self._path, self._problems)

    def _warn(self, message: str, position: Position) -> None:
        self._warnings.append(Problem(message, position))


def _convert(value: object, to: type[Scalar]) -> Scalar | None:
    """The value as a parameter's type, or None.

    As in mergekit, a quoted number is a number (YAML 1.1 reads 1e-4 as text) and 0 and 1 are
    booleans; unlike there, a boolean is not a number.
    """
    if to is str:
        return value if isinstance(value, str) else None
    if isinstance(value, str):
        if to is bool:
            return BOOLEAN_WORDS.get(value)
        text = value.strip()
        if len(text) > 400 or not _NUMBER.fullmatch(text):
            return None
        value = int(text) if text.lstrip("+-").isdigit() else float(text)
    if to is bool:
        if isinstance(value, (bool, int, float)) and value in (0, 1):
            return bool(value)
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    if not math.isfinite(number) or abs(number) > LARGEST_NUMBER:
        return None
    if to is float:
        return number
    return int(value) if number.is_integer() else None


def _is_too_large(value: object) -> bool:
    """Whether it is a float, or the text of one, that is finite and larger than it may be."""
    if isinstance(value, str) and len(value) <= 400 and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    return isinstance(value, float) and LARGEST_NUMBER < abs(value) < math.inf


def _in_range(value: int | float, parameter: Parameter) -> bool:
    return (parameter.minimum is None or value >= parameter.minimum) and (
        parameter.maximum is None or value <= parameter.maximum
    )


def range_text(parameter: Parameter) -> str:
    """A parameter's bounds in words: `from 0 to 1`, `at least 1`."""
    low, high = parameter.minimum, parameter.maximum
    if low is not None and high is not None:
        return f"from {low:g} to {high:g}"
    if low is not None:
        return f"at least {low:g}"
    return "of any size" if high is None else f"at most {high:g}"


def _is_null(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.value is None


def _suggestion(word: str, known: Collection[str]) -> str | None:
    """The known word that was probably meant."""
    if len(word) > 64:  # the comparison takes quadratic time
        return None
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.7)
    return near[0] if near else None


def _suggest(word: str, known: Collection[str]) -> str | None:
    near = _suggestion(word, known)
    if near is None:
        return None
    alien = next((c for c in word if c.isprintable() and not c.isascii()), None)
    # Letters of other alphabets look like those of ours: the two words may look the same.
    what = "" if alien is None else f" (the character {alien!r} is {alien!a})"
    return f"did you mean {near!r}?{what}"


def _known(signature: Signature) -> str:
    if not signature.parameters:
        return f"; {signature.name} takes no parameters"
    names = ", ".join(parameter.name for parameter in signature.parameters)
    return f"; parameters of {signature.name}: {names}"


def _models_text(count: int) -> str:
    return f"{count} model" if count == 1 else f"{count} models"


def _layers_text(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def _are_text(count: int) -> str:
    return f"is {count}" if count == 1 else f"are {count}"
