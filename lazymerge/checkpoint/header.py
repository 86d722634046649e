"""Read and check the header of one safetensors file; not a byte of tensor data is touched.

    0        8              8 + n                                  size
    ├─ n: u64 ┼─ JSON, n bytes ┼─ data section: the tensors, no gaps ──┤

The JSON maps every tensor's name to its dtype, shape and byte range within the data section, and
may hold `__metadata__`, a mapping of strings. The ranges must tile the data section exactly; this
is what makes a header safe to believe: no range can point outside the file or into another tensor.

Format: https://github.com/huggingface/safetensors#format. Some things that the safetensors library
lets pass are refused here: a key twice (readers disagree on which one counts), a header that does
not begin with `{` (the format demands it), an entry written as a list or a dtype written as a
mapping (accidents of its parser), element types absent from DTYPES, more than VALUE_LIMIT values,
and entries nested more than NESTING_LIMIT deep. Fields of an entry beyond the three that the format
defines are ignored, as the library does; within them, and for `-0`, this reader is laxer than the
library (1e999), which changes no meaning.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import xxhash

from ..errors import InputError
from .json_file import NESTING_LIMIT, has_unpaired_surrogate, most_values, nesting
from .regular_file import open_regular_file, read_exactly
from .tensor import DTYPES, FileInfo, TensorInfo
from .wording import kind, quoted, shown

LENGTH_BYTES = 8
HEADER_LIMIT_BYTES = 100_000_000
"""The largest header that the format allows."""

FIRST_READ_BYTES = 1 << 17
"""Asked for of a file that lies elsewhere. Nearly all headers are smaller."""

VALUES_PER_TENSOR = 12
"""What most_values finds in a matrix's entry: a name, three fields, two lists with two numbers."""

VALUE_LIMIT = 4_000_000
"""Values in a header: 333,333 tensors in one file. The models with the most have about 140,000 in
all of their files. A header of as many values takes a second and up to 400 MB beside its text."""

_UINT64_LIMIT = 2**64
_FIELDS = 3
"""Fields of an entry that the format defines: dtype, shape, data_offsets."""
_DOWNLOAD_AGAIN = "The file is damaged or was not written completely: download it again."
_NOT_SAFETENSORS = "This is not a safetensors file, or it is damaged: download it again."
_BAD_WRITER = "The file is damaged, or what wrote it is broken: download it again."
_GIT_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class Header:
    """What a file of tensors says about itself, checked.

    file: path relative to the checkpoint's folder, size, modification time and header digest.
    tensors: in the order of their bytes; ranges absolute within the file.
    metadata: the file's `__metadata__`, empty where there is none.
    bytes_read: bytes read from the file to learn this.
    notices: what a person should know of how it was read.
    """

    file: FileInfo
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    bytes_read: int
    notices: tuple[str, ...] = ()


@contextmanager
def garbage_collector_paused() -> Iterator[None]:
    """Make many long-lived objects without the collector walking them again and again.

    Parsed JSON holds no cycles, so there is nothing to collect; for 90,000 tensors the collector
    took 0.8 s of 1.4 s.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _BrokenHeaderError(Exception):
    """A broken invariant, without the file's name yet."""

    def __init__(self, rule: str, remedy: str = _BAD_WRITER) -> None:
        super().__init__(f"{rule} {remedy}")


def read_header(path: Path | str, file: str | None = None) -> Header:
    """Read and validate the header of a safetensors file.

    path: where the file is.
    file: what FileInfo and TensorInfo call it (path relative to the checkpoint's folder); the
        file's own name when not given.

    Raises InputError naming the file, the tensor where one is to blame, the broken rule and the
    remedy.
    """
    path = Path(path)
    name = path.name if file is None else file
    try:
        prefix, header, size_bytes, modified_ns = _read_raw(path)
        return _header(prefix, header, size_bytes, modified_ns, name)
    except _BrokenHeaderError as error:
        raise InputError(f"{path}: {error}") from None


