"""--write-intermediate: merges that others of a recipe use, and where they are to go."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..output.store.address import StoreAddress, is_address
from ..recipe import Recipe, part_named

OPTION = "--write-intermediate"

IntermediateOption = Annotated[
    list[str] | None,
    typer.Option(
        OPTION,
        metavar="NAME[=FOLDER]",
        help="Write the merge NAME, which others of the recipe use, as a model too, before OUT. "
        "Without FOLDER it goes beside OUT, into OUT-NAME. May be given again.",
    ),
]


def folders_asked(
    asked: Sequence[str] | None, recipe: Recipe, output: Path | StoreAddress | None
) -> dict[str, Path]:
    """Where merges are to be written, by name.

    asked: as given, NAME or NAME=FOLDER. output: OUT, None where it is not given.

    Raises:
        InputError: the recipe uses no merge of a name, one is asked for twice, it is not said
            where it is to go, or it is to go into a store, or OUT is.
    """
    for place in (output, *(text.partition("=")[2] for text in asked or ())):
        if asked and place is not None and is_address(str(place)):
            raise InputError(
                f"{OPTION} writes into folders, beside OUT, which must be one too; {place} is an "
                "address"
            )
    names = [str(merge.name) for merge in recipe.merges]
    folder_of_output = output if isinstance(output, Path) else None
    folders: dict[str, Path] = {}
    for text in asked or ():
        name, folder = _apart(text, names)
        part_named(recipe, name)
        if name in folders:
            raise InputError(f"{OPTION} {name} is given twice; a merge is written once")
        folders[name] = _beside(folder_of_output, name) if folder is None else _given(name, folder)
    return folders


def _apart(text: str, names: Sequence[str]) -> tuple[str, str | None]:
    """A name and a folder; a name may hold an = itself."""
    if text in names:
        return text, None
    fitting = [name for name in names if text.startswith(f"{name}=")]
    name = max(fitting, key=len) if fitting else text.partition("=")[0]
    return name, text[len(name) + 1 :] if len(text) > len(name) else None


def _given(name: str, folder: str) -> Path:
    if not folder:
        raise InputError(f"{OPTION} {name}= names no folder; leave the = out, or say which")
    return Path(folder).expanduser()  # a shell does not do so after a =


def _beside(output: Path | None, name: str) -> Path:
    """OUT-NAME. A name comes from the recipe, and must not lead elsewhere."""
    from ..checkpoint import is_plain_name

    given = Path("OUT") if output is None else output
    if given.name in ("", ".."):
        given = Path(os.path.abspath(given))
    if not given.name or not name.isprintable() or not is_plain_name(f"{given.name}-{name}"):
        raise InputError(
            f"the merge {name!r} needs a folder: {OPTION} {shlex.quote(f'{name}=FOLDER')}"
        )
    return given.with_name(f"{given.name}-{name}")


def as_options(folders: Mapping[str, Path]) -> str:
    """The options again, for a shell, with a space before each."""
    return "".join(
        f" {OPTION} {shlex.quote(f'{name}={folder}')}" for name, folder in folders.items()
    )
