"""What every merge method computes: whole tensors, float64, simple rather than fast.

These functions are the definition of right that the engine is tested against. They were written
from the methods page and the papers it cites, and from no implementation.

Notation: x₀ the base model's tensor, x₁…xₙ the models, δᵢ = xᵢ − x₀, N the element count.

One call for all methods::

    expected = reference(
        "ties",
        base=x0,                                        # float64 array, or None
        models=[x1, x2],                                # float64 arrays of one shape
        parameters={"density": 0.5, "lambda": 1.0},     # global ones, and defaults for all models
        model_parameters=[{"weight": 0.7}, {"weight": 0.3}],
    )
    assert_within_ulps(actual, expected, torch.bfloat16)

- `models` are x₁…xₙ, the models that are merged. Where the base has a role of its own (x₀ in the
  formula) it is not among them, whether or not the recipe lists it; `model_parameters` then
  skips it too. For linear, karcher and passthrough, whose formulas have no x₀, a base that the
  recipe lists is one of `models`, at its place, with its parameters; `base` has no influence.
- slerp: `base` is where t = 0 and the only entry of `models` is where t = 1.
- A parameter of a model may stand in `parameters`: it holds for every model without its own.
- Random methods take `keep`, one boolean mask per model in the order of `models`. What draws
  the bits is tested on its own; `sparsified.della_probabilities` gives the probabilities.
- `difference_dtype=np.float32` rounds each δᵢ once to float32 before it is used, as float32
  arithmetic does, so that ranks, thresholds and ties fall as they must for inputs whose
  differences are inexact. The default compares with exact differences.

Two limits of any comparison with float32 arithmetic: where Σ yᵢ nearly cancels, the elected sign
may differ (use inputs on a coarse grid, whose sums are exact), and so may an element whose
importance or probability lies within rounding of its threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from . import linear, sparsified, spherical, task_vectors
from .case import Case, Mask, Tensor
from .rounding import assert_within_ulps, round_once, to_float64, ulp

__all__ = [
    "METHODS",
    "assert_within_ulps",
    "reference",
    "round_once",
    "to_float64",
    "ulp",
]

_SPARSIFIED = frozenset({"weight", "density", "normalize", "rescale", "lambda", "int8_mask"})

METHODS: dict[str, tuple[Callable[[Case], Tensor], frozenset[str]]] = {
    "linear": (linear.linear, frozenset({"weight", "normalize"})),
    "passthrough": (linear.passthrough, frozenset({"scale"})),
    "task_arithmetic": (linear.task_arithmetic, frozenset({"weight", "lambda", "normalize"})),
    "slerp": (spherical.slerp, frozenset({"t"})),
    "nuslerp": (
        spherical.nuslerp,
        frozenset({"weight", "nuslerp_flatten", "nuslerp_row_wise"}),
    ),
    "multislerp": (spherical.multislerp, frozenset({"weight", "normalize_weights", "eps"})),
    "karcher": (spherical.karcher, frozenset({"max_iter", "tol"})),
    "model_stock": (spherical.model_stock, frozenset({"filter_wise"})),
    "ties": (sparsified.ties, _SPARSIFIED),
    "dare_linear": (sparsified.dare_linear, _SPARSIFIED),
    "dare_ties": (sparsified.dare_ties, _SPARSIFIED),
    "breadcrumbs": (sparsified.breadcrumbs, _SPARSIFIED | {"gamma"}),
    "breadcrumbs_ties": (sparsified.breadcrumbs_ties, _SPARSIFIED | {"gamma"}),
    "della": (sparsified.della, _SPARSIFIED | {"epsilon"}),
    "della_linear": (sparsified.della_linear, _SPARSIFIED | {"epsilon"}),
    "sce": (task_vectors.sce, frozenset({"select_topk", "int8_mask"})),
    "ram": (task_vectors.ram, frozenset({"epsilon"})),
    "ramplus_tl": (task_vectors.ramplus_tl, frozenset({"r", "alpha", "epsilon"})),
    "nearswap": (task_vectors.nearswap, frozenset({"t"})),
    "arcee_fusion": (task_vectors.arcee_fusion, frozenset()),
}
"""By method name: the function, and the names of its parameters."""


def reference(
    method: str,
    *,
    base: Tensor | None = None,
    models: Sequence[Tensor],
    parameters: Mapping[str, Any] | None = None,
    model_parameters: Sequence[Mapping[str, Any]] | None = None,
    keep: Sequence[Mask] | None = None,
    difference_dtype: type[np.floating[Any]] = np.float64,
) -> Tensor:
    """The merged tensor in float64, unrounded; see the package's docstring.

    Raises ValueError for what a test cannot mean: an unknown parameter, unequal shapes, arrays
    that are not float64, a list whose length is not that of `models`; and for what a method
    refuses (weights that sum to 0, directions that cancel, densities out of range).
    """
    function, names = METHODS[method]
    parameters = dict(parameters or {})
    own = tuple(dict(entry) for entry in model_parameters or [{} for _ in models])
    masks = None if keep is None else tuple(keep)
    unknown = {name for entry in (parameters, *own) for name in entry} - names
    if unknown:
        raise ValueError(f"{method} has no parameter {', '.join(sorted(unknown))}")
    if not models:
        raise ValueError(f"{method}: no models")
    for what, entries in (("model_parameters", own), ("keep", masks)):
        if entries is not None and len(entries) != len(models):
            raise ValueError(f"{method}: {len(entries)} {what} for {len(models)} models")
    tensors = [*models] if base is None else [base, *models]
    if any(tensor.dtype != np.float64 for tensor in tensors):
        raise ValueError(f"{method}: every tensor must be a float64 array")
    shapes = {tensor.shape for tensor in tensors} | {mask.shape for mask in masks or ()}
    if len(shapes) != 1:
        raise ValueError(f"{method}: shapes differ: {sorted(shapes)}")
    if masks is not None and any(mask.dtype != np.bool_ for mask in masks):
        raise ValueError(f"{method}: keep masks must be boolean")
    case = Case(base, tuple(models), parameters, own, masks, difference_dtype)
    return np.asarray(function(case), dtype=np.float64)