def parse_header(start: Callable[[int], bytes], size_bytes: int, file: str, where: str) -> Header:
    """Validate the header of a safetensors file that lies elsewhere.

    start: gives the file's first bytes, as many as it is asked for and the file has.
    size_bytes: of the whole file.
    file: what FileInfo and TensorInfo call it. where: what messages call it.

    Raises InputError as read_header does; what `start` raises passes through.
    """
    try:
        begin = start(FIRST_READ_BYTES)
        stop = LENGTH_BYTES + _checked_length(begin[:LENGTH_BYTES], size_bytes)
        if stop > len(begin):
            begin = start(stop)
        prefix, header = begin[:LENGTH_BYTES], begin[LENGTH_BYTES:stop]
        return _header(prefix, header, size_bytes, None, file)
    except _BrokenHeaderError as error:
        raise InputError(f"{where}: {error}") from None


def _header(
    prefix: bytes, header: bytes, size_bytes: int, modified_ns: int | None, name: str
) -> Header:
    with garbage_collector_paused():
        tensors, metadata = _parse(header, size_bytes, name)
    digest = xxhash.xxh3_128(prefix)
    digest.update(header)
    info = FileInfo(
        path=name,
        size_bytes=size_bytes,
        modified_ns=modified_ns,
        header_digest=digest.hexdigest(),
    )
    bytes_read = len(prefix) + len(header)
    return Header(file=info, tensors=tensors, metadata=metadata, bytes_read=bytes_read)


def _read_raw(path: Path) -> tuple[bytes, bytes, int, int]:
    """The length prefix, the header's bytes, the file's size in bytes and its mtime in ns."""
    with open_regular_file(path) as (descriptor, status):
        prefix = read_exactly(descriptor, min(LENGTH_BYTES, status.st_size), path)
        length = _checked_length(prefix, status.st_size)
        header = read_exactly(descriptor, length, path)
    return prefix, header, status.st_size, status.st_mtime_ns


def _checked_length(prefix: bytes, size_bytes: int) -> int:
    """Bytes of the header, from the length prefix.

    Raises _BrokenHeaderError.
    """
    if size_bytes < LENGTH_BYTES:
        raise _BrokenHeaderError(
            f"holds {size_bytes} bytes, less than the {LENGTH_BYTES} of a safetensors length "
            f"prefix.",
            _DOWNLOAD_AGAIN,
        )
    length = int.from_bytes(prefix, "little")
    if length > HEADER_LIMIT_BYTES:
        if _GIT_LFS_POINTER.startswith(prefix):
            raise _BrokenHeaderError(
                "looks like a Git LFS pointer, not the file it points to.",
                "Run `git lfs pull` in the model's repository.",
            )
        raise _BrokenHeaderError(
            f"claims a header of {length:,} bytes; the format allows {HEADER_LIMIT_BYTES:,}.",
            _NOT_SAFETENSORS,
        )
    if LENGTH_BYTES + length > size_bytes:
        raise _BrokenHeaderError(
            f"is truncated inside its header: {LENGTH_BYTES + length - size_bytes:,} bytes of "
            f"the header are missing ({LENGTH_BYTES + length:,} expected, {size_bytes:,} "
            f"present).",
            _DOWNLOAD_AGAIN,
        )
    return length


def _parse(
    header: bytes, size_bytes: int, file: str
) -> tuple[tuple[TensorInfo, ...], Mapping[str, str]]:
    document = _parse_json(header)
    metadata = _checked_metadata(document.pop("__metadata__", None))
    return _checked_tensors(document, LENGTH_BYTES + len(header), size_bytes, file), metadata


