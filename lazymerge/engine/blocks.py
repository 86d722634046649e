"""The unit of work: a fixed run of consecutive elements of one tensor.

Block boundaries decide how reductions are rounded, so they are part of what a merge *is*: they
follow from the tensor's shape, the operation and the class of device alone, never from the memory
limit or the number of workers. Operations that look at rows as wholes get blocks of whole rows.
"""

from __future__ import annotations

from typing import Literal

BLOCK_ELEMENTS = 1 << 18
"""Elements per block on CPUs. Measured for three bfloat16 inputs summed in float64 on two cores
with 512 KiB of L2 each and 32 MiB of L3: 0.88 ns per element at 2^17, 0.85 at 2^18, 0.96 at 2^19,
1.8 at 2^15 (Python per block). In float32 0.72, 0.62 and 0.63."""

DEVICE_BLOCK_ELEMENTS = 1 << 22
"""Elements per block on accelerators; reckoned, not measured yet.

Large enough: three bfloat16 inputs of 2^22 elements take 1 ms over 25 GB/s of PCIe, and Python
takes 0.1 to 0.2 ms to start the twenty or so kernels of a block. At 2^20 the bus would wait.
Small enough: pinned staging takes two blocks of every input and of the output for every worker,
64 MiB for that merge. 2^24 would take 256 MiB of --memory and bring nothing, for the bus is the
limit already. And counts of a block's elements stay below 2^24, so that float32 holds them exactly.
"""

DeviceClass = Literal["cpu", "cuda"]


def elements_per_block(device: DeviceClass, row_elements: int = 1) -> int:
    """Elements of a block on a class of device.

    row_elements: length of the rows that blocks must be made of: as many as fit, at least one.
    """
    usual = BLOCK_ELEMENTS if device == "cpu" else DEVICE_BLOCK_ELEMENTS
    return max(row_elements, usual // row_elements * row_elements)


WINDOW_BLOCKS = 4
"""Blocks of an input that are mapped at a time on CPUs. With 4, 8 and 16, task arithmetic of 1.1B
models took 0.85, 0.76 and 0.75 s and 69, 81 and 105 MiB (pread: 0.70 s, 60 MiB); ties 2.7, 2.8 and
2.4 s. Mapping all pages of a window at once (MADV_POPULATE_READ) took 1.4 and 3.5 s."""


def window_elements(element_count: int, device: DeviceClass = "cpu", row_elements: int = 1) -> int:
    """The most elements of a tensor that are mapped at a time."""
    blocks = WINDOW_BLOCKS if device == "cpu" else 1
    return min(blocks * elements_per_block(device, row_elements), element_count)


def block_count(element_count: int, device: DeviceClass = "cpu", row_elements: int = 1) -> int:
    """Blocks that a tensor of so many elements has; 0 for an empty one."""
    return -(-element_count // elements_per_block(device, row_elements))


def block_range(
    block: int, element_count: int, device: DeviceClass = "cpu", row_elements: int = 1
) -> tuple[int, int]:
    """First element, and the element after the last, of a block of the flattened tensor."""
    elements = elements_per_block(device, row_elements)
    return block * elements, min((block + 1) * elements, element_count)


def block_length(element_count: int, device: DeviceClass = "cpu", row_elements: int = 1) -> int:
    """Elements of a tensor's longest block."""
    return min(elements_per_block(device, row_elements), element_count)
