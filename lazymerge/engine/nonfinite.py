"""Tensors of the output that hold inf or nan: how many, and whether they come from the inputs.

While blocks are merged they are only looked at (finite.py). The few tensors in which something was
found are counted afterwards, and so are their inputs: where those are finite, the merge has left
the range of the output's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.tensor import DTYPES, TensorInfo
from ..graph.node import Write
from .finite import MASKS, WIDTHS
from .inputs import InputFiles, read_exactly
from .needed_ranges import path_of
from .plan import Plan
from .remote_inputs import Distant

READ_BYTES = 1 << 18
"""Read at a time, whole elements of every dtype."""

_MANTISSAS = {
    "F64": 0x000F_FFFF_FFFF_FFFF,
    "F32": 0x007F_FFFF,
    "F16": 0x03FF,
    "BF16": 0x007F,
    "F8_E4M3": 0x7F,  # it has no inf: whatever is not finite is nan
    "F8_E5M2": 0x03,
}


@dataclass(frozen=True, slots=True)
class NonfiniteTensor:
    """An output tensor that holds inf or nan.

    dtype: its own. elements: of it. inf, nan: how many of them.
    inputs: how many elements of each of its inputs are inf or nan, by model reference.
    """

    name: str
    dtype: str
    elements: int
    inf: int
    nan: int
    inputs: Mapping[str, int]

    @property
    def is_overflow(self) -> bool:
        """Whether all of its inputs are finite."""
        return not any(self.inputs.values())

    def __str__(self) -> str:
        found = [f"{count:,} {word}" for count, word in ((self.inf, "inf"), (self.nan, "nan"))]
        counted = " and ".join(text for text in found if not text.startswith("0 "))
        if self.is_overflow:
            where = f"none in the inputs, so it is the merge that leaves the range of {self.dtype}"
        else:
            where = "in the inputs: " + ", ".join(
                f"{count:,} in {model}" for model, count in self.inputs.items() if count
            )
        return f"{self.name} holds {counted} among {self.elements:,} elements; {where}"


def count_nonfinite(
    files: InputFiles, path: str, tensor: TensorInfo, remote: Distant | None = None
) -> tuple[int, int]:
    """How many elements of a tensor are inf, and how many nan.

    path: of the file that holds it. remote: that file, where it is not on the local disk.

    Raises:
        LazymergeError: it cannot be read.
    """
    if tensor.dtype not in MASKS:
        return 0, 0
    import numpy

    descriptor = -1 if remote else files.descriptor(path)
    buffer = bytearray(READ_BYTES)
    kind = f"<u{WIDTHS[tensor.dtype]}"
    inf = nan = 0
    for start in range(tensor.start, tensor.stop_exclusive, READ_BYTES):
        part = memoryview(buffer)[: min(READ_BYTES, tensor.stop_exclusive - start)]
        if remote is None:
            read_exactly(descriptor, part, start, path)
        else:
            received = bytearray()
            remote.read(start, start + len(part), received.extend)
            part = memoryview(received)
        codes = numpy.frombuffer(part, kind)
        mask, mantissa = (codes.dtype.type(t[tensor.dtype]) for t in (MASKS, _MANTISSAS))
        found = codes[(codes & mask) == mask]
        of_nan = int(numpy.count_nonzero(found & mantissa))
        nan += of_nan
        inf += len(found) - of_nan
    return inf, nan


def examine(
    plan: Plan,
    folder: Path,
    names: Mapping[str, None],
    stored: Mapping[str, Distant] | None = None,
) -> tuple[NonfiniteTensor, ...]:
    """Counts what is not finite in some tensors of a complete output, and in their inputs.

    stored: the output's shards by name, where they are not in the folder.

    Raises:
        LazymergeError: a file cannot be read.
    """
    if not names:
        return ()
    places = {
        tensor.name: TensorInfo(
            tensor.name, tensor.dtype, tensor.shape, shard.file, tensor.start, tensor.stop_exclusive
        )
        for shard in plan.shards
        for tensor in shard.tensors
    }
    with closing(InputFiles()) as files:
        return tuple(
            _examine(plan, folder, write, places[write.name], files, stored or {})
            for write in plan.graph.writes
            if write.name in names
        )


def _examine(
    plan: Plan,
    folder: Path,
    write: Write,
    place: TensorInfo,
    files: InputFiles,
    stored: Mapping[str, Distant],
) -> NonfiniteTensor:
    inf, nan = count_nonfinite(files, str(folder / place.file), place, stored.get(place.file))
    references = {model.folder: reference for reference, model in plan.checkpoints.items()}
    inputs = {
        references.get(read.folder, read.folder): sum(
            count_nonfinite(files, path, read.tensor, plan.remote_inputs.get(path))
        )
        for read in plan.graph.reads_of(write.id)
        for path in [path_of(read)]
    }
    size = DTYPES[write.dtype].item_bytes
    elements = (place.stop_exclusive - place.start) // size
    return NonfiniteTensor(write.name, write.dtype, elements, inf, nan, inputs)
