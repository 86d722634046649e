"""Which model references are addresses of storage elsewhere: `https://…`, `s3://…`, `gs://…`."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from ..errors import InputError
from .wording import quoted

SCHEMES = ("https", "http", "s3", "gs")

_URL = re.compile(r"([a-z][a-z0-9]*)://[^/]")


def is_url(reference: str) -> bool:
    """Whether a reference is an address of storage elsewhere, by its form. One of the Hugging Face
    Hub is not: `hf://` is read as the Hub's library says."""
    match = _URL.match(reference)
    return match is not None and match[1] in SCHEMES


def scheme_of(url: str) -> str:
    """The part before `://`."""
    return url.partition("://")[0]


def check_url(reference: str) -> str:
    """The address, without slashes at its end.

    Raises:
        InputError: it holds what belongs in no recipe, or cannot be an address.
    """
    plain = reference.split("://", 1)[0]
    try:
        parts = urlsplit(reference)
        has_password = "@" in parts.netloc
    except ValueError:
        raise InputError(f"model {quoted(reference)}: is no address. Correct it.") from None
    if has_password:
        raise InputError(
            f"a model of {plain}://: the address holds a user's name or password, which would "
            "stand in plans and manifests. Take it out, and give the storage's own credentials "
            "(for https: a netrc file; for s3: AWS_PROFILE or AWS_ACCESS_KEY_ID)."
        )
    if parts.query or parts.fragment:
        raise InputError(
            f"a model of {plain}://{parts.netloc}: the address holds a ? or #. Signed addresses "
            "would stand in plans and manifests: give the storage's own credentials instead."
        )
    if not reference.isprintable() or "\\" in reference or "::" in parts.path:
        raise InputError(f"model {quoted(reference)}: is no plain address. Correct it.")
    if ".." in parts.path.split("/"):
        raise InputError(f"model {quoted(reference)}: holds .. in its path. Write it without.")
    return reference.rstrip("/")
