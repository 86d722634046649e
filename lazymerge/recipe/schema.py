"""The JSON Schema of recipes, for editors: completion, hints on hover, errors while typing.

It says what one document's structure can say. What needs the whole recipe (a required parameter
given either per model or for all, how many models there are beside the base) is left to
`parse_recipe`, which is the judge; whatever the schema refuses, `parse_recipe` refuses too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .parse import FLOAT_DTYPE_NAMES
from .signature import BaseModel, Parameter, Scope, Signature
from .tokenizer_schema import tokenizer_schema
from .values import BOOLEAN_WORDS

_NUMBER_PATTERN = r"^\s*[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?\s*$"

_DTYPE_TEXT = (
    "{} Without it, {}. A name of a floating-point type of torch; `torch.` may stand before it."
)


_LORA = {"anyOf": [{"$ref": "#/$defs/place"}, {"type": "null"}]}


def json_schema(signatures: Mapping[str, Signature]) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of recipes that use these merge methods.

    signatures: of the known merge methods, by name.
    """
    definitions: dict[str, Any] = {
        "reference": {
            "anyOf": [
                {"type": "string", "pattern": "."},
                {
                    "type": "object",
                    "required": ["model"],
                    "properties": {"model": {"$ref": "#/$defs/place"}, "lora": _LORA},
                },
            ]
        },
        "place": {
            "anyOf": [
                {"type": "string", "pattern": "."},
                {
                    "type": "object",
                    "required": ["path"],
                    "properties": {
                        "path": {"type": "string"},
                        "revision": {"type": ["string", "null"]},
                    },
                },
            ]
        },
        "dtype": {
            "type": ["string", "null"],
            "enum": [
                *FLOAT_DTYPE_NAMES,
                *(f"torch.{name}" for name in FLOAT_DTYPE_NAMES),
                None,
            ],
        },
    }
    for signature in signatures.values():
        everywhere = signature.parameters
        per_model = [p for p in everywhere if p.scope is not Scope.GLOBAL]
        definitions[f"{signature.name} parameters"] = _block(everywhere)
        definitions[f"{signature.name} model parameters"] = _block(per_model)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lazymerge recipe",
        "description": "What to merge, and how. Most mergekit recipes are lazymerge recipes.",
        "type": "object",
        "required": ["merge_method"],
        "oneOf": [
            {"required": [key], "properties": {key: {"type": kind}}} for key, kind in _CONTENTS
        ],
        "additionalProperties": False,
        "properties": {
            "merge_method": {
                "description": "How the models are merged.",
                "type": "string",
                "enum": list(signatures),
                "enumDescriptions": [signature.summary for signature in signatures.values()],
                "markdownEnumDescriptions": [
                    _method_text(signature) for signature in signatures.values()
                ],
            },
            "models": {
                "description": "The models to merge.",
                "type": ["array", "null"],
                "minItems": 1,
                "items": _entry(),
            },
            "slices": _slices(),
            "modules": {
                "description": "Parts of models with several layer stacks, each merged by itself.",
                "type": ["object", "null"],
                "minProperties": 1,
                "additionalProperties": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "models": {"type": ["array", "null"], "minItems": 1, "items": _entry()},
                        "slices": _slices(),
                        "parameters": {
                            "description": "Parameters of this module.",
                            "type": ["object", "null"],
                        },
                    },
                    "oneOf": [
                        {"required": [key], "properties": {key: {"type": "array"}}}
                        for key in ("models", "slices")
                    ],
                },
            },
            "base_model": {
                "description": (
                    "The model the others were fine-tuned from; it also gives the merged model's "
                    "config and tokenizer."
                ),
                "anyOf": [{"$ref": "#/$defs/reference"}, {"type": "null"}],
            },
            "dtype": {
                "$ref": "#/$defs/dtype",
                "description": _DTYPE_TEXT.format(
                    "The element type the models are read as.", "each tensor keeps its own"
                ),
            },
            "out_dtype": {
                "$ref": "#/$defs/dtype",
                "description": _DTYPE_TEXT.format(
                    "The element type of the merged model.", "it is that of `dtype`"
                ),
            },
            "parameters": {
                "description": "Parameters of the whole merge, and of all models.",
                "type": ["object", "null"],
            },
            "seed": {
                "description": "Of methods that draw random numbers. Without it: 0.",
                "type": ["integer", "null"],
            },
            **tokenizer_schema(),
            "name": {
                "description": "What other documents of the file call the result.",
                "type": ["string", "null"],
            },
        },
        "allOf": [_of_method(signature) for signature in signatures.values()],
        "$defs": definitions,
    }


_CONTENTS = (("models", "array"), ("slices", "array"), ("modules", "object"))
"""One of them says what is merged."""


def _entry() -> dict[str, Any]:
    """An entry of a list of models."""
    return {
        "type": "object",
        "required": ["model"],
        "additionalProperties": False,
        "properties": {
            "model": {
                "$ref": "#/$defs/reference",
                "description": "The model's folder, or its id on the hub.",
            },
            "parameters": {
                "description": "Parameters of this model.",
                "type": ["object", "null"],
            },
        },
    }


