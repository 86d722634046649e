"""Which row of a tensor stands where: how embeddings are rearranged for another vocabulary.

    table    [0, 1, 3, -1]          row 0 is row 0 of the tensor, row 2 is its row 3, row 3 is zero

A vocabulary of 262,144 tokens is a table of 1 MiB. Tables are held as bytes and never as lists of
numbers; plans and models that need the same one share it.
"""

from __future__ import annotations

import sys
import zlib
from array import array
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

ABSENT = -1
"""A row that the tensor does not have: zeros."""

MOST_ROWS = 1 << 24
"""Of a table. The largest vocabularies have about 262,000 tokens, those of many languages a
million."""

_ITEM_BYTES = 4


@dataclass(frozen=True, slots=True)
class RowTable:
    """The tensor's row that stands in each row of the result; -1: zeros.

    data: 32-bit numbers, least byte first.
    digest: hash of the data.
    present: how many of them are rows of the tensor.
    """

    data: bytes = field(repr=False)
    digest: str = field(init=False, compare=False)
    present: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.data) % _ITEM_BYTES:
            raise ValueError("half a row number")
        numbers = _numbers(self.data)
        object.__setattr__(self, "digest", blake2b(self.data, digest_size=16).hexdigest())
        object.__setattr__(self, "present", len(numbers) - numbers.count(ABSENT))

    @classmethod
    def of(cls, rows: Sequence[int]) -> RowTable:
        """The table of these rows.

        Raises:
            OverflowError: a number needs more than 32 bits.
        """
        return cls(_bytes(array("i", rows)))

    def __len__(self) -> int:
        return len(self.data) // _ITEM_BYTES

    def __iter__(self) -> Iterator[int]:
        return iter(_numbers(self.data))

    @property
    def lowest(self) -> int:
        """The smallest number; -1 for an empty table."""
        return min(self, default=ABSENT)

    @property
    def highest(self) -> int:
        """The largest number; -1 for an empty table."""
        return max(self, default=ABSENT)

    @property
    def is_leading(self) -> bool:
        """Whether it is just the first rows, in their order."""
        return _numbers(self.data) == array("i", range(len(self)))

    def to_text(self) -> str:
        """The table for JSON: differences of neighbours, compressed."""
        numbers, before = array("i", bytes(len(self.data))), 0
        for place, row in enumerate(self):
            numbers[place] = row - before
            before = row
        return b64encode(zlib.compress(_bytes(numbers), 6)).decode("ascii")

    @classmethod
    def from_text(cls, text: str, count: int) -> RowTable:
        """The table that `to_text` gave.

        count: rows that it must have; not more than these are unpacked.

        Raises:
            ValueError: it is not such a text.
        """
        unpacking = zlib.decompressobj()
        try:
            data = unpacking.decompress(b64decode(text, validate=True), count * _ITEM_BYTES + 1)
        except zlib.error as error:
            raise ValueError(f"a table of rows is damaged: {error}") from None
        if len(data) != count * _ITEM_BYTES:
            raise ValueError(f"a table of rows has not {count} of them")
        numbers, row = _numbers(data), 0
        for place, difference in enumerate(numbers):
            row += difference
            if not ABSENT <= row < 1 << 31:
                raise ValueError(f"a table of rows holds {row}")
            numbers[place] = row
        return cls(_bytes(numbers))


def _numbers(data: bytes) -> array[int]:
    numbers = array("i", data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _bytes(numbers: array[int]) -> bytes:
    if sys.byteorder == "big":
        numbers = array("i", numbers)
        numbers.byteswap()
    return numbers.tobytes()
