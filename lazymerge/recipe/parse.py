"""From a recipe's YAML to a `Recipe`, with everything that is wrong with it said at once.

The recipe is checked against the signatures of the merge methods and nothing else: no model is
looked up and no file but the recipe is opened.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from ..errors import Problem, RecipeError
from .documents import joined
from .groups import Group, ModelItem, check_base, check_count, check_required
from .model import Module, Recipe, Slice
from .reporting import Reporter
from .settings import TOP_LEVEL_KEYS, Settings, SettingsReader
from .signature import Signature
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
    is_null,
    number_text,
    quote,
    read_source,
    recipe_error,
)
from .suggestions import suggest, suggestion
from .tokenizer import TokenizerReader
from .values import convert

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

CONTENT_KEYS = ("models", "slices", "modules")
"""One of them says what is merged."""
MODEL_KEYS = ("model", "parameters")
SOURCE_KEYS = ("model", "layer_range", "parameters")
SLICE_KEYS = ("sources", "base_model", "parameters")
MODULE_KEYS = ("models", "slices", "parameters")

MOST_LAYERS = 1_000_000
"""No stack has more: lazymerge.architecture.layers."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""A module's name that needs no quotes in a message."""


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
class _Content:
    """What a recipe, or one of its modules, says is merged."""

    models: list[ModelItem] = field(default_factory=list)
    slices: list[Slice] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)


