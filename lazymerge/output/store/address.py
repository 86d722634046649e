"""Which outputs are in an object store: `s3://bucket/prefix`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ...errors import InputError

SCHEME = "s3"

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")

MOST_PREFIX_BYTES = 512
"""Of the 1024 that a key may have: what stays is for the names below it."""


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Where an output's objects are: those whose keys begin with `prefix/`. Without credentials."""

    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"{SCHEME}://{self.bucket}/{self.prefix}"

    @property
    def name(self) -> str:
        """What a folder would be called."""
        return self.prefix.rpartition("/")[2]

    def key(self, name: str) -> str:
        """Of the object that a file of the output is."""
        return f"{self.prefix}/{name}"

    def url(self, name: str) -> str:
        """The same, for people."""
        return f"{self}/{name}"


def is_address(output: str | Path) -> bool:
    """Whether an output is given by an address, by its form."""
    return _ADDRESS.match(str(output)) is not None


def place_of(output: str | Path) -> Path | StoreAddress:
    """The folder, or the address, that an output is to be at.

    Raises:
        InputError: it is an address that cannot be written to.
    """
    return store_address(output) if is_address(output) else Path(output)


def local_place(output: str | Path) -> Path:
    """The folder that an output is in.

    Raises:
        InputError: it is given by an address, and this is done with folders only.
    """
    if is_address(output):
        raise InputError(
            f"{str(output)[:200]} is an address; this works on folders only: fetch a copy of the "
            "output first"
        )
    return Path(output)


def store_address(output: str | Path) -> StoreAddress:
    """The address, taken apart.

    Raises:
        InputError: it cannot be one, or holds what belongs in no command.
    """
    text = str(output)
    scheme = text.partition(":")[0]
    if scheme != SCHEME:
        raise InputError(
            f"the output is at {scheme[:20]}://…: outputs are written to folders and to "
            f"{SCHEME}://bucket/prefix only"
        )
    if isinstance(output, Path):  # which makes one slash of two
        raise InputError(
            f"the output {text!r} is an address: it must be given as text, and not as a Path"
        )
    try:
        parts = urlsplit(text)
        has_password = "@" in parts.netloc
    except ValueError:
        raise InputError(f"the output {text[:200]!r} is no address; correct it") from None
    if has_password:
        raise InputError(
            f"the output's address, {SCHEME}://…, holds a name or password, which would stand in "
            "manifests and logs: take it out, and give the storage's own credentials "
            "(AWS_PROFILE, AWS_ACCESS_KEY_ID, …)"
        )
    if "?" in text or "#" in text:
        raise InputError(
            f"the output's address, {SCHEME}://{parts.netloc[:80]}/…, holds a ? or #: take it out"
        )
    bucket, prefix = parts.netloc, parts.path.strip("/")
    is_plain = text.isprintable() and text.isascii() and "\\" not in text and "::" not in text
    if not (is_plain and _BUCKET.fullmatch(bucket)):
        raise InputError(
            f"the output {text[:200]!r} is no plain address; write {SCHEME}://bucket/prefix, in "
            "ASCII"
        )
    if not prefix:
        raise InputError(
            f"the output {text!r} is a whole bucket; name a prefix in it: {text.rstrip('/')}/NAME"
        )
    if len(prefix) > MOST_PREFIX_BYTES:
        raise InputError(f"the output's prefix is longer than {MOST_PREFIX_BYTES} characters")
    if any(part in ("", ".", "..") for part in prefix.split("/")):
        raise InputError(f"the output {text!r} holds //, . or .. in its prefix; write it without")
    return StoreAddress(bucket, prefix)
