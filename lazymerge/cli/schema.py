"""lazymerge schema: the recipe language, or the plan document, as JSON Schema."""

from __future__ import annotations

from typing import Annotated

import typer


def schema(
    plan: Annotated[
        bool, typer.Option("--plan", help="Of what `lazymerge plan --json` prints.")
    ] = False,
) -> None:
    """Print the JSON Schema of recipes.

    Point an editor's YAML plugin at it to get completion and checks while typing.
    """
    from .console import print_json

    if plan:
        from ..inspection.plan_schema import plan_schema

        print_json(plan_schema())
        return
    from ..engine.planning import signatures
    from ..recipe import json_schema

    print_json(json_schema(signatures()))
