"""Random numbers without a state: a function of a key and an index.

Which elements a random method keeps must not depend on who computes which block when, nor on the
device, nor on how often a run was interrupted. So there is no generator that is stepped on: the
bits of element i are computed from (key, i), by Philox4x32-10, four elements at a time.

    key      64 bits, a hash of (seed, place of the model, name of the tensor)
    counter  i div 4        ──Philox──►  four words of 32 bits; the element's is number i mod 4
    number   the upper 24 bits of the word, times 2⁻²⁴: exact in float32

Source: J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1,
2, 3", SC'11. Philox passes all of TestU01; tests/graph/test_random_bits.py has the authors' known
answers. engine/native/kernels.c and engine/device/vector.py compute the same bits.
"""

from __future__ import annotations

from functools import cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF

UNIT = 2.0**-24
"""Distance of neighbouring numbers. A probability p is met as ⌈p · 2²⁴⌉ · 2⁻²⁴."""

ROOM_WORDS = 8
"""64-bit words of memory that four numbers take while they are made."""

CHUNK_COUNTERS = 1 << 11
"""Counters done at a time: eight arrays of 16 KiB stay in the first-level caches."""


def stream_key(seed: int, model: int, tensor: str) -> int:
    """The key of one model's tensor: 64 bits, signed as the kernels take it.

    seed: of the recipe. model: its place among the models that are merged, from 0; not its path,
        so that a moved folder gives the same masks. tensor: name of the output tensor.
    """
    text = f"{seed}/{model}/{tensor}".encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little", signed=True)


def philox(key: int, counters: NDArray[numpy.uint64], room: NDArray[numpy.uint64]) -> Any:
    """The four words of each counter, shape (4, n), uint64 with the upper half zero; in `room`.

    counters: shape (n,). room: shape (ROOM_WORDS, n); overwritten.
    """
    import numpy

    words, products, highs, spare = room[:4], room[4:6], room[6], room[7]
    word, half = numpy.uint64(WORD), numpy.uint64(32)
    numpy.bitwise_and(counters, word, out=words[0])
    numpy.right_shift(counters, half, out=words[1])
    words[2:] = 0
    keys = [key & WORD, (key >> 32) & WORD]
    first, second, third, fourth = words
    for _ in range(ROUNDS):
        numpy.multiply(first, numpy.uint64(MULTIPLIERS[0]), out=products[0])
        numpy.multiply(third, numpy.uint64(MULTIPLIERS[1]), out=products[1])
        numpy.right_shift(products[1], half, out=highs)
        numpy.bitwise_xor(highs, second, out=spare)
        numpy.bitwise_xor(spare, numpy.uint64(keys[0]), out=first)
        numpy.bitwise_and(products[1], word, out=second)
        numpy.right_shift(products[0], half, out=highs)
        numpy.bitwise_xor(highs, fourth, out=spare)
        numpy.bitwise_xor(spare, numpy.uint64(keys[1]), out=third)
        numpy.bitwise_and(products[0], word, out=fourth)
        keys = [(part + step) & WORD for part, step in zip(keys, WEYL, strict=True)]
    return words


@cache
def _ramp(count: int) -> NDArray[numpy.uint64]:
    import numpy

    return numpy.arange(count, dtype=numpy.uint64)


def fill_uniform(out: NDArray[Any], key: int, start: int, room: NDArray[Any]) -> None:
    """Fills an array with the numbers of the elements from `start` on.

    out: shape (n,), float32 or float64. room: the same; overwritten.
    """
    import numpy

    memory = room.view(numpy.uint8)
    place = -room.ctypes.data % 8  # 64-bit words want to be aligned
    words = memory[place : place + (len(memory) - place) // 8 * 8].view(numpy.uint64)
    most = min(CHUNK_COUNTERS, len(words) // (ROOM_WORDS + 1))
    if most < 64:  # a few elements: the room is too small, and it matters to nobody
        words = numpy.empty((ROOM_WORDS + 1) * 64, numpy.uint64)
        most = 64
    first, stop = start // 4, -(-(start + len(out)) // 4)
    for begin in range(first, stop, most):
        count = min(most, stop - begin)
        counters = words[:count]
        numpy.add(_ramp(most)[:count], numpy.uint64(begin), out=counters)
        numbers = philox(key, counters, words[count : (ROOM_WORDS + 1) * count].reshape(-1, count))
        numpy.right_shift(numbers, numpy.uint64(8), out=numbers)
        for lane in range(4):
            element = 4 * begin + lane - start  # of the first counter
            skipped = 0 if element >= 0 else 1
            target = out[element + 4 * skipped :: 4][: count - skipped]
            numpy.copyto(target, numbers[lane][skipped : skipped + len(target)], casting="unsafe")
    numpy.multiply(out, out.dtype.type(UNIT), out=out)
