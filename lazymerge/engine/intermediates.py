"""Merges that others of a recipe use, written beside what they lead to.

    name: both     ──► OUT-both/      an output like any other: journal, manifest, resume, verify
    ---
    models: [both] ──► OUT/           what it would be without the other

Each is a plan of its own, with the part of the recipe that has the name as what is written. Its
tensors are the nodes that the whole has: the same inputs, the same operations, numbers drawn by the
seed that the part has there. Only then are they rounded, once, to the dtype that the part asks for;
the merges that use it are computed from the values before that, so OUT's bytes are what they are
without it. The price is reading the part's inputs once more.

The parts are written first, in the order in which they are needed: as soon as OUT has been begun,
all else is complete, and `lazymerge resume OUT` is all that is left to do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import InputError
from ..output.folder import (
    OWN_FOLDER,
    check_disks,
    clear_output_folder,
    is_unfinished,
)
from ..output.lock import OutputLock
from ..recipe import part_named
from .complete import complete_document
from .memory import NODE_BYTES
from .models import open_models
from .plan import Plan, read_folders
from .planning import make_plan
from .preparing import check_output


@dataclass(frozen=True, slots=True)
class Output:
    """A merge and where it goes.

    name: of a merge that others use; None: the one that they lead to.
    """

    name: str | None
    plan: Plan
    folder: Path


def plan_intermediate(plan: Plan, name: str) -> Plan:
    """The plan that writes one of the merges that a recipe uses, as the recipe's own plan computes
    it and with the same resources.

    Raises:
        InputError: the recipe uses no merge of that name, or tensors of its models go by other
            names in the whole than in the part alone.
        DoesNotFitError: the memory does not suffice.
    """
    whole = plan.recipe
    part = part_named(whole, name)
    paths = {reference: found.path for reference, found in plan.checkpoints.items()}
    made = make_plan(
        part,
        plan.resources,
        max_shard_bytes=plan.max_shard_bytes,
        truncate_embeddings=True,  # changes nothing where rows agree, and else it was given
        paths=paths,
    )
    if part.main_model != whole.main_model:
        seen, _ = open_models(whole, paths)
        for reference, checkpoint in made.checkpoints.items():
            if checkpoint.tensors != seen[reference].tensors:
                raise InputError(
                    f"{whole.path}: the merge {name!r} cannot be written by itself: {reference} "
                    f"is read with the names that tensors have in {whole.main_model}, which is "
                    "none of its models; merge in two steps"
                )
    return made


def outputs_of(
    plan: Plan, output: Path | str, intermediates: Mapping[str, Path | str]
) -> tuple[Output, ...]:
    """What a run is to write, in that order: the merge of the plan comes last.

    intermediates: folders by name.

    Raises:
        InputError, DoesNotFitError: as plan_intermediate.
    """
    parts = {name: plan_intermediate(plan, name) for name in intermediates}
    order = [str(merge.name) for merge in plan.recipe.merges]
    found = [
        Output(name, parts[name], Path(intermediates[name]))
        for name in sorted(parts, key=order.index)
    ]
    found.append(Output(None, plan, Path(output)))
    if len(found) == 1:
        return tuple(found)
    # one process writes them all: the graphs of all, and the libraries that one of them needs
    graphs = [len(each.plan.graph) * NODE_BYTES for each in found]
    reserved = [each.plan.memory.reserved_bytes for each in found]
    held = sum(graphs) + max(all_ - own for all_, own in zip(reserved, graphs, strict=True))
    return tuple(replace(each, plan=each.plan.in_this_process(held)) for each in found)


def check_outputs(outputs: Sequence[Output], *, overwrite: bool) -> None:
    """Checks that all of them can be written, before the first is begun.

    Raises:
        InputError: a folder cannot be used, or two of them are one.
        DoesNotFitError: they do not fit on a disk together.
    """
    _check_apart([each.folder for each in outputs])
    inputs = tuple(dict.fromkeys(path for each in outputs for path in read_folders(each.plan)))
    needed = []
    for each in outputs:
        if not overwrite and complete_document(each.plan, each.folder) is not None:
            continue
        if not check_output(each.plan, each.folder, overwrite=overwrite, inputs=inputs):
            needed.append((each.folder, each.plan.bytes_written))
    check_disks(needed, overwrite=overwrite)


def _check_apart(folders: Sequence[Path]) -> None:
    """Raises:
    InputError: one is another, or lies in it.
    """
    paths = [Path(os.path.realpath(folder)) for folder in folders]
    for number, path in enumerate(paths):
        for other in range(number):
            if path == paths[other]:
                raise InputError(
                    f"two merges cannot be written into one folder, {folders[number]}; choose "
                    "another for one of them"
                )
            for outer, inner in ((number, other), (other, number)):
                if paths[outer] in paths[inner].parents:
                    raise InputError(
                        f"the output folder {folders[inner]} lies in another, {folders[outer]}; "
                        "choose one beside it"
                    )


def clear_earlier(outputs: Sequence[Output], *, fsync: bool) -> None:
    """Removes what earlier merges have left in the folders, so that a run that is interrupted
    finds none of it when it goes on. A saved plan stays.

    To be called after check_outputs.

    Raises:
        LockedError: another process is writing one of them.
        OSError: something cannot be removed.
    """
    folders = [each.folder for each in outputs if _is_used(each.folder)]
    with ExitStack() as locks:
        for folder in folders:  # all of them, before the first loses anything
            locks.callback(OutputLock(folder).release)
        for folder in folders:
            clear_output_folder(folder, fsync=fsync)


def _is_used(folder: Path) -> bool:
    """Whether a folder holds more than a saved plan."""
    if not folder.is_dir():
        return False
    return is_unfinished(folder) or any(entry.name != OWN_FOLDER for entry in folder.iterdir())
