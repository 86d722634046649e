"""An adapter as it lies on disk: its config, and its tensors' header."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import leaves_model, read_header
from ..checkpoint.tensor import FileInfo, TensorInfo
from ..checkpoint.torch_file import read_torch_file
from ..checkpoint.wording import listed, quoted
from ..errors import InputError
from .config import CONFIG_NAME, AdapterConfig, read_adapter_config

WEIGHTS_NAME = "adapter_model.safetensors"
TORCH_WEIGHTS_NAME = "adapter_model.bin"


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter's folder.

    folder: absolute path. weights: name of the tensors' file. tensors: by name.
    files: tensors' file and config. header_bytes_read: bytes read to learn this.
    """

    folder: str
    config: AdapterConfig
    weights: str
    tensors: dict[str, TensorInfo]
    files: tuple[FileInfo, ...]
    header_bytes_read: int

    @property
    def path(self) -> str:
        """Of the tensors' file, for messages."""
        return os.path.join(self.folder, self.weights)


def read_adapter(reference: str) -> AdapterFiles:
    """Reads an adapter's config and header, and no tensor data.

    reference: a folder, as PEFT writes it; `~` is expanded.

    Raises InputError naming the file and the remedy.
    """
    path = Path(os.path.expanduser(reference))
    folder = Path(os.path.realpath(path))
    if not folder.is_dir():
        found = "is not a folder" if os.path.lexists(path) else f"not found (resolved to {folder})"
        raise InputError(
            f"adapter {quoted(reference)}: {found}. Give the folder that holds its {CONFIG_NAME} "
            "and its tensors."
        )
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be listed: {error.strerror or error}. Make the folder readable."
        ) from None
    weights = next((n for n in (WEIGHTS_NAME, TORCH_WEIGHTS_NAME) if n in names), None)
    if CONFIG_NAME not in names or weights is None:
        missing = CONFIG_NAME if CONFIG_NAME not in names else WEIGHTS_NAME
        raise InputError(
            f"{folder}: holds no {missing} (it holds {listed(names) or 'nothing'}), so it is no "
            "adapter of PEFT. Correct the path, or download the adapter again."
        )
    for name in (CONFIG_NAME, weights):
        if leaves_model(folder, name):
            raise InputError(
                f"{folder / name}: is a link to {os.path.realpath(folder / name)}, outside the "
                "adapter's folder. Replace the link with the file if you trust it."
            )
    config, file = read_adapter_config(folder / CONFIG_NAME)
    read = read_header if weights == WEIGHTS_NAME else read_torch_file
    header = read(folder / weights, weights)
    return AdapterFiles(
        folder=str(folder),
        config=config,
        weights=weights,
        tensors={tensor.name: tensor for tensor in header.tensors},
        files=(header.file, file),
        header_bytes_read=header.bytes_read + file.size_bytes,
    )
