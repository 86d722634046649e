#!/usr/bin/env python3
"""Write docs/methods.md from what the methods declare of themselves.

    python scripts/make_methods_page.py                    write it; measured costs stay
    python scripts/make_methods_page.py --check            exit 1 if it is not up to date
    python scripts/make_methods_page.py --costs costs.md   with what measure_methods.py has printed

What stands between the two marks of the costs is kept from the page as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lazymerge.methods import METHODS
from lazymerge.recipe.signature import BaseModel, Parameter, Scope, Signature

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"

BEGIN, END = "<!-- costs: begin -->", "<!-- costs: end -->"

INTRODUCTION = """\
# Merge methods

Names, parameters and defaults are those of mergekit's recipes. In the formulas x₀ is the base
model's tensor, x₁ … xₙ are those of the other models in recipe order, δᵢ = xᵢ − x₀.

Sums and products of linear combinations are made in float64 and rounded once to the output's
dtype. Methods that compare magnitudes or elect signs (`ties`, `breadcrumbs`, `dare_ties`, `della`
and their kin) compute in float32, or in float64 where an input is float64.

What random methods keep is a function of the seed (`seed:` in the recipe, or `--seed`; 0 by
default), the model's place in the recipe, the tensor's name and the element's index: the same
whatever the memory limit, the number of workers or the device.

inf and nan are passed on. A run names the tensors of the merge that hold any; `--strict` makes it
an error.
"""

DEPARTURES = {
    "linear": """Weights that sum to 0 are an error with `normalize`. A `base_model` that
is not listed takes no part (in mergekit it does).""",
    "multislerp": """The step along the tangent of the mean is always 0 and left out. Where
all models have zeros (norms up to `eps`) so does the merge; mergekit stops with an error.""",
    "karcher": """The iteration runs on the coefficients of the models, over their Gram
matrix. A `base_model` that is not listed takes no part (in mergekit it does).""",
    "ties": """Exactly k elements survive; of equal magnitudes at the threshold, the first.
""",
    "breadcrumbs": "Ranks are exact; of equal magnitudes the later ones rank higher.",
    "breadcrumbs_ties": "As for `breadcrumbs`.",
    "dare_linear": """mergekit scales what survives to the L1 norm before the drop; here it
is divided by `density`, as the paper says. The two agree in expectation.""",
    "dare_ties": "As for `dare_linear`.",
    "della": """mergekit scales what survives to the L1 norm before the drop; here it is
divided by its probability, as the paper says. That is not the same in expectation: with
density 0.5 ± 0.3 mergekit multiplies the quarters of a row, from the smallest changes to the
largest, by 0.49, 0.71, 0.94 and 1.20 in the mean; here it is 1 throughout. Equal magnitudes
rank by position.""",
    "della_linear": "As for `della`.",
    "sce": """mergekit's variances in float32 may select other elements where they are
nearly equal.""",
    "ramplus_tl": "With epsilon 0 and a tensor that no model changes mergekit gives nan.",
    "nearswap": "An infinite difference gives nan.",
    "arcee_fusion": """The quartiles are exact and interpolated (mergekit takes the lower
element, of a million random ones), and the divergence is computed in float64 (mergekit's, in
float32, is off by 2% and more). Rows that hold inf or nan are taken over whole.""",
}
"""What a reader who knows mergekit should know, by method."""


def parameter_row(parameter: Parameter) -> str:
    """A row of the table of parameters."""
    bounds = ""
    if parameter.minimum is not None or parameter.maximum is not None:
        low = "" if parameter.minimum is None else f"{parameter.minimum:g}"
        high = "" if parameter.maximum is None else f"{parameter.maximum:g}"
        bounds = f" {low}…{high}"
    if parameter.required:
        default = "required"
    elif parameter.default is None:
        default = "none"
    elif isinstance(parameter.default, bool):
        default = str(parameter.default).lower()
    else:
        default = f"{parameter.default:g}" if parameter.type is not str else str(parameter.default)
    scope = {Scope.GLOBAL: "recipe", Scope.MODEL: "model", Scope.NON_BASE: "model but the base"}
    return (
        f"| `{parameter.name}` | {scope[parameter.scope]} | {parameter.type.__name__}{bounds} | "
        f"{default} | {parameter.help} |"
    )


def section(signature: Signature) -> str:
    """What the page says of a method."""
    least, most = signature.min_models, signature.max_models
    count = (
        f"{least} or more"
        if most is None
        else str(least)
        if least == most
        else (f"{least} to {most}")
    )
    noun = "model" if count == "1" else "models"
    models = {
        BaseModel.REQUIRED: f"{count} models, of which one is the `base_model`",
        BaseModel.OPTIONAL: f"{count} {noun}; a `base_model` may be given besides",
        BaseModel.UNUSED: f"{count} {noun}; a `base_model` gives config and tokenizer alone",
    }[signature.base]
    lines = [
        f"## {signature.name}",
        "",
        signature.summary,
        "",
        "```text",
        signature.formula,
        "```",
        "",
    ]
    lines += [
        f"Takes {models}. Source: <{signature.source}>."
        if signature.source
        else f"Takes {models}.",
        "",
    ]
    if signature.parameters:
        lines += ["| parameter | per | type | default | meaning |", "|---|---|---|---|---|"]
        lines += [parameter_row(parameter) for parameter in signature.parameters]
        lines += [""]
    if signature.name in DEPARTURES:
        lines += [DEPARTURES[signature.name], ""]
    return "\n".join(lines)


def page(costs: str) -> str:
    """The whole page. costs: what stands between the marks."""
    overview = ["| method | |", "|---|---|"]
    overview += [
        f"| [{name}](#{name}) | {method.signature.summary} |" for name, method in METHODS.items()
    ]
    sections = [section(method.signature) for method in METHODS.values()]
    parts = [
        INTRODUCTION,
        "\n".join(overview),
        "\n## What they cost\n",
        f"Measured by `python scripts/measure_methods.py`.\n\n{BEGIN}\n{costs.strip()}\n{END}\n",
        *sections,
    ]
    return "\n".join(parts).rstrip() + "\n"


def costs_of(text: str) -> str:
    """What stands between the marks of a page."""
    return text.partition(BEGIN)[2].partition(END)[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--costs", type=Path, metavar="FILE")
    parsed = parser.parse_args(arguments)
    before = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    costs = costs_of(before) if parsed.costs is None else parsed.costs.read_text(encoding="utf-8")
    after = page(costs)
    if parsed.check:
        if after != before:
            print("docs/methods.md is not up to date; run scripts/make_methods_page.py")
            return 1
        return 0
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
