"""What is under a prefix, held against a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...output.manifest import MANIFEST_NAME, MERGE_PATH
from ...output.store.address import StoreAddress, is_address
from ...output.store.client import Store
from ...output.store.records import StoreContents, look
from ..plan import Plan
from ..resources import Resources
from ..unfinished import check_is_of_plan, plan_to_resume

MOST_NAMED = 4


def check_prefix(
    plan: Plan, address: StoreAddress, contents: StoreContents, *, overwrite: bool
) -> bool:
    """Whether there is an unfinished output to go on with.

    Raises:
        InputError: a run of the plan may not write there.
    """
    for checkpoint in plan.checkpoints.values():
        for folder, _ in checkpoint.files_by_folder:
            if folder.rstrip("/") == str(address):
                raise InputError(f"the output {address} is an input model; choose another prefix")
    if plan.split is not None:
        raise InputError(
            "parts of a split plan are written into folders, where join finds them; a store takes "
            "the whole plan"
        )
    if contents.is_unfinished and not overwrite:
        assert contents.merge is not None
        check_is_of_plan(plan, contents.merge, address)
        return True
    present = [*contents.own, *contents.foreign]
    if present and not overwrite:
        raise InputError(
            f"{address} is not empty (it holds {_some(present)}); old and new weights must not "
            "mix: choose another prefix, or give --overwrite to replace an earlier output"
        )
    if present and not contents.is_earlier:
        raise InputError(
            f"{address} holds objects ({_some(present)}) and no {MANIFEST_NAME}, so it is not an "
            "earlier output of lazymerge, and --overwrite does not replace it; choose another "
            "prefix"
        )
    if contents.foreign:
        raise InputError(
            f"{address} holds objects that no merge has written ({_some(contents.foreign)}); "
            "--overwrite does not remove those: choose another prefix, or remove them"
        )
    return False


def check_no_intermediates(
    output: Path | StoreAddress, intermediates: Mapping[str, Path | str]
) -> None:
    """Raises:
    InputError: merges that others of the recipe use are to be written too, and not all is to be
        in folders.
    """
    in_stores = [place for place in (output, *intermediates.values()) if is_address(str(place))]
    if intermediates and in_stores:
        raise InputError(
            f"merges that others use are written into folders, and so is what they lead to; "
            f"{in_stores[0]} is an address"
        )


def check_address(plan: Plan, address: StoreAddress, *, overwrite: bool) -> None:
    """As `check_prefix`, of what is there now. An output of the plan that is complete is let pass.

    Raises:
        InputError: a run of the plan may not write there, or the store does not answer.
    """
    contents = look(Store(address))
    if complete_in_store(plan, contents) is None:
        check_prefix(plan, address, contents, overwrite=overwrite)


def complete_in_store(plan: Plan, contents: StoreContents) -> dict[str, Any] | None:
    """The manifest of an output of this plan's, complete; None if there is none.

    Its shards are there and as long as they must be. Of the small files some may be missing.
    """
    document = contents.manifest
    if document is None or document.get("fingerprint") != plan.fingerprint:
        return None
    sizes = {shard.file: shard.size_bytes for shard in plan.shards}
    there = {name: found.size_bytes for name, found in contents.objects.items()}
    return document if all(there.get(name) == size for name, size in sizes.items()) else None


def file_names(document: Mapping[str, Any]) -> list[str]:
    """Of the small files that a manifest lists."""
    files = document.get("files")
    return [name for name in files if isinstance(name, str)] if isinstance(files, dict) else []


def unfinished_plan(address: StoreAddress, resources: Resources | None = None) -> Plan:
    """The plan of an unfinished output, to be run into it again. As `plan_of_unfinished`."""
    contents = look(Store(address))
    merge = contents.merge
    if merge is None or not contents.is_unfinished:
        state = (
            "is complete; lazymerge verify checks it"
            if contents.manifest is not None
            else f"holds no unfinished merge (there is no {MERGE_PATH} in it)"
        )
        raise InputError(f"{address} {state}")
    return plan_to_resume(
        address, address.url(MERGE_PATH), lambda: merge, resources or Resources()
    ).into_store()


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(name[:100] for name in names[:MOST_NAMED])
    more = len(names) - MOST_NAMED
    return f"{shown} and {more} more" if more > 0 else shown
