"""Read a file that torch.save wrote (.bin, .pt, .pth, .ckpt), without torch and as data.

    NAME/data.pkl       a pickle: names, shapes, strides, and which storage each tensor lies in
    NAME/byteorder      "little"; absent before torch 2.1
    NAME/data/0 …       the storages, uncompressed: bytes of a tensor as safetensors has them

Since 1.6 (2020) torch writes a zip file with these entries. A tensor whose elements lie one after
another is therefore a byte range of the file and is read like one of a safetensors file. Tensors
that share a storage (tied embeddings) become byte ranges that overlap, each of its own name.

What is saved is a mapping of names to tensors, or one that holds such a mapping under a name
(`state_dict`, beside epochs and optimizers): the one called by a usual name, or the only one.

Refused: pickles that need any code (unpickling.py), files of before 1.6, TorchScript, tensors whose
elements do not lie in order (transposed, expanded), big-endian files, dtypes that safetensors has
not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import xxhash

from ..errors import InputError
from .broken_file import INCOMPLETE, BrokenFileError
from .header import Header, garbage_collector_paused
from .regular_file import open_regular_file
from .scattered import LocalBytes, ScatteredBytes
from .tensor import FileInfo, TensorInfo
from .unpickling import SAVE_TENSORS_ALONE, StoredTensor, unpickle
from .wording import listed, quoted
from .zip_directory import ZipDirectory, is_zip, read_zip_directory

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
PICKLE_LIMIT_BYTES = 100_000_000
"""As for headers of safetensors files. 36 instructions of a tensor take about 120 bytes."""

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params_ema", "params")
"""Usual names of the tensors in what training programs save; the first that is there counts."""

_RESERVED_NAME = "__metadata__"
_BYTE_ORDER_LIMIT_BYTES = 16
_BEGINNING_BYTES = 16
_SAVE_AGAIN = (
    "Save it again, in Python: torch.save(torch.load(FILE, map_location='cpu', weights_only=True), "
    "NEW_FILE)."
)


def is_torch_name(file: str) -> bool:
    """Whether a file of this name is read as one of torch's."""
    return file.endswith(TORCH_SUFFIXES)


def read_torch_file(path: Path, file: str) -> Header:
    """Read and validate what a torch file says of its tensors; no tensor data is read.

    path: where the file is.
    file: what FileInfo and TensorInfo call it (path relative to the checkpoint's folder).

    Raises InputError naming the file, the tensor where one is to blame, and the remedy.
    """
    try:
        with open_regular_file(path) as (descriptor, status):
            header = parse_torch_file(LocalBytes(descriptor, status.st_size), file)
    except BrokenFileError as error:
        raise InputError(f"{path}: {error}") from None
    return replace(header, file=replace(header.file, modified_ns=status.st_mtime_ns))


def parse_torch_file(source: ScatteredBytes, file: str) -> Header:
    """Validate what a torch file says of its tensors, wherever it lies; no tensor data is read.

    file: what FileInfo and TensorInfo call it.

    Raises BrokenFileError naming the tensor where one is to blame, and the remedy; what reading
    raises passes through.
    """
    with garbage_collector_paused():
        beginning = source.read(0, min(_BEGINNING_BYTES, source.size_bytes))
        if not is_zip(beginning):
            raise _no_zip_file(beginning)
        directory = read_zip_directory(source)
        folder = _top_folder(directory)
        order = _read_byte_order(source, directory, folder)
        pickle = _read_entry(source, directory, f"{folder}data.pkl", PICKLE_LIMIT_BYTES)
        mapping, notices = _find_tensors(unpickle(pickle), file)
        tensors = [
            _tensor_info(name, tensor, directory, folder, file) for name, tensor in mapping.items()
        ]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop_exclusive, tensor.name))
    digest = xxhash.xxh3_128(directory.digest)
    digest.update(pickle)
    digest.update(order)
    return Header(
        file=FileInfo(file, source.size_bytes, None, digest.hexdigest()),
        tensors=tuple(tensors),
        metadata={},
        bytes_read=len(beginning) + directory.bytes_read + len(pickle) + len(order),
        notices=notices,
    )


def _no_zip_file(beginning: bytes) -> BrokenFileError:
    if beginning.startswith(b"\x80"):
        return BrokenFileError(
            "is in the format that torch wrote before version 1.6 (a bare pickle), which does not "
            "say where its tensors lie.",
            _SAVE_AGAIN,
        )
    if beginning.startswith(b"version https://"):
        return BrokenFileError(
            "looks like a Git LFS pointer, not the file it points to.",
            "Run `git lfs pull` in the model's repository.",
        )
    return BrokenFileError(
        f"is not a file that torch.save writes (it begins {beginning!r}).",
        "Download it again, or convert it to safetensors.",
    )


def _top_folder(directory: ZipDirectory) -> str:
    """What the entries' names begin with, up to the slash: what the file was called."""
    found = [
        name.removesuffix("data.pkl")
        for name in directory.entries
        if name.endswith("/data.pkl") and name.count("/") == 1
    ]
    if len(found) != 1:
        raise BrokenFileError(
            f"is a zip file with {len(found)} entries NAME/data.pkl, not one as torch.save writes.",
            "Download it again, or convert it to safetensors.",
        )
    return found[0]


def _read_entry(
    source: ScatteredBytes, directory: ZipDirectory, name: str, limit_bytes: int
) -> bytes:
    start, stop = directory.entries[name]
    if stop - start > limit_bytes:
        raise BrokenFileError(
            f"its entry {quoted(name)} holds {stop - start:,} bytes; at most {limit_bytes:,} are "
            "read.",
            "It is not what its name says: download it again.",
        )
    return source.read(start, stop - start)