def _parse_json(header: bytes) -> dict[str, object]:
    """The header's JSON as a mapping, stricter than Python's parser: duplicates, NaN, surrogates.

    Raises _BrokenHeaderError.
    """
    if not header.startswith(b"{"):
        raise _BrokenHeaderError(
            f"has a header that does not begin with '{{' (it begins {header[:16]!r}).",
            _NOT_SAFETENSORS,
        )
    if most_values(header) > VALUE_LIMIT:
        raise _BrokenHeaderError(
            f"has a header that holds more than {VALUE_LIMIT:,} values, enough for "
            f"{VALUE_LIMIT // VALUES_PER_TENSOR:,} tensors.",
            "Spread the tensors over several files, if they are a model's.",
        )
    try:
        text = header.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BrokenHeaderError(
            f"has a header that is not UTF-8 (byte {LENGTH_BYTES + error.start} of the file).",
            _NOT_SAFETENSORS,
        ) from None
    try:
        document = json.loads(
            text, object_pairs_hook=_mapping_without_duplicates, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise _BrokenHeaderError(
            "has a header nested too deeply to be one.", _NOT_SAFETENSORS
        ) from None
    except json.JSONDecodeError as error:
        raise _BrokenHeaderError(
            f"has a header that is not JSON ({error.msg} at byte "
            f"{LENGTH_BYTES + len(text[: error.pos].encode())} of the file).",
            _NOT_SAFETENSORS,
        ) from None
    except ValueError:
        # Python's limit on the digits of an integer.
        raise _BrokenHeaderError(
            "has a header with a number of thousands of digits.", _NOT_SAFETENSORS
        ) from None
    if has_unpaired_surrogate(text, document):
        raise _BrokenHeaderError(
            "has a header with an unpaired surrogate (\\ud800 to \\udfff).", _NOT_SAFETENSORS
        )
    if type(document) is not dict:  # unreachable while it begins with '{'; kept for the type
        raise _BrokenHeaderError("has a header that is not a mapping.", _NOT_SAFETENSORS)
    return document


def _mapping_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _BrokenHeaderError(
                    f"has a header that holds the key {quoted(key)} twice, so it does not say "
                    "which one counts.",
                    "Write the file again with each name once.",
                )
            seen.add(key)
    return mapping


def _refuse_constant(constant: str) -> NoReturn:
    raise _BrokenHeaderError(f"has a header that holds {constant}, which is not JSON.")


def _checked_metadata(metadata: object) -> Mapping[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise _BrokenHeaderError("has a `__metadata__` that is not a mapping of strings.")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise _BrokenHeaderError(
                f"has a `__metadata__` whose value for {quoted(key)} is {kind(value)}, not a "
                "string."
            )
    return metadata


def _checked_tensors(
    entries: Mapping[str, object], data_start: int, size_bytes: int, file: str
) -> tuple[TensorInfo, ...]:
    """The tensors in the order of their bytes, checked one by one, then for tiling the data.

    data_start: bytes before the data section. size_bytes: of the whole file.
    """
    tensors = []
    for name, entry in entries.items():
        # One pass of plain checks: a model can hold 90,000 tensors. Words are found afterwards.
        if type(entry) is not dict:
            raise _broken_tensor(name, f"its entry is {kind(entry)}, not a mapping.")
        if len(entry) > _FIELDS and nesting(entry) > NESTING_LIMIT:
            raise _broken_tensor(name, f"its entry is nested more than {NESTING_LIMIT} deep.")
        try:
            dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        except KeyError as error:
            raise _broken_tensor(name, f"its entry has no field {error.args[0]!r}.") from None
        dtype = DTYPES.get(dtype_name) if type(dtype_name) is str else None
        if dtype is None:
            raise _unknown_dtype(name, dtype_name)
        if type(shape) is not list:
            raise _broken_tensor(name, f"its shape is {kind(shape)}, not a list.")
        elements = 1
        for extent in shape:
            if type(extent) is not int or not 0 <= extent < _UINT64_LIMIT:
                raise _broken_tensor(
                    name,
                    f"its shape holds {shown(extent)}; extents are whole numbers from 0 to "
                    "2^64 - 1.",
                )
            # Held below 2^64 at every step, or 100,000 extents would make a number of megabytes, in
            # quadratic time; and so a zero at the end hides no overflow, in the library neither.
            elements *= extent
            if elements >= _UINT64_LIMIT:
                raise _broken_tensor(name, f"its shape {shown(shape)} has more than 2^64 elements.")
        if type(offsets) is not list or len(offsets) != 2:
            raise _broken_tensor(name, "its data_offsets are not a list of two numbers.")
        start, stop = offsets
        if (
            type(start) is not int
            or type(stop) is not int
            or not 0 <= start < _UINT64_LIMIT
            or not 0 <= stop < _UINT64_LIMIT
        ):
            raise _broken_tensor(
                name,
                f"its data_offsets hold {shown(start)} and {shown(stop)}; both must be whole "
                "numbers from 0 to 2^64 - 1.",
            )
        if start > stop:
            raise _broken_tensor(
                name,
                f"its data_offsets are out of order: it would start at byte {start} and end at "
                f"byte {stop}.",
            )
        if elements * dtype.item_bytes != stop - start:
            raise _broken_tensor(
                name,
                f"shape {shown(shape)} of {dtype_name} takes {elements * dtype.item_bytes:,} "
                f"bytes, but its data_offsets hold {stop - start}.",
            )
        tensors.append(
            TensorInfo(name, dtype_name, tuple(shape), file, data_start + start, data_start + stop)
        )
    # Empty tensors share their start with the next one; the stop puts them first.
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop_exclusive))
    _check_tiling(tensors, data_start, size_bytes)
    return tuple(tensors)


