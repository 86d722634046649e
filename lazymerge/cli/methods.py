"""lazymerge methods: which merge methods there are, and what they take."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .options import JsonOption, PluginOption, load_plugins

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..recipe import Parameter, Signature


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in detail.")] = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the merge methods, or explain one."""
    from ..engine.planning import signatures

    load_plugins(plugin)

    known = signatures()
    if name is not None and name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise InputError(f"there is no merge method {name!r}; {hint}")
    chosen = [known[name]] if name is not None else list(known.values())
    from .console import print_json, results

    if as_json:
        documents = [signature_document(signature) for signature in chosen]
        print_json(documents[0] if name is not None else documents)
    elif name is None:
        results().print(_overview(chosen))
    else:
        results().print(_detail(chosen[0]))


def signature_document(signature: Signature) -> dict[str, Any]:
    """A signature for JSON."""
    return {
        "name": signature.name,
        "summary": signature.summary,
        "formula": signature.formula,
        "base_model": signature.base.value,
        "min_models": signature.min_models,
        "max_models": signature.max_models,
        "source": signature.source,
        "parameters": [
            {
                "name": p.name,
                "type": p.type.__name__,
                "scope": p.scope.value,
                "default": p.default,
                "required": p.required,
                "minimum": p.minimum,
                "maximum": p.maximum,
                "help": p.help,
            }
            for p in signature.parameters
        ],
    }


def _overview(chosen: list[Signature]) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", style="bold", no_wrap=True)
    table.add_column("base", no_wrap=True)
    table.add_column("models", no_wrap=True)
    table.add_column("what it does")
    for signature in chosen:
        table.add_row(
            signature.name, signature.base.value, _model_count(signature), signature.summary
        )
    return table


def _detail(signature: Signature) -> RenderableType:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    facts.add_row("computes", Text(signature.formula))
    facts.add_row("base_model", signature.base.value)
    facts.add_row("models", _model_count(signature))
    if signature.source:
        facts.add_row("source", signature.source)
    parts: list[RenderableType] = [
        Text.assemble((signature.name, "bold"), "  ", signature.summary),
        Text(),
        facts,
    ]
    if signature.parameters:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("parameter", style="bold", no_wrap=True)
        table.add_column("per", no_wrap=True)
        table.add_column("type", no_wrap=True)
        table.add_column("default", no_wrap=True)
        table.add_column("meaning")
        for p in signature.parameters:
            table.add_row(
                p.name,
                "recipe" if p.scope.value == "global" else p.scope.value,
                _type_text(p),
                "required" if p.required else _value_text(p.default),
                p.help,
            )
        parts.append(table)
    return Group(*parts)


def _model_count(signature: Signature) -> str:
    least, most = signature.min_models, signature.max_models
    if most is None:
        return f"{least} or more"
    return str(least) if least == most else f"{least} to {most}"


def _type_text(p: Parameter) -> str:
    if p.minimum is None and p.maximum is None:
        return p.type.__name__
    low = "" if p.minimum is None else f"{p.minimum:g}"
    high = "" if p.maximum is None else f"{p.maximum:g}"
    return f"{p.type.__name__} {low}…{high}"


def _value_text(value: object) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else f"{value}"
