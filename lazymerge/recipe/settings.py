"""The `parameters` of a recipe: their values in all forms, and where each may stand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import Position
from .model import Condition, Conditions, Gradient, Setting
from .reporting import Reporter
from .signature import Parameter, Scalar, Scope, Signature
from .source import (
    Entry,
    ListNode,
    MapNode,
    Node,
    ScalarNode,
    describe,
    is_null,
    number_text,
    quote,
)
from .suggestions import suggest, suggestion
from .values import LARGEST_NUMBER, TYPE_WORDS, convert, in_range, is_too_large, range_text

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
CONDITION_KEYS = ("value", "filter")


@dataclass(slots=True)
class Settings:
    """A `parameters` block.

    settings, positions: of the parameters that are right, by name.
    mentioned: names the user has given a value, rightly or not, here or in the wrong place: no
        use in complaining that they are missing.
    """

    settings: dict[str, Setting] = field(default_factory=dict)
    positions: dict[str, Position] = field(default_factory=dict)
    mentioned: set[str] = field(default_factory=set)


class SettingsReader:
    """Reads `parameters`; what is wrong with them is reported."""

    def __init__(
        self,
        reporter: Reporter,
        signature: Signature | None,
        signatures: Mapping[str, Signature],
    ) -> None:
        """signature: of the recipe's method; None: it is not known. signatures: of all methods."""
        self._reporter = reporter
        self._report, self._warn = reporter.report, reporter.warn
        self._signature = signature
        self._signatures = signatures

    @property
    def names(self) -> set[str]:
        """The method's parameters, or those of all methods."""
        if self._signature is not None:
            return set(self._signature.by_name)
        return {name for signature in self._signatures.values() for name in signature.by_name}

    def read(
        self,
        entry: Entry | None,
        place: str = "",
        *,
        is_entry: bool = False,
        is_base: bool = False,
    ) -> Settings:
        """The settings of a `parameters` block.

        entry: of the key `parameters`, if it is there.
        place: whose block it is; empty for the top level.
        is_entry: it is that of a model. is_base: and that model is the base.
        """
        block = Settings()
        if entry is None or is_null(entry.node):
            return block
        node = entry.node
        if not isinstance(node, MapNode):
            self._report(
                f"'parameters' must be a mapping (name: value), not {describe(node)}", node.position
            )
            block.mentioned = self.names
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
        self, name: str, entry: Entry, block: Settings, *, is_entry: bool, is_base: bool
    ) -> Parameter | None:
        """The parameter a key in a `parameters` block names; None, reported, if it cannot."""
        signature = self._signature
        if signature is None:
            return None  # the method is unknown, so its parameters are
        block.mentioned.add(name)
        parameter = signature.by_name.get(name)
        if parameter is None:
            near = suggestion(name, signature.by_name)
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
        problems_before = len(self._reporter.problems)
        for key, entry in node.entries.items():
            if key not in CONDITION_KEYS:
                hint = suggest(key, CONDITION_KEYS) or "known here: value, filter"
                self._report(f"unknown key {quote(key)} in {name!r}; {hint}", entry.key_position)
        value: Scalar | Gradient | None = None
        value_entry = node.entries.get("value")
        if value_entry is None:
            if len(self._reporter.problems) == problems_before:
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
        if filter_entry is not None and not is_null(filter_entry.node):
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
        if value is None or len(self._reporter.problems) > problems_before:
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
        converted = convert(value, parameter.type)
        if converted is None:
            kind = TYPE_WORDS[parameter.type]
            if isinstance(value, float) and not math.isfinite(value) and parameter.type is float:
                kind = "a finite number"
            elif is_too_large(value):
                kind = f"at most {LARGEST_NUMBER:g} in magnitude"
            hint = "; put it in quotes" if parameter.type is str else ""
            self._report(
                f"{name!r} must be {kind}, not {describe(node)}{hint}",
                node.position,
            )
            return None
        if not isinstance(converted, (bool, str)) and not in_range(converted, parameter):
            self._report(
                f"{name!r} must be {range_text(parameter)}, not {number_text(converted)}",
                node.position,
            )
            return None
        return converted

    def stray_key(
        self,
        key: str,
        entry: Entry,
        known: tuple[str, ...],
        block: Settings,
        place: str = "",
        *,
        is_entry: bool = False,
    ) -> None:
        """Reports a key that does not belong where it stands, and says where it does."""
        signature = self._signature
        names = signature.by_name if signature is not None else self.names
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
        hint = suggest(key, known)
        if hint is None and place and key in TOP_LEVEL_KEYS:
            self._report(
                f"{key!r} belongs at the top level of the recipe, not in {place}",
                entry.key_position,
            )
            return
        if hint is None and (near := suggestion(key, names)) is not None:
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


def _known(signature: Signature) -> str:
    if not signature.parameters:
        return f"; {signature.name} takes no parameters"
    names = ", ".join(parameter.name for parameter in signature.parameters)
    return f"; parameters of {signature.name}: {names}"