def _check_tiling(tensors: list[TensorInfo], data_start: int, size_bytes: int) -> None:
    position = data_start
    previous = ""
    for number, tensor in enumerate(tensors):
        if tensor.start != position:
            before = f"{quoted(previous)} ends" if number else "the data section begins"
            if tensor.start > position:
                raise _broken_tensor(
                    tensor.name,
                    f"{tensor.start - position:,} bytes between where {before} and its first byte "
                    "belong to no tensor; the format allows no gaps.",
                    _DOWNLOAD_AGAIN,
                )
            raise _broken_tensor(
                tensor.name,
                f"it overlaps {quoted(previous)} by "
                f"{min(position, tensor.stop_exclusive) - tensor.start:,} bytes.",
                _DOWNLOAD_AGAIN,
            )
        position = tensor.stop_exclusive
        previous = tensor.name
    if position > size_bytes:
        cut = next(tensor for tensor in tensors if tensor.stop_exclusive > size_bytes)
        raise _BrokenHeaderError(
            f"is truncated: {position - size_bytes:,} bytes are missing ({position:,} expected, "
            f"{size_bytes:,} present); {quoted(cut.name)} is the first tensor that is cut.",
            _DOWNLOAD_AGAIN,
        )
    if position < size_bytes:
        raise _BrokenHeaderError(
            f"has {size_bytes - position:,} bytes after its last tensor that belong to no tensor "
            f"({position:,} bytes expected, {size_bytes:,} present).",
            _DOWNLOAD_AGAIN,
        )


def _broken_tensor(name: str, rule: str, remedy: str = _BAD_WRITER) -> _BrokenHeaderError:
    return _BrokenHeaderError(f"tensor {quoted(name)}: {rule}", remedy)


def _unknown_dtype(name: str, dtype: object) -> _BrokenHeaderError:
    if not isinstance(dtype, str):
        return _broken_tensor(name, f"its dtype is {kind(dtype)}, not a string.")
    return _broken_tensor(
        name,
        f"its dtype {shown(dtype)} is not known to this version (known: {', '.join(DTYPES)}).",
        "Convert the model to one of these, or update lazymerge.",
    )
