"""Open a model: its files' headers, its shard index and its config.

A folder is one of these, tried in this order:

    model.safetensors.index.json + the shards it lists    checked against the shards' own headers
    model.safetensors
    pytorch_model.bin.index.json + its shards
    pytorch_model.bin
    NAME.safetensors.index.json, if there is only one     as diffusers has them
    every *.safetensors in it                             no tensor in two of them
    every .bin, .pt, .pth and .ckpt file in it            but those that training leaves

So safetensors go before torch files. Or a single file, by its path; a config is not needed.

The headers are the truth. The index is checked against them and adds nothing: where they differ,
nobody can say which tensors make up the model, so it is an error and not a guess.

Nothing outside the model's folder is opened on a file's word: an index may hold plain names only,
and a link must stay inside the folder, or inside the Hugging Face cache's folder of the same model
(models--org--name/snapshots/REVISION/* are links into models--org--name/blobs, and those may be
links into the blobs that the cache's models share). What the user names, the folder or a single
file, may be a link to anywhere.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from ..errors import InputError
from .block_scales import dequantised_notices, with_block_scales
from .header import Header, garbage_collector_paused, read_header
from .hub_reference import SCHEME, HubReference, hub_reference, local_path
from .json_file import read_json_mapping
from .remote_reference import is_url
from .tensor import Checkpoint, TensorInfo
from .torch_file import TORCH_SUFFIXES, is_torch_name, read_torch_file
from .wording import listed, quoted

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".index.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = SINGLE_NAME + INDEX_SUFFIX
TORCH_SINGLE_NAME = "pytorch_model.bin"
CONFIG_NAME = "config.json"
ADAPTER_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
TRAINING_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)")
"""Torch files that training leaves beside a model."""
INDEX_LIMIT_BYTES = 200_000_000
INDEX_LIMIT_VALUES = 1_000_000
"""Two for each tensor. The models with the most tensors have about 140,000."""
CONFIG_LIMIT_BYTES = 10_000_000
CONFIG_LIMIT_VALUES = 1_000_000
"""The largest configs list the names of 22,000 classes twice: a tenth of this."""

_NAMES_COMPARED = 1_000
"""Names of a folder that an absent one is compared with: 20 ms."""

_SHARED_BLOB = re.compile(r"blobs/([0-9a-f]{2})/\1[0-9a-f]{62}")
_LINE_BREAK = re.compile("[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.[a-z]+)")


def open_checkpoint(reference: str) -> Checkpoint:
    """Open a model: headers, index and config are read, tensor data is not.

    reference: a folder, a .safetensors file or a torch file; `~` is expanded. Where there is none:
        a model of the Hugging Face Hub, `org/name` or `org/name@revision`. Or an address:
        `https://…`, `s3://…`, `gs://…`.

    Raises InputError naming the file, the tensor and the remedy; LazymergeError where the Hub gives
    no answer.
    """
    if not _can_be_path(reference):
        raise InputError(f"model {quoted(reference)}: is not a path. Name a folder or a file.")
    wanted = hub_reference(reference)
    if wanted is not None and reference.startswith(SCHEME):
        return _open_hub_model(reference, wanted)
    if is_url(reference):
        from .remote import open_remote_model  # which opens folders through this module

        return open_remote_model(reference)
    path = Path(local_path(reference))
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # a name too long, a folder that may not be searched
        raise InputError(
            f"model {quoted(reference)}: {error.strerror or error}. Correct the path."
        ) from None
    notices: tuple[str, ...] = ()
    if is_folder:
        if wanted is not None and str(path) != reference:
            notices = (f"is the local folder {path}; its revision is not looked at",)
        folder = Path(os.path.realpath(path))
        files, index = _files_of_folder(folder)
    elif is_file:
        if not (path.name.endswith(SUFFIX) or is_torch_name(path.name)):
            raise InputError(_explain_other_file(path))
        # The name as the user wrote it, even when it is a link: the sidecars lie beside the link.
        folder = Path(os.path.realpath(path.parent))
        files, index = [path.name], None
    elif wanted is not None and not os.path.lexists(path):
        return _open_hub_model(reference, wanted)
    else:
        raise InputError(_explain_absent(reference, path))
    checkpoint = _open_files(reference, path, folder, files, index)
    return replace(checkpoint, notices=(*checkpoint.notices, *notices))


def open_folder(
    reference: str,
    folder: Path,
    names: list[str],
    read_all: Callable[[list[str]], list[Header]],
) -> Checkpoint:
    """Open a folder that may lack files: what is not there is got otherwise.

    folder: resolved; it holds its index, if it has one, and its config.
    names: of the files that belong there, sorted.
    read_all: gives the headers of some of them.

    Raises InputError as open_checkpoint does.
    """
    files, index = _files_of_folder(folder, names)
    return _open_files(reference, folder, folder, files, index, read_all)


def indexed_files(path: Path) -> list[str]:
    """The files that an index lists, sorted.

    Raises InputError as open_checkpoint does.
    """
    suffix = Path(path.name.removesuffix(INDEX_SUFFIX)).suffix
    return sorted(set(_read_index(path, suffix).weight_map.values()))


def index_among(names: list[str]) -> str | None:
    """The index that says what a model is, of the files of its folder; None if there is none."""
    return _choose(names)[1]


def _open_hub_model(reference: str, wanted: HubReference) -> Checkpoint:
    from .hub_model import open_hub_model  # which opens folders of the Hub's cache through this one

    try:
        return open_hub_model(reference, wanted)
    except InputError as error:
        near = _near_names(Path(os.path.realpath(wanted.repository)))
        raise InputError(f"{error}{near}") from None


def _open_files(
    reference: str,
    path: Path,
    folder: Path,
    files: list[str],
    index: _Index | None,
    read_all: Callable[[list[str]], list[Header]] | None = None,
) -> Checkpoint:
    _check_is_text(folder, files)
    with garbage_collector_paused():
        headers = (
            [_read_file(folder / file, file) for file in sorted(files)]
            if read_all is None
            else read_all(sorted(files))
        )
        tensors = _gather_tensors(headers, folder)
    if index is not None:
        _check_index(index.weight_map, tensors, index.path)
    if not tensors:
        raise InputError(f"{path}: holds no tensor. Download it again.")
    config, config_bytes = _read_config(folder)
    tensors = with_block_scales(tensors, config, folder)
    return Checkpoint(
        reference=reference,
        folder=str(folder),
        files=tuple(header.file for header in headers),
        tensors=tensors,
        config=config,
        header_bytes_read=sum(header.bytes_read for header in headers)
        + config_bytes
        + (0 if index is None else index.bytes_read),
        notices=(
            *(notice for header in headers for notice in header.notices),
            *dequantised_notices(tensors),
        ),
    )


def checkpoint_file_path(checkpoint: Checkpoint, file: str) -> Path:
    """Where one of a checkpoint's files is.

    file: as TensorInfo.file and FileInfo.path name it.

    Raises InputError when it is not a plain file name: a checkpoint may come from a saved plan.
    """
    if not is_plain_name(file):
        raise InputError(
            f"{checkpoint.folder}: {quoted(file)} is not a plain file name. Plan the recipe again."
        )
    return Path(checkpoint.folder) / file


@dataclass(frozen=True, slots=True)
class _Index:
    """A shard index: the file that every tensor is in."""

    path: Path
    weight_map: dict[str, str]
    bytes_read: int


def _read_file(path: Path, file: str) -> Header:
    return read_torch_file(path, file) if is_torch_name(file) else read_header(path, file)


def _files_of_folder(
    folder: Path, names: list[str] | None = None
) -> tuple[list[str], _Index | None]:
    """The names of the files that make up the model, and the index that lists them.

    names: what is in the folder, or belongs there; None: what is in it.
    """
    try:
        names = sorted(os.listdir(folder)) if names is None else names
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be listed: {error.strerror or error}. Make the folder readable."
        ) from None
    single, index_name, files = _choose(names)
    index = None
    if index_name is not None:
        index = _read_index(folder / index_name, Path(single).suffix)
        files = sorted(set(index.weight_map.values()))
        present = set(names)
        absent = [file for file in files if file not in present]
        if absent:
            remedy = "Download what is missing"
            if single in names:
                remedy += f", or delete the index if {single} is the whole model"
            raise InputError(
                f"{index.path}: lists {listed(absent)}, absent from the folder "
                f"({len(absent)} of {len(files)} files). {remedy}."
            )
    else:
        if not files:
            raise InputError(_explain_no_model(folder, names))
        if len(files) == 1 and files[0] in ADAPTER_NAMES:
            raise InputError(
                f"{folder}: holds a LoRA adapter ({files[0]}), not a model. "
                "Name it beside its base model: MODEL+ADAPTER."
            )
        _check_shard_numbers(files, folder)
    for file in files:
        _check_link(folder, file)
    return files, index


def _choose(names: list[str]) -> tuple[str, str | None, list[str]]:
    """What stands for the model in a folder: a single file's name, the index beside it if there is
    one, else the files."""
    for single in (SINGLE_NAME, TORCH_SINGLE_NAME):
        if single + INDEX_SUFFIX in names:
            return single, single + INDEX_SUFFIX, []
        if single in names:
            return single, None, [single]
    shown = [name for name in names if name[0] != "."]
    indexes = [name for name in shown if name.endswith(SUFFIX + INDEX_SUFFIX)]
    if len(indexes) == 1:
        return indexes[0].removesuffix(INDEX_SUFFIX), indexes[0], []
    files = [name for name in shown if name.endswith(SUFFIX)]
    if not files:
        files = [n for n in shown if is_torch_name(n) and not TRAINING_STATE.fullmatch(n)]
    return SINGLE_NAME, None, files


def _read_index(path: Path, suffix: str) -> _Index:
    """suffix: of the files that it may list."""
    _check_link(path.parent, path.name)
    repeated: list[str] = []

    def mapping(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    repeated.append(key)
                seen.add(key)
        return result

    with garbage_collector_paused():
        document, bytes_read = read_json_mapping(
            path, INDEX_LIMIT_BYTES, mapping, limit_values=INDEX_LIMIT_VALUES
        )
    if repeated:
        raise InputError(
            f"{path}: holds the key {quoted(repeated[0])} twice, so it does not say which one "
            "counts. Download it again."
        )
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(
            f"{path}: has no mapping `weight_map` of tensor names to files. Download it again."
        )
    checked: set[str] = set()
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise InputError(
                f"{path}: tensor {quoted(name)}: its file is not a string. Download it again."
            )
        if file in checked:
            continue
        checked.add(file)
        if not is_plain_name(file) or "\\" in file:
            raise InputError(
                f"{path}: tensor {quoted(name)}: its file {quoted(file)} is not a plain file name; "
                "an index may only list files of its own folder. Do not use this model unless you "
                "know why."
            )
        if not file.endswith(suffix):
            raise InputError(
                f"{path}: tensor {quoted(name)}: its file {quoted(file)} is not a {suffix} file. "
                "Download the model in the safetensors format."
            )
    return _Index(path, weight_map, bytes_read)


def _gather_tensors(headers: list[Header], folder: Path) -> dict[str, TensorInfo]:
    """All tensors by name, in the order of files and offsets."""
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for tensor in header.tensors:
            if not tensor.name.isprintable() and _LINE_BREAK.search(tensor.name):
                raise InputError(
                    f"{folder}: tensor {quoted(tensor.name)} has a line break in its name, and "
                    "what follows it could pass for a message. Rename it."
                )
            other = tensors.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise InputError(
                    f"{folder}: tensor {quoted(tensor.name)} is in both {quoted(other.file)} and "
                    f"{quoted(tensor.file)}. Give the one file to use, or remove the files that "
                    "are not part of the model."
                )
    return tensors


def _check_index(
    weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo], path: Path
) -> None:
    """Check a shard index against what the shards hold."""
    for name, file in weight_map.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise InputError(
                f"{path}: lists tensor {quoted(name)} in {quoted(file)}, which does not hold it. "
                "The index and the files are not of the same model: download both again."
            )
        if tensor.file != file:
            raise InputError(
                f"{path}: lists tensor {quoted(name)} in {quoted(file)}, but it is in "
                f"{quoted(tensor.file)}. The index and the files are not of the same model: "
                "download both again."
            )
    if len(tensors) > len(weight_map):
        extra = [name for name in tensors if name not in weight_map]
        raise InputError(
            f"{path}: does not list {listed(extra)}, held by {quoted(tensors[extra[0]].file)} "
            f"({len(extra)} of {len(tensors)} tensors are not listed). The index is out of date: "
            "download it again, or delete it if the files are right and complete."
        )


def _read_config(folder: Path) -> tuple[dict[str, object] | None, int]:
    path = folder / CONFIG_NAME
    if not os.path.lexists(path):
        return None, 0
    _check_link(folder, CONFIG_NAME)
    return read_json_mapping(path, CONFIG_LIMIT_BYTES, limit_values=CONFIG_LIMIT_VALUES)


def _can_be_path(reference: str) -> bool:
    try:
        return reference != "" and b"\0" not in os.fsencode(reference)
    except UnicodeEncodeError:
        return False


def _check_is_text(folder: Path, files: list[str]) -> None:
    """Refuse names that are not UTF-8: no plan, journal or manifest could hold them.

    Python reads the bytes of such a name as unpaired surrogates.
    """
    for name in (str(folder), *files):
        if not name.isprintable() and _SURROGATE.search(name):
            raise InputError(
                f"{folder}: the name {quoted(name)} is not UTF-8. Rename the file or folder."
            )


def is_plain_name(file: str) -> bool:
    """Whether a name can only mean a file of its own folder."""
    return file not in ("", ".", "..") and "/" not in file and _can_be_path(file)


def _check_link(folder: Path, file: str) -> None:
    """Refuse a link that leaves the model.

    folder: resolved.
    """
    path = folder / file
    if not path.is_symlink():
        return
    target = Path(os.path.realpath(path))
    if leaves_model(folder, file):
        raise InputError(
            f"{path}: is a link to {target}, outside the model's folder. Replace the link with the "
            "file if you trust it."
        )
    if not target.exists():
        raise InputError(f"{path}: is a link to {target}, which is absent. Download it again.")


def leaves_model(folder: Path, file: str) -> bool:
    """Whether a file of a model's folder lies, through links, outside the model.

    folder: the model's folder. file: relative path.
    """
    root = folder.resolve()
    target = Path(os.path.realpath(root / file))
    inside = any(target.is_relative_to(folder) for folder in (root, *_hub_cache_folders(root)))
    return not inside and not _is_shared_blob(root, target)


def _hub_cache_folders(folder: Path) -> list[Path]:
    """The model's folder of a Hugging Face cache when `folder` is one of its snapshots."""
    return [
        snapshots.parent
        for snapshots in folder.parents
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    ]


