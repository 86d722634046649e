"""Which model references mean a model of the Hugging Face Hub: `org/name` and `org/name@revision`.

What lies on the local disk goes first: a folder `org/name` of the current folder is meant, not the
Hub's model of that name, whatever revision is asked for. `hf://org/name@revision` always means the
Hub's.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

SCHEME = "hf://"
DEFAULT_REVISION = "main"

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json")
"""`folder/model.bin` is a path that leads nowhere, and no id."""


@dataclass(frozen=True, slots=True)
class HubReference:
    """A model of the Hub.

    repository: its id, `org/name`.
    revision: a branch, a tag or a commit.
    """

    repository: str
    revision: str = DEFAULT_REVISION

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a whole commit id, which always means the same files."""
        return is_commit(self.revision)

    def __str__(self) -> str:
        at = "" if self.revision == DEFAULT_REVISION else f"@{self.revision}"
        return f"{self.repository}{at}"


def is_commit(revision: str) -> bool:
    """Whether a revision is a whole commit id."""
    return _COMMIT.fullmatch(revision) is not None


def hub_reference(reference: str) -> HubReference | None:
    """The Hub's model that a reference can mean, by its form; None: it can only be a path."""
    repository, at, revision = reference.removeprefix(SCHEME).partition("@")
    if not _ID.fullmatch(repository) or repository.endswith(_FILE_SUFFIXES):
        return None
    if ".." in repository or "--" in repository or (at and not _REVISION.fullmatch(revision)):
        return None
    return HubReference(repository, revision) if at else HubReference(repository)


def local_path(reference: str) -> str:
    """The path that a reference means on the local disk, if it means one; `~` is expanded.

    A revision after the name of something that exists is left out.
    """
    path = os.path.expanduser(reference)
    name, at, _ = path.partition("@")
    if at and hub_reference(reference) is not None and not os.path.lexists(path):
        return name if os.path.lexists(name) else path
    return path
