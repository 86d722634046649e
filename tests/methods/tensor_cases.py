"""Tensors that merges are tried on: every shape, dtype and scale that may go wrong."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from hypothesis import strategies as st

BLOCK = 64
"""Elements per block while these cases run."""

SHAPES = [
    (),
    (1,),
    (0,),
    (3, 0),
    (7,),
    (BLOCK,),
    (BLOCK + 1,),
    (3, BLOCK),
    (5, 13),
    (2, 3, 37),
    (1, BLOCK - 1),
    (17, 31),
]

ROW_SHAPES = [
    *SHAPES,
    (1, 1),
    (BLOCK + 6, 1),  # rows of one element, and more of them than a block has elements
    (2 * BLOCK + 22, 3),
    (2, 3 * BLOCK + 8),  # rows longer than a block
    (1, 2 * BLOCK),
    (4, 1, 5),
    (3, 7, 1),
    (2, 3, 2, 5),
]

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]

DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}


@dataclass(frozen=True)
class Family:
    """The same tensor of several models.

    kind: what its values are like; see `values`.
    """

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    kind: str
    seed: int

    def tensors(self) -> list[torch.Tensor]:
        """One per dtype, in each its own values."""
        random = np.random.default_rng(self.seed)
        origin = values("normal", self.shape, random)
        made = []
        for dtype in self.dtypes:
            if self.kind == "identical":
                own = origin
            elif self.kind == "near":
                own = np.asarray(origin + 0.01 * values("normal", self.shape, random))
            else:
                own = values(self.kind, self.shape, random)
            made.append(torch.from_numpy(own).to(dtype))
        return made


def values(kind: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Float64 numbers: normal, on a coarse grid, zeros, tiny (denormal in most dtypes), huge; or on
    the grid, but some of them spoilt: nan or infinite."""
    size = prod(shape)
    if kind in ("grid", "spoilt"):
        flat = random.integers(-15, 16, size) / 4
        if kind == "spoilt":
            where = random.random(size) < 0.03
            flat[where] = random.choice([np.nan, np.inf, -np.inf], np.count_nonzero(where))
    elif kind == "few":
        flat = random.choice([-1.0, 0.0, 1.0], size)
    elif kind == "zero":
        flat = np.zeros(size)
    else:
        scale = {"tiny": 1e-41, "huge": 1e38}.get(kind, 1.0)
        flat = random.standard_normal(size) * scale
    return np.array(flat, dtype=np.float64).reshape(shape)


KINDS = ["normal", "near", "identical", "grid", "zero", "tiny", "huge"]
GRID_KINDS = ["grid", "few", "zero"]


def families(
    models: int, kinds: list[str], shapes: list[tuple[int, ...]] = SHAPES
) -> st.SearchStrategy[list[Family]]:
    """A few tensors that `models` models have."""
    return st.lists(
        st.builds(
            Family,
            st.sampled_from(shapes),
            st.tuples(*[st.sampled_from(DTYPES)] * models),
            st.sampled_from(kinds),
            st.integers(0, 2**32 - 1),
        ),
        min_size=3,
        max_size=6,
    )


def checkpoints(drawn: list[Family], names: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """The drawn tensors as models, each named t0, t1 …"""
    models: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    for number, family in enumerate(drawn):
        for name, tensor in zip(names, family.tensors(), strict=True):
            models[name][f"t{number}"] = tensor
    return models
