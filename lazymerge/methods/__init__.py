"""The merge methods, one file per family.

merge.py       what a method is given and how it declares itself
linear.py      linear, passthrough, task_arithmetic: out = Σ cᵢ xᵢ
spherical.py   slerp: coefficients from the Gram matrix
sparsified.py  ties: task vectors thinned by magnitude, mixed by sign consensus
"""

from . import linear, sparsified, spherical
from .merge import METHODS, Contribution, Method, TensorMerge, merge_method

__all__ = [
    "METHODS",
    "Contribution",
    "Method",
    "TensorMerge",
    "linear",
    "merge_method",
    "sparsified",
    "spherical",
]