def _is_shared_blob(folder: Path, target: Path) -> bool:
    """Whether a file is one of the store that the models of a Hugging Face cache share,
    `blobs/12/12ab…`: a file whose name is its hash, beside the model's folder in the cache.
    """
    return any(
        _SHARED_BLOB.fullmatch(target.relative_to(of_model.parent).as_posix()) is not None
        for of_model in _hub_cache_folders(folder)
        if target.is_relative_to(of_model.parent)
    )


def _check_shard_numbers(files: list[str], folder: Path) -> None:
    """Without an index, shard names (model-00001-of-00003) still tell what is missing."""
    found: dict[tuple[str, int, str], set[int]] = {}
    for file in files:
        match = _SHARD.fullmatch(file)
        if match:
            key = (match["stem"], int(match["count"]), match["suffix"])
            found.setdefault(key, set()).add(int(match["number"]))
    for (stem, count, suffix), numbers in found.items():
        missing = [number for number in range(1, count + 1) if number not in numbers]
        if missing:
            names = [f"{stem}-{number:05d}-of-{count:05d}{suffix}" for number in missing]
            raise InputError(
                f"{folder}: {listed(names)} absent ({len(missing)} of {count} shards). "
                "Download what is missing."
            )


def _explain_no_model(folder: Path, names: list[str]) -> str:
    if not names:
        return f"{folder}: the folder is empty. Download the model into it again."
    return (
        f"{folder}: holds no {SUFFIX} file and no torch file ({', '.join(TORCH_SUFFIXES)}) of a "
        f"model (it holds {listed(names)}). Name the folder of a model."
    )


