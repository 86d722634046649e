"""An adapter as it lies on disk: its config, and its tensors' header."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import leaves_model, read_header
from ..checkpoint.hub import HubSource, find_source
from ..checkpoint.hub_model import fetch_small, hub_headers
from ..checkpoint.hub_reference import SCHEME, HubReference, hub_reference, local_path
from ..checkpoint.remote_reference import is_url
from ..checkpoint.tensor import FileInfo, TensorInfo
from ..checkpoint.torch_file import read_torch_file
from ..checkpoint.wording import listed, quoted
from ..errors import InputError
from .config import CONFIG_NAME, LIMIT_BYTES, AdapterConfig, read_adapter_config

if TYPE_CHECKING:
    from ..checkpoint.remote import RemoteSource

WEIGHTS_NAME = "adapter_model.safetensors"
TORCH_WEIGHTS_NAME = "adapter_model.bin"


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter's folder.

    folder: absolute path. weights: name of the tensors' file. tensors: by name.
    files: tensors' file and config. header_bytes_read: bytes read to learn this.
    hub: where they come from; the tensors' file may not be in the folder yet. None: a local one.
    remote: where they are, if `folder` is an address.
    """

    folder: str
    config: AdapterConfig
    weights: str
    tensors: dict[str, TensorInfo]
    files: tuple[FileInfo, ...]
    header_bytes_read: int
    hub: HubSource | None = None
    remote: RemoteSource | None = None

    @property
    def path(self) -> str:
        """Of the tensors' file, for messages."""
        return os.path.join(self.folder, self.weights)


def read_adapter(reference: str) -> AdapterFiles:
    """Reads an adapter's config and header, and no tensor data.

    reference: a folder, as PEFT writes it; `~` is expanded. Where there is none: one of the Hugging
        Face Hub, `org/name` or `org/name@revision`. Or an address, `https://…`, `s3://…`, `gs://…`.

    Raises InputError naming the file and the remedy; LazymergeError where the Hub gives no answer.
    """
    if is_url(reference):
        return _read_remote_adapter(reference)
    path = Path(local_path(reference))
    wanted = hub_reference(reference)
    if wanted is not None and (reference.startswith(SCHEME) or not os.path.lexists(path)):
        return _read_hub_adapter(wanted)
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
    weights = _weights_among(names, str(folder))
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


def _weights_among(names: Sequence[str], where: str) -> str:
    """The name of the tensors' file.

    Raises:
        InputError: the files are not those of an adapter.
    """
    weights = next((n for n in (WEIGHTS_NAME, TORCH_WEIGHTS_NAME) if n in names), None)
    if CONFIG_NAME not in names or weights is None:
        missing = CONFIG_NAME if CONFIG_NAME not in names else WEIGHTS_NAME
        raise InputError(
            f"{where}: holds no {missing} (it holds {listed([*names]) or 'nothing'}), so it is no "
            "adapter of PEFT. Correct the path, or download the adapter again."
        )
    return weights


def _read_remote_adapter(reference: str) -> AdapterFiles:
    from ..checkpoint.remote import open_remote_files

    try:
        small = {CONFIG_NAME: LIMIT_BYTES}
        source, header = open_remote_files(reference, small, (WEIGHTS_NAME, TORCH_WEIGHTS_NAME))
        config, file = read_adapter_config(Path(source.folder, CONFIG_NAME))
    except InputError as error:
        raise InputError(f"adapter {quoted(reference)}: {error}") from None
    file = replace(file, modified_ns=None, pin=source.files[CONFIG_NAME].pin)
    return AdapterFiles(
        folder=source.url,
        config=config,
        weights=header.file.path,
        tensors={tensor.name: tensor for tensor in header.tensors},
        files=(header.file, file),
        header_bytes_read=header.bytes_read + file.size_bytes,
        remote=source,
    )


def _read_hub_adapter(wanted: HubReference) -> AdapterFiles:
    source = find_source(wanted)
    try:
        weights = _weights_among(sorted(source.sizes), source.repository)
        fetch_small(source, CONFIG_NAME, LIMIT_BYTES)
        config, file = read_adapter_config(Path(source.folder, CONFIG_NAME))
        (header,) = hub_headers(source, [weights], [])
    except InputError as error:
        why = f" ({source.note})" if source.note else ""
        raise InputError(f"adapter {quoted(str(wanted))} of the Hub{why}: {error}") from None
    return AdapterFiles(
        folder=source.folder,
        config=config,
        weights=weights,
        tensors={tensor.name: tensor for tensor in header.tensors},
        files=(header.file, replace(file, modified_ns=None)),
        header_bytes_read=header.bytes_read + file.size_bytes,
        hub=source,
    )