class _Parser:
    def __init__(
        self, root: MapNode, text: str, path: str, signatures: Mapping[str, Signature]
    ) -> None:
        self._root = root
        self._text = text
        self._path = path
        self._signatures = signatures
        self._reporter = Reporter(path)
        self._report, self._warn = self._reporter.report, self._reporter.warn

    def recipe(self) -> Recipe:
        entries = self._root.entries
        signature = self._merge_method()
        self._settings = SettingsReader(self._reporter, signature, self._signatures)
        top = self._settings.read(entries.get("parameters"))
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
        is_named = entry is not None and not is_null(entry.node)
        name = self._text_of(entry.node, "name") if entry is not None and is_named else None
        if signature is not None:
            self._check(signature, base, content.groups)
        if self._reporter.problems:
            raise recipe_error(self._path, self._reporter.problems)
        assert signature is not None
        return Recipe(
            merge_method=signature.name,
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
            warnings=self._reporter.warnings_in_order(),
        )

    def _check(self, signature: Signature, base: str | None, groups: list[Group]) -> None:
        is_misspelt = self._is_misspelt("base_model")
        check_base(self._reporter, self._root, signature, base, groups, is_misspelt=is_misspelt)
        for group in groups:
            check_count(self._reporter, signature, group)
            check_required(self._reporter, self._root, signature, group)

    # Reading, from the top down

    def _top_level_keys(self, top: Settings) -> None:
        for key, entry in self._root.entries.items():
            if key in TOP_LEVEL_KEYS:
                continue
            self._settings.stray_key(key, entry, TOP_LEVEL_KEYS, top)

    def _merge_method(self) -> Signature | None:
        entry = self._root.entries.get("merge_method")
        known = ", ".join(self._signatures)
        if entry is None or is_null(entry.node):
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
            hint = suggest(name, self._signatures) or f"known methods: {known}"
            self._report(f"unknown merge_method {quote(name)}; {hint}", entry.node.position)
        return signature

    def _base_model(self) -> str | None:
        entry = self._root.entries.get("base_model")
        if entry is None or is_null(entry.node):
            return None
        return self._reference(entry.node, "base_model")

    def _content_key(self, node: MapNode, place: str, keys: tuple[str, ...]) -> str | None:
        """Which of models, slices and modules is given; None, reported, unless it is one alone."""
        present = [key for key in keys if key in node.entries]
        given = [key for key in present if not is_null(node.entries[key].node)] or present[:1]
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
        self, node: Node, base: str | None, top: Settings, content: _Content
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
            block = self._settings.read(entry.node.entries.get("parameters"), place)
            for key, stray in entry.node.entries.items():
                if key not in MODULE_KEYS:
                    self._settings.stray_key(key, stray, MODULE_KEYS, block, place)
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
        blocks: tuple[Settings, ...],
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
            content.groups.append(Group(place, entry.key_position, items, base, blocks))

    def _slices(
        self,
        node: Node,
        place: str,
        base: str | None,
        blocks: tuple[Settings, ...],
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
        blocks: tuple[Settings, ...],
        content: _Content,
    ) -> None:
        if not isinstance(node, MapNode):
            self._report(
                f"{place} must be a mapping with 'sources', not {describe(node)}", node.position
            )
            return
        own_base = None
        entry = node.entries.get("base_model")
        if entry is not None and not is_null(entry.node):
            own_base = self._reference(entry.node, "base_model")
        block = self._settings.read(node.entries.get("parameters"), place)
        for key, stray in node.entries.items():
            if key == "residual_weight":
                if not is_null(stray.node):
                    self._report(
                        "'residual_weight' does nothing, in mergekit neither; remove it",
                        stray.key_position,
                    )
            elif key not in SLICE_KEYS:
                self._settings.stray_key(key, stray, SLICE_KEYS, block, place)
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
            Group(
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

    def _check_lengths(self, items: list[ModelItem]) -> None:
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
    ) -> list[ModelItem] | None:
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

    def _model(self, node: Node, place: str, base: str | None, keys: tuple[str, ...]) -> ModelItem:
        if not isinstance(node, MapNode):
            hint = ""
            if isinstance(node, ScalarNode) and isinstance(node.value, str):
                hint = f"; write: model: {quote(node.value)}"
            self._report(
                f"{place} must be a mapping with the key 'model', not {describe(node)}{hint}",
                node.position,
            )
            everything = Settings(mentioned=self._settings.names)
            return ModelItem(place, None, node.position, everything)
        entry = node.entries.get("model")
        reference = None
        position = node.position
        if entry is None:
            few = islice(node.entries, PROBLEM_LIMIT)
            if not any(suggestion(key, keys) == "model" for key in few):
                self._report(f"{place} has no 'model: <path>'", position)
        else:
            position = entry.node.position
            reference = self._reference(entry.node, "model")
        block = self._settings.read(
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
            self._settings.stray_key(key, stray, keys, block, place, is_entry=True)
        layer_range = self._layer_range(node, place) if "layer_range" in keys else None
        return ModelItem(place, reference, position, block, layer_range)

    def _layer_range(self, node: MapNode, place: str) -> tuple[int, int] | None:
        entry = node.entries.get("layer_range")
        if entry is None:
            self._report(f"{place} has no 'layer_range: [first, stop]'", node.position)
            return None
        items = entry.node.items if isinstance(entry.node, ListNode) else ()
        numbers = [convert(item.value, int) for item in items if isinstance(item, ScalarNode)]
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
            if part == "lora" and (entry is None or is_null(entry.node)):
                continue
            path = None if entry is None else self._place_of(entry.node, f"{key}.{part}")
            if entry is None:
                self._report(f"{key!r} has no 'model: {{path: <path>}}'", node.position)
            if path is None:
                return None
            paths.append(path)
        for stray, entry in node.entries.items():
            if is_null(entry.node):
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
        if path is None or revision is None or is_null(revision.node):
            return path
        at = self._text_of(revision.node, f"{key}.revision")
        return None if at is None else f"{path}@{at}"

    def _dtype(self, key: str) -> str | None:
        entry = self._root.entries.get(key)
        if entry is None or is_null(entry.node):
            return None
        name = self._text_of(entry.node, key)
        if name is None:
            return None
        bare = name.removeprefix("torch.")
        if bare in FLOAT_DTYPE_NAMES:
            return bare
        nickname = _DTYPE_NICKNAMES.get(bare.lower())
        hint = f"did you mean {nickname!r}?" if nickname else suggest(bare, FLOAT_DTYPE_NAMES)
        if not hint:
            hint = "it must be one of " + ", ".join(FLOAT_DTYPE_NAMES)
        self._report(f"unknown {key} {quote(name)}; {hint}", entry.node.position)
        return None

    def _seed(self) -> int:
        entry = self._root.entries.get("seed")
        if entry is None or is_null(entry.node):
            return 0
        node = entry.node
        value = node.value if isinstance(node, ScalarNode) else None
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        self._report(f"'seed' must be a whole number, not {describe(node)}", node.position)
        return 0

    # Small things

    def _has(self, key: str) -> bool:
        entry = self._root.entries.get(key)
        return entry is not None and not is_null(entry.node)

    def _is_misspelt(self, wanted: str) -> bool:
        """Whether a key of the top level, itself reported, was meant to be this one."""
        strays = (key for key in self._root.entries if key not in TOP_LEVEL_KEYS)
        few = islice(strays, PROBLEM_LIMIT)
        return any(suggestion(key, TOP_LEVEL_KEYS) == wanted for key in few)

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


def _layers_text(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"