def _explain_other_file(path: Path) -> str:
    return (
        f"{path}: is neither a {SUFFIX} file nor a torch file ({', '.join(TORCH_SUFFIXES)}). "
        "Name a model's folder or such a file."
    )


def _explain_absent(reference: str, path: Path) -> str:
    if os.path.lexists(path):
        if path.is_symlink() and not path.exists():
            return (
                f"model {quoted(reference)}: is a link to {os.readlink(path)!r}, which is absent. "
                "Correct the link, or download the model."
            )
        return (
            f"model {quoted(reference)}: is neither a folder nor a regular file. Name a model's "
            f"folder or a {SUFFIX} file."
        )
    if "://" in reference:
        return (
            f"model {quoted(reference)}: is no address that is read. Write hf://org/name[@revision],"
            " or begin it with https://, http://, s3:// or gs://."
        )
    resolved = Path(os.path.realpath(path))
    return (
        f"model {quoted(reference)}: not found (resolved to {resolved})."
        f"{_near_names(resolved) or ' Correct the path, or download the model there.'}"
    )


def _near_names(resolved: Path) -> str:
    """A sentence on what lies where a file or folder does not, if it has much the same name."""
    try:
        with os.scandir(resolved.parent) as entries:
            names = [entry.name for entry in islice(entries, _NAMES_COMPARED)]
        near = difflib.get_close_matches(resolved.name, names, n=3)
    except OSError:
        near = []
    return f" {resolved.parent} holds {listed(near)}: is one of them meant?" if near else ""
