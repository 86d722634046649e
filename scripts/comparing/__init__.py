"""What the comparison with mergekit is made of; scripts/compare_with_mergekit.py runs it.

inputs: small checkpoints of several dtypes, with changes of several kinds.
recipes: random recipes of any method.
programs: the two programs; merge_with_mergekit.py runs in mergekit's environment.
expectations: what a merged tensor should be, and which of its elements may fall either way.
judging: two merged tensors against that expectation.
chance: what methods that draw random numbers give on average, and how far off one draw may be.
"""

from __future__ import annotations

import sys
from pathlib import Path

# the float64 references are part of the tests
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
