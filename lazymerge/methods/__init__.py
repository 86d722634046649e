"""The merge methods, one file per family.

merge.py             what a method is given and how it declares itself
linear.py            linear, passthrough, task_arithmetic: out = Σ cᵢ xᵢ
spherical.py         slerp, nuslerp, multislerp, karcher, model_stock: coefficients from the Gram
                     matrix; spherical_vectors.py: the same for every row or column
sparsified.py        ties, breadcrumbs, dare, della: task vectors thinned (thinning.py), then mixed
sce.py               sce: selection by variance, weights by energy, sign consensus
ram.py               ram, ramplus_tl: averages over the models that change an element
nearswap.py          nearswap: changes cut to a bound
arcee_fusion.py      arcee_fusion: the changes of largest importance
"""

# In the order in which methods are listed:
from . import linear  # isort: skip
from . import spherical  # isort: skip
from . import spherical_vectors  # isort: skip
from . import sparsified  # isort: skip
from . import sce  # isort: skip
from . import ram  # isort: skip
from . import nearswap  # isort: skip
from . import arcee_fusion  # isort: skip
from .merge import METHODS, Contribution, Method, TensorMerge, merge_method

__all__ = [
    "METHODS",
    "Contribution",
    "Method",
    "TensorMerge",
    "arcee_fusion",
    "linear",
    "merge_method",
    "nearswap",
    "ram",
    "sce",
    "sparsified",
    "spherical",
    "spherical_vectors",
]
