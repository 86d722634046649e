"""What a plan needs of the Hugging Face Hub and the local disk does not have yet."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import Checkpoint
from ..checkpoint.hub import HubSource, Moved, fetch, silently
from ..checkpoint.hub_model import check_fetched
from ..errors import DoesNotFitError
from ..output.sidecars import copied_files
from ..sizes import format_bytes
from ..vocabulary.files import is_tokenizer_file


@dataclass(frozen=True, slots=True)
class MissingFile:
    """A file of a model of the Hub that is not in the cache.

    name: relative path.
    """

    source: HubSource
    name: str
    size_bytes: int


def missing_files(
    checkpoints: Iterable[Checkpoint], sidecar_folder: str, sidecars: Sequence[str]
) -> tuple[MissingFile, ...]:
    """The weights of all models and adapters, and the small files of the model that they are copied
    from, as far as they are not in the cache."""
    missing: dict[tuple[str, str], MissingFile] = {}
    for checkpoint in checkpoints:
        for source, files in checkpoint.files_by_source:
            names = [file.path for file in files]
            names += sidecars if source.folder == sidecar_folder else ()
            for name in names:
                if not source.has(name):
                    file = MissingFile(source, name, source.sizes[name])
                    missing.setdefault((source.folder, name), file)
    return tuple(missing.values())


def download(
    missing: Sequence[MissingFile], checkpoints: Collection[Checkpoint], moved: Moved | None = None
) -> None:
    """Fetches files into the cache, and checks that the weights are those that were planned.

    moved: is told of bytes as they come; None: the library shows its own progress.

    Raises:
        DoesNotFitError: they do not fit on the cache's disk.
        InputError: a file may not be read, or is not what the Hub said.
        LazymergeError: one does not come.
    """
    _check_disk(missing)
    for file in missing:
        fetch(file.source, file.name, moved)
    fetched = {(file.source.folder, file.name) for file in missing}
    for checkpoint in checkpoints:
        for source, files in checkpoint.files_by_source:
            check_fetched(source, [f for f in files if (source.folder, f.path) in fetched])


def fetch_tokenizers(checkpoints: Iterable[Checkpoint]) -> None:
    """Has the tokenizer files of models of the Hub in the cache: a plan that matches vocabularies
    reads them.

    Raises:
        InputError: one may not be read, or is not what the Hub said.
        LazymergeError: one does not come.
    """
    for checkpoint in checkpoints:
        if checkpoint.hub is not None:
            for name in copied_files(checkpoint.hub.sizes):
                if is_tokenizer_file(name):
                    fetch(checkpoint.hub, name, silently)


def _check_disk(missing: Sequence[MissingFile]) -> None:
    needed = sum(file.size_bytes for file in missing)
    folder = Path(missing[0].source.folder)
    while not os.path.exists(folder):
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DoesNotFitError(
            f"the models to download hold {format_bytes(needed)}, and the cache {folder} has "
            f"{format_bytes(free)} free; free some space or choose another place for the cache "
            "(HF_HUB_CACHE)"
        )
