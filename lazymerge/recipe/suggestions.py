"""The known word that a misspelt one was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def suggestion(word: str, known: Collection[str]) -> str | None:
    """The known word that was probably meant."""
    if len(word) > 64:  # the comparison takes quadratic time
        return None
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.7)
    return near[0] if near else None


def suggest(word: str, known: Collection[str]) -> str | None:
    """The known word that was probably meant, as the end of a message."""
    near = suggestion(word, known)
    if near is None:
        return None
    alien = next((c for c in word if c.isprintable() and not c.isascii()), None)
    # Letters of other alphabets look like those of ours: the two words may look the same.
    what = "" if alien is None else f" (the character {alien!r} is {alien!a})"
    return f"did you mean {near!r}?{what}"
