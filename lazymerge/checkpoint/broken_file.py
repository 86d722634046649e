"""A broken invariant of a file's format, before the file's name is known."""

from __future__ import annotations

DAMAGED = "The file is damaged, or what wrote it is broken: download it again."
INCOMPLETE = "The file is damaged or was not written completely: download it again."


class BrokenFileError(Exception):
    """What is wrong and the remedy, one sentence each; who knows the file's name puts it before."""

    def __init__(self, rule: str, remedy: str = DAMAGED) -> None:
        super().__init__(f"{rule} {remedy}")
