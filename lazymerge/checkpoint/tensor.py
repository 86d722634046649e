"""What is known of a tensor before a byte of it is read: name, dtype, shape, place on disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from .hub import HubSource

if TYPE_CHECKING:
    from .remote import RemoteSource


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
    change: what an adapter adds to it; None: nothing.
    folder: that holds the file, where it is not the checkpoint's but an adapter's.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop_exclusive: int
    scale: BlockScale | None = None
    node: str | None = None
    change: LowRank | None = None
    folder: str | None = None

    @property
    def element_count(self) -> int:
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.stop_exclusive - self.start

    @property
    def stored(self) -> TensorInfo:
        """The tensor as it lies in the file, without its scale and an adapter's change."""
        if self.scale is None and self.change is None and self.folder is None:
            return self
        place = (self.file, self.start, self.stop_exclusive)
        return TensorInfo(self.name, self.dtype, self.shape, *place, node=self.node)

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

    def parts(self, folder: str) -> tuple[tuple[str, TensorInfo], ...]:
        """What is read for it, each with the folder of its file. folder: the checkpoint's."""
        own = self.folder or folder
        found = [(own, self.stored)]
        if self.scale is not None:
            found.append((own, self.scale.tensor))
        if self.change is not None:
            found += [(self.change.folder, part) for part in self.change.parts]
        return tuple(found)


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
    """What a LoRA adapter changes of a matrix W: W + scaling · B @ A, or W + scaling · (B @ A)ᵀ.

    folder: that holds the factors' file.
    first, second: A and B; all their dimensions but the first are one.
    is_transposed: rows of the matrix are inputs of the layer (embeddings, gpt-2).
    scaling: of the product.
    rows: of W.
    first_row: of W that the change is for: where some of its rows are a tensor's.
    magnitude: of DoRA, a length for every output of the layer.
    """

    folder: str
    first: TensorInfo
    second: TensorInfo
    is_transposed: bool
    scaling: float
    rows: int
    first_row: int = 0
    magnitude: TensorInfo | None = None

    @property
    def rank(self) -> int:
        return self.first.shape[0]

    @property
    def left(self) -> TensorInfo:
        """The factor that has the matrix's rows, as it is stored or transposed."""
        return self.first if self.is_transposed else self.second

    @property
    def right(self) -> TensorInfo:
        """The factor that has the matrix's columns, as it is stored or transposed."""
        return self.second if self.is_transposed else self.first

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """All tensors that it is made of."""
        magnitude = () if self.magnitude is None else (self.magnitude,)
        return (self.first, self.second, *magnitude)

    def of_rows(self, start: int) -> LowRank:
        """The change of a matrix that is some rows of this one's, from one on."""
        return replace(self, first_row=self.first_row + start)


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of a checkpoint, as it was when its header was read.

    path: relative to the checkpoint's folder.
    size_bytes, modified_ns: from stat. modified_ns is None for a file of the Hugging Face Hub: its
        commit says what it is, whenever it was downloaded.
    header_digest: hex xxh3-128 of the header's bytes (length prefix included; of torch files the
        pickle, the directory of entries and their headers).
    pin: of a file that lies elsewhere, the version of it that was meant (an ETag or the like).
    """

    path: str
    size_bytes: int
    modified_ns: int | None
    header_digest: str
    pin: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        facts = asdict(self)
        if self.pin is None:
            del facts["pin"]
        return facts


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that a checkpoint's tensors are read with.

    reference: as the recipe writes it.
    folder: absolute path.
    files: its tensors' file and adapter_config.json.
    kind: LoRA or DoRA, for people.
    ranks: of its changes, ascending.
    parameter_count: elements of its tensors.
    changed, replaced: how many of the model's tensors it changes, and how many it brings.
    hub: where its files come from; its tensors may not be in `folder` yet. None: a local one.
    remote: where its files are, if `folder` is an address.
    """

    reference: str
    folder: str
    files: tuple[FileInfo, ...]
    kind: str
    ranks: tuple[int, ...]
    parameter_count: int
    changed: int
    replaced: int
    hub: HubSource | None = None
    remote: RemoteSource | None = None

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        facts = asdict(replace(self, hub=None, remote=None))
        del facts["hub"], facts["remote"]
        facts["files"] = [file.as_dict() for file in self.files]
        return facts if self.hub is None else {**facts, "hub": self.hub.as_dict()}


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
    adapter: that the tensors are read with; None: there is none.
    path: what opens it again, from any working directory; of the Hub, at the same commit.
    remote: where its files are, if that is not the local disk nor the Hub; `folder` is an address
        then.
    """

    reference: str
    folder: str
    files: tuple[FileInfo, ...]
    tensors: dict[str, TensorInfo]
    config: dict[str, object] | None
    header_bytes_read: int
    notices: tuple[str, ...] = ()
    hub: HubSource | None = None
    adapter: Adapter | None = None
    path: str = ""
    remote: RemoteSource | None = None

    @property
    def local_folder(self) -> str:
        """Where its small files are on this machine."""
        return self.folder if self.remote is None else self.remote.folder

    @property
    def files_by_folder(self) -> tuple[tuple[str, tuple[FileInfo, ...]], ...]:
        """All files, the adapter's among them."""
        own = ((self.folder, self.files),)
        return own if self.adapter is None else (*own, (self.adapter.folder, self.adapter.files))

    @property
    def files_by_source(self) -> tuple[tuple[HubSource, tuple[FileInfo, ...]], ...]:
        """All files that come from the Hub, the adapter's among them."""
        own = () if self.hub is None else ((self.hub, self.files),)
        adapter = self.adapter
        if adapter is None or adapter.hub is None:
            return own
        return (*own, (adapter.hub, adapter.files))

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    @property
    def parameter_count(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.element_count for tensor in self.tensors.values())
