"""Operations that several merge methods share. Importing this package registers them."""

from . import combination, gram, identical, selection

__all__ = ["combination", "gram", "identical", "selection"]
