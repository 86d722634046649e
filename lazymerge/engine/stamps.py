"""Whether input files are still those that were planned, when a run begins and when it ends."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable
from pathlib import Path

from ..checkpoint import Checkpoint
from ..checkpoint.folder import SUFFIX
from ..errors import InputError, LazymergeError
from .inputs import changed_error
from .plan import Plan
from .streaming import Stamps


def stamps_of(plan: Plan) -> Stamps:
    """Those of all input files now.

    Raises:
        LazymergeError: one is not there any more.
    """
    return stamps_of_models(plan.checkpoints.values(), plan.remote_inputs)


def stamps_of_models(checkpoints: Iterable[Checkpoint], but: Container[str] = ()) -> Stamps:
    """Those of all files of some models now. but: paths of files that are not on the local disk.

    Raises:
        LazymergeError: one is not there any more.
    """
    stamps = {}
    for checkpoint in checkpoints:
        for folder, files in checkpoint.files_by_folder:
            for file in files:
                path = os.path.join(folder, file.path)
                if path in but:
                    continue
                try:
                    status = os.stat(path)
                except OSError as error:
                    raise LazymergeError(f"{path} cannot be read: {error.strerror}") from error
                stamps[path] = (status.st_size, status.st_mtime_ns)
    return stamps


def check_unchanged(before: Stamps, plan: Plan) -> None:
    """Checks that no input was written to while it was merged.

    Raises:
        LazymergeError: one was.
    """
    changed_since(before, plan.checkpoints.values(), plan.remote_inputs)
    for remote in plan.remote_inputs.values():
        remote.check()


def changed_since(
    before: Stamps, checkpoints: Iterable[Checkpoint], but: Container[str] = ()
) -> None:
    """Checks that no file of some models was written to. but: as of stamps_of_models.

    Raises:
        LazymergeError: one was.
    """
    now = stamps_of_models(checkpoints, but)
    for path, stamp in before.items():
        if now[path] != stamp:
            raise changed_error(path)


def check_inputs(plan: Plan) -> None:
    """Checks that the inputs are the files that were planned, and has the safetensors library
    check the headers of its files once more by its own rules.

    Raises:
        InputError: one is not.
    """
    from safetensors import SafetensorError, safe_open

    for checkpoint in plan.checkpoints.values():
        for folder, file in (
            (folder, file) for folder, files in checkpoint.files_by_folder for file in files
        ):
            if os.path.join(folder, file.path) in plan.remote_inputs:
                continue  # its pin is looked at with every request
            path = Path(folder) / file.path
            try:
                status = path.stat()
                if path.suffix == SUFFIX:
                    with safe_open(path, framework="np"):
                        pass
            except (OSError, SafetensorError) as error:
                raise InputError(f"{path} cannot be read: {error}") from error
            modified_ns = None if file.modified_ns is None else status.st_mtime_ns
            if (status.st_size, modified_ns) != (file.size_bytes, file.modified_ns):
                raise InputError(f"{path} has changed since the merge was planned; plan it again")
