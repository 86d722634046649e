"""A worker's memory: one allocation, touched before the first block."""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING

from ..checkpoint.tensor import DTYPES
from .stages import Slot

if TYPE_CHECKING:
    from torch import Tensor


class Arena:
    """Page-aligned memory that all buffers of a worker lie in.

    `touch` makes its pages, so that a run uses from its first block on what the plan says it will,
    and faults on none of them later. The worker does so in its own thread: the system takes 0.2 ms
    per MiB, and mmap holds the interpreter lock if it is to make them at once (MAP_POPULATE), which
    took 16 workers 10 ms before the first could begin.
    """

    def __init__(self, size_bytes: int) -> None:
        size = max(size_bytes, mmap.PAGESIZE)
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = memoryview(self.memory)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def touch(self) -> None:
        """Makes all pages; what they held is gone."""
        ctypes.memset(self._address, 0, len(self.memory))

    def tensor(self, slot: Slot) -> Tensor:
        """The slot's memory as a tensor of its dtype, shape (slot.elements,)."""
        import torch

        return torch.frombuffer(
            self.memory,
            dtype=getattr(torch, DTYPES[slot.dtype].torch_name),
            count=slot.elements,
            offset=slot.offset,
        )

    def bytes(self, slot: Slot) -> memoryview:
        """The slot's memory as bytes."""
        size = slot.elements * DTYPES[slot.dtype].item_bytes
        return self._view[slot.offset : slot.offset + size]

    def address(self, slot: Slot) -> int:
        """Where the slot lies in the process's memory."""
        return self._address + slot.offset

    def doubles(self, slot: Slot) -> ctypes.Array[ctypes.c_double]:
        """The slot's memory as an array of C; its dtype is F64."""
        return (ctypes.c_double * slot.elements).from_buffer(self.memory, slot.offset)

    def place(self) -> tuple[int, int]:
        """Address and size of all of it, in bytes."""
        return self._address, len(self.memory)