def _slices() -> dict[str, Any]:
    source = _entry()
    source["required"] = ["model", "layer_range"]
    source["properties"]["layer_range"] = {
        "description": "The first layer, counted from 0, and the one after the last.",
        "type": "array",
        "minItems": 2,
        "maxItems": 2,
    }
    return {
        "description": "Runs of the output's layers, one after the other.",
        "type": ["array", "null"],
        "minItems": 1,
        "items": {
            "type": "object",
            "required": ["sources"],
            "additionalProperties": False,
            "properties": {
                "sources": {
                    "description": "Models that the run is merged from: as many layers of each.",
                    "type": "array",
                    "minItems": 1,
                    "items": source,
                },
                "base_model": {
                    "description": "In place of the recipe's base_model.",
                    "anyOf": [{"$ref": "#/$defs/reference"}, {"type": "null"}],
                },
                "parameters": {
                    "description": "Parameters of this slice.",
                    "type": ["object", "null"],
                },
                "residual_weight": {"description": "Does nothing.", "type": "null"},
            },
        },
    }


def _of_method(signature: Signature) -> dict[str, Any]:
    """What holds for the recipes of one method."""
    block = {"$ref": f"#/$defs/{signature.name} parameters"}
    entry = {"properties": {"parameters": {"$ref": f"#/$defs/{signature.name} model parameters"}}}
    slices = {"items": {"properties": {"parameters": block, "sources": {"items": entry}}}}
    modules = {
        "additionalProperties": {
            "properties": {"parameters": block, "models": {"items": entry}, "slices": slices}
        }
    }
    models: dict[str, Any] = {"items": entry}
    # With a base that may be listed or not, the list may hold one model less or one more.
    low, high = signature.min_models, signature.max_models
    if signature.base is BaseModel.REQUIRED:
        low -= 1
    elif signature.base is BaseModel.OPTIONAL and high is not None:
        high += 1
    if low > 1:
        models["minItems"] = low
    if high is not None:
        models["maxItems"] = high
    then: dict[str, Any] = {
        "properties": {
            "models": models,
            "slices": slices,
            "modules": modules,
            "parameters": block,
        }
    }
    if signature.base is BaseModel.REQUIRED:  # slices may have bases of their own
        then["if"] = {"required": ["models"], "properties": {"models": {"type": "array"}}}
        then["then"] = {
            "required": ["base_model"],
            "properties": {"base_model": {"type": ["string", "object"]}},
        }
    return {
        "if": {
            "properties": {"merge_method": {"const": signature.name}},
            "required": ["merge_method"],
        },
        "then": then,
    }


def _method_text(signature: Signature) -> str:
    text = f"{signature.summary}\n\n    {signature.formula}"
    return f"{text}\n\n{signature.source}" if signature.source else text


def _block(parameters: Iterable[Parameter]) -> dict[str, Any]:
    """A `parameters` block."""
    return {
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {parameter.name: _setting(parameter) for parameter in parameters},
    }


def _setting(parameter: Parameter) -> dict[str, Any]:
    """A parameter's value in any of its forms: scalar, gradient, condition, list of conditions."""
    scalar = _scalar(parameter)
    forms = [scalar]
    if parameter.type is not int:  # a gradient would pass through fractions
        forms.append(
            {
                "description": "A gradient: values spread evenly over the layers.",
                "type": "array",
                "minItems": 1,
                "items": scalar,
            }
        )
    condition = {
        "type": "object",
        "required": ["value"],
        "additionalProperties": False,
        "properties": {
            "value": forms[0] if len(forms) == 1 else {"anyOf": list(forms)},
            "filter": {
                "description": "For the tensors whose name contains this text; * is all.",
                "type": ["string", "null"],
            },
        },
    }
    conditions = {
        "description": "Tried in order; the first whose filter matches a tensor gives its value.",
        "type": "array",
        "minItems": 1,
        "items": condition,
    }
    setting: dict[str, Any] = {"description": parameter.help}
    if parameter.default is not None and not parameter.required:
        setting["default"] = parameter.default
    setting["anyOf"] = [*forms, condition, conditions]
    return setting


def _scalar(parameter: Parameter) -> dict[str, Any]:
    """One value; numbers may be in quotes, as YAML 1.1 takes 1e-4 for text."""
    if parameter.type is str:
        return {"type": "string"}
    if parameter.type is bool:
        return {
            "anyOf": [
                {"type": "boolean"},
                {"enum": [0, 1, *BOOLEAN_WORDS]},
            ]
        }
    scalar: dict[str, Any] = {
        "type": ["integer" if parameter.type is int else "number", "string"],
        "pattern": _NUMBER_PATTERN,
    }
    if parameter.minimum is not None:
        scalar["minimum"] = parameter.minimum
    if parameter.maximum is not None:
        scalar["maximum"] = parameter.maximum
    return scalar
