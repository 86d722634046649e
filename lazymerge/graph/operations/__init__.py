"""Operations that several merge methods share. Importing this package registers them."""

from . import block_scales, combination, gram, identical, low_rank, padding, selection

__all__ = ["block_scales", "combination", "gram", "identical", "low_rank", "padding", "selection"]
