"""Models as they lie on disk: headers, shard indexes and configs; no tensor data."""

from .folder import checkpoint_file_path, is_plain_name, leaves_model, open_checkpoint
from .header import Header, read_header
from .tensor import (
    DTYPES,
    FLOAT_DTYPES_BY_TORCH_NAME,
    Checkpoint,
    DType,
    FileInfo,
    TensorInfo,
)
from .torch_file import is_torch_name

__all__ = [
    "DTYPES",
    "FLOAT_DTYPES_BY_TORCH_NAME",
    "Checkpoint",
    "DType",
    "FileInfo",
    "Header",
    "TensorInfo",
    "checkpoint_file_path",
    "is_plain_name",
    "is_torch_name",
    "leaves_model",
    "open_checkpoint",
    "read_header",
]
