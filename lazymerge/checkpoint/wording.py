"""Values from files, in words for messages: short, on one line, whatever the file holds."""

from __future__ import annotations

import json

NAME_LIMIT = 200
"""Characters of a name that are shown; real names of tensors have up to 150. A header may hold a
name of 100 MB, and a message is for people."""

SHOWN_LIMIT = 80
"""Characters of any other value that are shown: a line of a terminal."""

NAMES_LISTED = 5
"""Names listed before a message says how many more there are."""

_KINDS = {
    dict: "a mapping",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def quoted(name: str) -> str:
    """A name in quotes, unprintable characters escaped, cut where it is too long to read."""
    return repr(name if len(name) <= NAME_LIMIT else f"{name[: NAME_LIMIT - 3]}...")


def listed(names: list[str]) -> str:
    """The first few of these names, and how many more there are."""
    text = ", ".join(quoted(name) for name in names[:NAMES_LISTED])
    more = len(names) - NAMES_LISTED
    return f"{text} and {more} more" if more > 0 else text


def kind(value: object) -> str:
    """What a JSON value is."""
    return _KINDS[type(value)]


def shown(value: object) -> str:
    """A JSON value as JSON, cut where it is too long to read."""
    if isinstance(value, (str, list)):  # a list's values take a character each, at least
        value = value[:SHOWN_LIMIT]
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        return kind(value)
    return text if len(text) <= SHOWN_LIMIT else f"{text[: SHOWN_LIMIT - 3]}..."
