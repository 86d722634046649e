"""The JSON Schema of a recipe's tokenizer and chat template."""

from __future__ import annotations

from typing import Any

from .chat_templates import CHAT_TEMPLATES
from .tokenizer import AUTO, BASE, LARGEST_MULTIPLE, LARGEST_TOKEN_ID, UNION

_MODEL = {"$ref": "#/$defs/reference"}


def tokenizer_schema() -> dict[str, Any]:
    """The schemas of the keys, by key."""
    source = {
        "description": f"Where the vocabulary comes from: {UNION}, {BASE}, or a model.",
        "anyOf": [_MODEL, {"type": "null"}],
    }
    token_source = {
        "description": "Where the token's row comes from.",
        "anyOf": [
            {**_MODEL, "description": "The token's own row in a model."},
            {
                "description": "Zeros.",
                "type": "object",
                "required": ["kind"],
                "additionalProperties": False,
                "properties": {"kind": {"const": "zero"}},
            },
            {
                "description": "The row of another token.",
                "type": "object",
                "required": ["kind", "model"],
                "additionalProperties": False,
                "properties": {
                    "kind": {"const": "model_token"},
                    "model": _MODEL,
                    "token": {"type": ["string", "null"]},
                    "token_id": {
                        "type": ["integer", "null"],
                        "minimum": 0,
                        "maximum": LARGEST_TOKEN_ID,
                    },
                },
            },
            {"type": "null"},
        ],
    }
    token = {
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {
            "source": token_source,
            "force": {
                "description": "For models that have the token, too.",
                "type": ["boolean", "null"],
            },
        },
    }
    return {
        "tokenizer_source": source,
        "tokenizer": {
            "description": "The vocabulary of the merged model, and what new rows hold.",
            "type": ["object", "null"],
            "additionalProperties": False,
            "properties": {
                "source": source,
                "tokens": {
                    "description": "Tokens to add, and where rows come from.",
                    "type": ["object", "null"],
                    "additionalProperties": token,
                },
                "pad_to_multiple_of": {
                    "description": "The embeddings get so many rows more that this divides them.",
                    "type": ["integer", "null"],
                    "minimum": 1,
                    "maximum": LARGEST_MULTIPLE,
                },
            },
        },
        "chat_template": {
            "description": (
                f"{AUTO} (the one that most models have), Jinja text, or a known name: "
                f"{', '.join(CHAT_TEMPLATES)}."
            ),
            "type": ["string", "null"],
        },
    }
