"""Operations that several merge methods share. Importing this package registers them."""

from . import adapters, block_scales, combination, gram, identical, padding, selection, statistics

__all__ = [
    "adapters",
    "block_scales",
    "combination",
    "gram",
    "identical",
    "padding",
    "selection",
    "statistics",
]