def _read_byte_order(source: ScatteredBytes, directory: ZipDirectory, folder: str) -> bytes:
    """The entry that says it, empty if there is none: then it is that of the author's machine,
    and there was no torch for big-endian ones but by special builds."""
    name = f"{folder}byteorder"
    if name not in directory.entries:
        return b""
    order = _read_entry(source, directory, name, _BYTE_ORDER_LIMIT_BYTES)
    if order != b"little":
        raise BrokenFileError(
            f"holds numbers in byte order {order!r}; only little-endian ones are read.",
            _SAVE_AGAIN,
        )
    return order


def _find_tensors(saved: object, file: str) -> tuple[Mapping[str, StoredTensor], tuple[str, ...]]:
    """The mapping of names to tensors in what was saved, and what a person should know of it."""
    if not isinstance(saved, dict):
        what = "a single tensor" if isinstance(saved, StoredTensor) else f"a {type(saved).__name__}"
        raise BrokenFileError(
            f"holds {what}, not a mapping of names to tensors.", SAVE_TENSORS_ALONE
        )
    looked_at: dict[int, bool] = {}  # one mapping may stand under many keys
    for value in saved.values():
        if id(value) not in looked_at:
            looked_at[id(value)] = _tensors_in(value)
    inner = [key for key, value in saved.items() if looked_at[id(value)]]
    if _tensors_in(saved):
        if inner:
            raise BrokenFileError(
                f"holds tensors, and further mappings of tensors under {_keys(inner)}: which of "
                "them are the model, it does not say.",
                SAVE_TENSORS_ALONE,
            )
        return _only_tensors(saved, file, ())
    usual = [key for key in WRAPPERS if key in inner]
    if not inner or (not usual and len(inner) > 1):
        what = f"mappings of tensors under {_keys(inner)}" if inner else "no tensors"
        raise BrokenFileError(
            f"holds {what}; a mapping of names to tensors is needed, itself or under one of "
            f"{', '.join(WRAPPERS)}.",
            SAVE_TENSORS_ALONE,
        )
    chosen = usual[0] if usual else inner[0]
    rest = [key for key in saved if key != chosen]
    notice = f"{file}: what it holds under {_keys([chosen])} is taken for the model"
    if rest:
        notice += f"; not read: {_keys(rest)}"
    return _only_tensors(saved[chosen], file, (notice,))


def _tensors_in(value: object) -> bool:
    return isinstance(value, dict) and any(type(v) is StoredTensor for v in value.values())


def _only_tensors(
    mapping: Mapping[object, object], file: str, notices: tuple[str, ...]
) -> tuple[Mapping[str, StoredTensor], tuple[str, ...]]:
    """The mapping without its strings, numbers and the like.

    Raises BrokenFileError where a tensor would be left out with them, or has no name.
    """
    tensors: dict[str, StoredTensor] = {}
    others: list[object] = []
    for name, value in mapping.items():
        if type(value) is not StoredTensor:
            if isinstance(value, (dict, list, tuple)) and value:
                raise BrokenFileError(
                    f"holds a {type(value).__name__} under {_keys([name])}, among its tensors.",
                    SAVE_TENSORS_ALONE,
                )
            others.append(name)
        elif not isinstance(name, str) or name == _RESERVED_NAME:
            raise BrokenFileError(
                f"holds a tensor called {_keys([name])}, which is no name for one.",
                SAVE_TENSORS_ALONE,
            )
        else:
            tensors[name] = value
    if others:
        notices += (f"{file}: entries that are no tensors are left out: {_keys(others)}",)
    return tensors, notices


def _keys(keys: list[object]) -> str:
    return listed([str(key) for key in keys])


def _tensor_info(
    name: str, tensor: StoredTensor, directory: ZipDirectory, folder: str, file: str
) -> TensorInfo:
    """Where a tensor lies in the file.

    Raises BrokenFileError when it is no byte range within its storage.
    """
    place = directory.entries.get(f"{folder}data/{tensor.key}")
    if place is None:
        raise _broken_tensor(name, f"its storage {quoted(tensor.key)} is not in the file.")
    start, stop = place
    if stop - start != tensor.storage_bytes:
        raise _broken_tensor(
            name,
            f"its storage {quoted(tensor.key)} holds {stop - start:,} bytes, the pickle says "
            f"{tensor.storage_bytes:,}.",
        )
    if not tensor.is_contiguous:
        raise _broken_tensor(
            name,
            f"its elements do not lie in order (shape {_numbers(tensor.shape)}, stride "
            f"{_numbers(tensor.stride)}), as if it were transposed or expanded.",
            "Save it in order, in Python: torch.save({name: tensor.contiguous() for name, tensor "
            "in torch.load(FILE, weights_only=True).items()}, NEW_FILE).",
        )
    item_bytes = tensor.dtype.item_bytes
    size_bytes = prod(tensor.shape) * item_bytes
    first = tensor.offset * item_bytes if size_bytes else 0
    if first + size_bytes > tensor.storage_bytes:
        raise _broken_tensor(
            name,
            f"shape {_numbers(tensor.shape)} of {tensor.dtype.name} from element "
            f"{tensor.offset:,} reaches beyond its storage of {tensor.storage_bytes:,} bytes.",
        )
    return TensorInfo(
        name, tensor.dtype.name, tensor.shape, file, start + first, start + first + size_bytes
    )


def _broken_tensor(name: str, rule: str, remedy: str = INCOMPLETE) -> BrokenFileError:
    return BrokenFileError(f"tensor {quoted(name)}: {rule}", remedy)


def _numbers(numbers: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"[{shown}, …]" if len(numbers) > 8 else f"[{shown}]"
