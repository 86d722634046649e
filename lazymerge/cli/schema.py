"""lazymerge schema: the recipe language as JSON Schema."""

from __future__ import annotations


def schema() -> None:
    """Print the JSON Schema of recipes.

    Point an editor's YAML plugin at it to get completion and checks while typing.
    """
    from ..engine.plan import signatures
    from ..recipe import json_schema
    from .console import print_json

    print_json(json_schema(signatures()))
