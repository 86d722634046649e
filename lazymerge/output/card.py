"""The model card: README.md of the output, in the form that the Hugging Face Hub expects."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_card(
    name: str,
    recipe_text: str,
    method: str,
    method_summary: str,
    method_source: str,
    models: Sequence[str],
    base_model: str | None,
    version: str,
    part: str | None = None,
) -> str:
    """The card's text.

    models: references as the recipe writes them, base included.
    part: name of the merge, where the recipe has others that use it.
    """
    hub_ids = [
        repository
        for repository in (model.partition("@")[0] for model in models)
        if _HUB_ID.fullmatch(repository) and not Path(repository).exists()
    ]
    metadata: dict[str, object] = {
        "library_name": "transformers",
        "tags": ["merge", "mergekit", "lazymerge"],
    }
    if hub_ids:
        metadata["base_model"] = list(dict.fromkeys(hub_ids))
        metadata["base_model_relation"] = "merge"
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()
    listed = "\n".join(
        f"- {model}" + (" (base)" if model == base_model else "") for model in models
    )
    source = f" ([source]({method_source}))" if method_source else ""
    which = "" if part is None else f"The merge that it names {_code(part)}.\n\n"
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", recipe_text)), default=0))
    return (
        f"---\n{front}\n---\n"
        f"# {name}\n\n"
        f"A merge of models, made with lazymerge {version}.\n\n"
        f"## Method\n\n`{method}`: {method_summary}{source}\n\n"
        f"## Models\n\n{listed}\n\n"
        f"## Recipe\n\n{which}{fence}yaml\n{recipe_text.rstrip()}\n{fence}\n"
    )


def _code(text: str) -> str:
    """A text as code, whatever is in it, on one line."""
    line = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall(r"`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"
