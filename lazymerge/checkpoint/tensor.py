"""What is known of a tensor before a byte of it is read: name, dtype, shape, place on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from .hub import HubSource


@dataclass(frozen=True, slots=True)
class DType:
    """An element type that both safetensors and torch know.

    name: as in safetensors headers.
    torch_name: the attribute of the torch module.
    item_bytes: bytes per element.
    is_float: takes part in merges; others are only copied.
    """

    name: str
    torch_name: str
    item_bytes: int
    is_float: bool


DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType("F64", "float64", 8, True),
        DType("F32", "float32", 4, True),
        DType("F16", "float16", 2, True),
        DType("BF16", "bfloat16", 2, True),
        DType("F8_E4M3", "float8_e4m3fn", 1, True),
        DType("F8_E5M2", "float8_e5m2", 1, True),
        DType("I64", "int64", 8, False),
        DType("U64", "uint64", 8, False),
        DType("I32", "int32", 4, False),
        DType("U32", "uint32", 4, False),
        DType("I16", "int16", 2, False),
        DType("U16", "uint16", 2, False),
        DType("I8", "int8", 1, False),
        DType("U8", "uint8", 1, False),
        DType("BOOL", "bool", 1, False),
    )
}
"""By safetensors name."""

FLOAT_DTYPES_BY_TORCH_NAME: dict[str, DType] = {
    dtype.torch_name: dtype for dtype in DTYPES.values() if dtype.is_float
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint.

    name: its key in the file.
    dtype: safetensors name, a key of DTYPES.
    shape: () for a scalar.
    file: path of the file that holds it, relative to the checkpoint's folder.
    start, stop_exclusive: its byte range within that file (absolute, header included).
    scale: what the stored numbers must be multiplied by; None: by nothing.
    node: of the graph, that yields the tensor: it is another merge's, and lies in no file.
    low_rank: an adapter's product, which is to be added; None: nothing is.
    folder: that the file lies in, if it is not the checkpoint's.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop_exclusive: int
    scale: BlockScale | None = None
    node: str | None = None
    low_rank: LowRank | None = None
    folder: str | None = None

    @property
    def element_count(self) -> int:
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.stop_exclusive - self.start

    @property
    def stored(self) -> TensorInfo:
        """The tensor as it lies in the file, without its scale and adapter."""
        if self.scale is None and self.low_rank is None and self.folder is None:
            return self
        return replace(self, scale=None, low_rank=None, folder=None)

    @property
    def parts(self) -> tuple[tuple[str | None, TensorInfo], ...]:
        """All that is read for the tensor, each with its folder if that is not the checkpoint's."""
        found = [(self.folder, self.stored)]
        if self.scale is not None:
            found.append((None, self.scale.tensor))
        if self.low_rank is not None:
            low_rank = self.low_rank
            small = (low_rank.a, low_rank.b, low_rank.magnitude)
            found += [(low_rank.folder, part) for part in small if part is not None]
        return tuple(found)

    @property
    def value_dtype(self) -> str:
        """safetensors name of the dtype that its values are of: a scaled float8 tensor stands for
        one of bfloat16."""
        return self.dtype if self.scale is None else "BF16"

    def leading_rows(self, rows: int) -> TensorInfo:
        """The part of the tensor that its first rows take up on disk."""
        if not self.shape or self.shape[0] <= rows:
            return self
        row_bytes = self.size_bytes // self.shape[0]
        return replace(
            self, shape=(rows, *self.shape[1:]), stop_exclusive=self.start + rows * row_bytes
        )


@dataclass(frozen=True, slots=True)
class BlockScale:
    """The scales of a block-quantised matrix.

    tensor: one number for each block.
    block: rows and columns of a block; those at the matrix's ends may be smaller.
    first_row: of the matrix that the scales are of: where some of its rows are a tensor's.
    """

    tensor: TensorInfo
    block: tuple[int, int]
    first_row: int = 0


@dataclass(frozen=True, slots=True)
class LowRank:
    """What a LoRA adapter adds to a matrix: factor · B A.

    folder: absolute path of the adapter's folder.
    a, b: of shape (r, n) and (m, r).
    is_turned: (B A)ᵀ is added.
    magnitude: the length that every row of the sum is scaled to (DoRA); None: as it is.
    first_row: of the whole matrix: where some of its rows are a tensor's.
    """

    folder: str
    a: TensorInfo
    b: TensorInfo
    factor: float
    is_turned: bool = False
    magnitude: TensorInfo | None = None
    first_row: int = 0


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of a checkpoint, as it was when its header was read.

    path: relative to the checkpoint's folder.
    size_bytes, modified_ns: from stat. modified_ns is None for a file of the Hugging Face Hub: its
        commit says what it is, whenever it was downloaded.
    header_digest: hex xxh3-128 of the header's bytes (length prefix included; of torch files the
        pickle, the directory of entries and their headers).
    """

    path: str
    size_bytes: int
    modified_ns: int | None
    header_digest: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's tensors as they lie on disk. Holds no open file.

    reference: as the recipe writes it.
    folder: absolute path of the folder that the files' paths are relative to.
    files: in name order.
    tensors: by name, in the order of files and offsets.
    config: the parsed config.json, or None where there is none.
    header_bytes_read: bytes read to learn all this (headers, index, config).
    notices: what a person should know of how it was read; one sentence each.
    hub: where its files come from; they may not all be in `folder` yet. None: a local model.
    """

    reference: str
    folder: str
    files: tuple[FileInfo, ...]
    tensors: dict[str, TensorInfo]
    config: dict[str, object] | None
    header_bytes_read: int
    notices: tuple[str, ...] = ()
    hub: HubSource | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    @property
    def parameter_count(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.element_count for tensor in self.tensors.values())
