"""Unfinished outputs: what they were being made from, and the same plan made again.

    OUT/.lazymerge/merge.json     recipe, options, inputs and fingerprint; the manifest's first half

To go on, the recipe is planned anew from the inputs as they are now. If that gives the fingerprint
that stands there, it is the same merge and every byte will be what it would have been; if not, the
first thing that differs is named.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import InputError, LazymergeError, RecipeError, brief
from ..output.checksum import file_checksum
from ..output.folder import is_unfinished
from ..output.manifest import MANIFEST_NAME, MERGE_PATH, count, read_document
from ..output.store.address import StoreAddress
from ..recipe import Recipe
from ..recipe.tokenizer import BASE, UNION
from ..version import __version__
from .plan import Plan, Split, torch_version
from .planning import make_plan
from .resources import Resources
from .saved_plans import MOST_PATH, network_again, recipe_again


def beginning_of_manifest(plan: Plan) -> dict[str, Any]:
    """What is known of an output before its first byte."""
    return {
        "lazymerge": __version__,
        "torch": torch_version(),
        "fingerprint": plan.fingerprint,
        "recipe": plan.recipe_dict(),
        "models": [
            {**model, "path": plan.checkpoints[model["reference"]].path}
            for model in plan.models_dict()
        ],
        "device": plan.execution.device,
        "output": {
            "tensors": len(plan.tensors),
            "bytes": sum(tensor.size_bytes for s in plan.shards for tensor in s.tensors),
            "max_shard_bytes": plan.max_shard_bytes,
        },
        **({"tokenizer": plan.tokenizer.as_dict()} if plan.tokenizer else {}),
        **({"split": asdict(plan.split)} if plan.split else {}),
        **({"streams": True} if plan.execution.streams else {}),
        **({"whole_files": True} if plan.execution.network.whole_files else {}),
    }


def plan_again(document: Mapping[str, Any], where: Path | str, resources: Resources) -> Plan:
    """The plan that an output was made by, or was being made by.

    document: as beginning_of_manifest gives it. where: the file that it stands in.

    Raises:
        InputError: the document is damaged, an input cannot be opened, or the plan is not the same
            as then; what differs is named.
        DoesNotFitError: the memory does not suffice.
    """
    try:
        saved = document["recipe"]
        paths = {model["reference"]: model["path"] for model in document["models"]}
        text, path, seed = saved["text"], saved["path"], saved["seed"]
        part = saved.get("part")
        name = path if part is None else part["name"]
        device, version, torch = document["device"], document["lazymerge"], document["torch"]
        fingerprint = document["fingerprint"]
        max_shard_bytes = count(document["output"]["max_shard_bytes"])
        split = None if document.get("split") is None else Split(**document["split"])
        strings = [text, path, name, device, version, torch, fingerprint, *paths, *paths.values()]
        if not all(isinstance(value, str) for value in strings):
            raise TypeError("text expected")
        if type(seed) is not int:
            raise TypeError("number expected")
        if split is not None and (type(split.number), type(split.count)) != (int, int):
            raise TypeError("number expected")
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{where} is damaged ({brief(error)})") from error
    if version != __version__:
        raise InputError(
            f"{where} was written by lazymerge {version[:40]}, this is {__version__}: another "
            "version may compute other bytes"
        )
    if torch != torch_version():
        raise InputError(
            f"{where} was written with torch {torch[:40]}, this is {torch_version()}: another "
            "version may compute other bytes"
        )
    if resources.device not in (None, device):
        raise InputError(
            f"it is made with --device {device[:40]}, and the last bits depend on that; "
            f"leave --device {resources.device} out"
        )
    changed = _first_changed_file(document["models"])
    if changed is not None:
        raise InputError(changed)
    recipe = recipe_again(saved)
    paths = _tokenizer_path(recipe, document, where) | paths
    plan = make_plan(
        recipe,
        replace(
            resources,
            device=device,
            streams=resources.streams or document.get("streams") is True,
            network=network_again(resources.network, document),
        ),
        max_shard_bytes=max_shard_bytes,
        truncate_embeddings=True,  # changes nothing where rows agree, and else it was given
        paths=paths,
    )
    if split is not None:
        from .splitting import part_of

        plan = part_of(plan, replace(split, whole=plan.fingerprint))
    if plan.fingerprint != fingerprint:
        raise InputError(difference(document, plan))
    return plan


def plan_of_unfinished(output: Path | str, resources: Resources | None = None) -> Plan:
    """The plan of an unfinished output, to be run into it again.

    Raises:
        InputError: there is nothing unfinished, or something has changed since it was begun; the
            message names it.
        DoesNotFitError: the memory does not suffice.
    """
    folder = Path(output)
    if not is_unfinished(folder):
        state = (
            "is complete; lazymerge verify checks it"
            if (folder / MANIFEST_NAME).is_file()
            else f"holds no unfinished merge (there is no {MERGE_PATH} in it)"
        )
        raise InputError(f"{output} {state}")
    path = folder / MERGE_PATH
    return plan_to_resume(folder, path, lambda: read_document(path), resources or Resources())


def plan_to_resume(
    output: Path | StoreAddress,
    where: Path | str,
    read: Callable[[], Mapping[str, Any]],
    resources: Resources,
) -> Plan:
    """The plan that an unfinished output was begun by.

    read: gives what the output says of what it is made from. where: that it says so.

    Raises as plan_of_unfinished.
    """
    document: Mapping[str, Any] = {}
    try:
        document = read()
        gathers = document.get("statistics") is True
        return plan_again(document, where, replace(resources, gathers=gathers))
    except InputError as error:
        own = (
            "\na method of your own needs --plugin again" if isinstance(error, RecipeError) else ""
        )
        raise InputError(
            f"{output} cannot be resumed: {error}{own}\nto begin anew: "
            f"{run_again(document, output)} --overwrite"
        ) from error


def check_is_same_merge(plan: Plan, output: Path) -> None:
    """Checks that an unfinished output was begun by the same plan.

    Raises:
        InputError: it was not; the message names the difference.
    """
    anew = "give --overwrite to throw it away and begin anew, or choose another folder"
    try:
        document = read_document(output / MERGE_PATH)
    except InputError as error:
        raise InputError(
            f"{output} holds an unfinished merge, and nothing says of what: {error}\n{anew}"
        ) from error
    check_is_of_plan(plan, document, output)


def check_is_of_plan(plan: Plan, document: Mapping[str, Any], output: Path | StoreAddress) -> None:
    """The same. document: what the output says of what it is made from."""
    kind = "folder" if isinstance(output, Path) else "prefix"
    anew = f"give --overwrite to throw it away and begin anew, or choose another {kind}"
    remedy = f"go on with what was begun: lazymerge resume {shlex.quote(str(output))}; or {anew}"
    if document.get("fingerprint") != plan.fingerprint:
        if _first_changed_file(document.get("models")) is not None:  # that cannot be gone on with
            remedy = anew
        raise InputError(
            f"{output} holds an unfinished merge, and not of this plan: "
            f"{difference(document, plan)}\n{remedy}"
        )


def was_begun_with_statistics(output: Path) -> bool:
    """Whether an unfinished output was begun with --stats: it is then gone on with in the same way.

    Raises:
        InputError: its document is damaged.
    """
    return read_document(output / MERGE_PATH).get("statistics") is True


def run_again(document: Mapping[str, Any], output: Path | StoreAddress) -> str:
    """The command that made an output, without options.

    document: its manifest, or the beginning of one.
    """
    recipe = document.get("recipe")
    path = recipe.get("path") if isinstance(recipe, dict) else None
    name = shlex.quote(path[:1000]) if isinstance(path, str) else "RECIPE"
    part = recipe.get("part") if isinstance(recipe, dict) else None
    if isinstance(part, dict):
        asked = shlex.quote(f"{str(part.get('name'))[:1000]}={output}")
        return f"lazymerge run {name} -o OUT --write-intermediate {asked}"
    return f"lazymerge run {name} -o {shlex.quote(str(output))}"


def difference(document: Mapping[str, Any], plan: Plan) -> str:
    """The first thing in which a plan differs from what an output was begun with."""
    then: Any = document
    now = beginning_of_manifest(plan)
    try:
        for software in ("lazymerge", "torch"):
            if then[software] != now[software]:
                before = str(then[software])[:40]
                return f"it was begun by {software} {before}, this is {now[software]}"
        found = _recipe_difference(then["recipe"]["text"], now["recipe"]["text"])
        if found is not None:
            return found
        part, part_now = (_part_name(each["recipe"]) for each in (then, now))
        if part != part_now:
            return f"it was {part}, now it is {part_now}"
        if then["recipe"]["seed"] != now["recipe"]["seed"]:
            before = str(then["recipe"]["seed"])[:40]
            return f"its seed was {before}, now it is {now['recipe']['seed']}"
        if then["device"] != now["device"]:
            return f"it was begun with --device {str(then['device'])[:40]}, not {now['device']}"
        found = _model_difference(then["models"], now["models"])
        if found is not None:
            return found
        found = _tokenizer_difference(then.get("tokenizer"), now.get("tokenizer"))
        if found is not None:
            return found
        if then["output"] != now["output"]:
            return f"its output was {_output(then['output'])}, now it is {_output(now['output'])}"
    except (AttributeError, KeyError, TypeError) as error:
        return f"its {MERGE_PATH} is damaged ({brief(error)})"
    return "the operations differ, though the recipe does not: has a plugin changed?"


def _part_name(recipe: Mapping[str, Any]) -> str:
    """What of a recipe is written, in words."""
    part = recipe.get("part")
    return (
        "the merge that its recipe leads to"
        if part is None
        else f"its merge {str(part['name'])[:1000]!r}"
    )


def _output(facts: Mapping[str, Any]) -> str:
    tensors, size, most = (count(facts[key]) for key in ("tensors", "bytes", "max_shard_bytes"))
    return f"{tensors} tensors of {size:,} bytes in shards of at most {most:,}"


_COMMENT = re.compile(r"(?<!\S)#.*$")


def _recipe_difference(before: str, after: str) -> str | None:
    """The first line in which two recipes differ by more than comments and empty lines."""
    then, now = _lines(before), _lines(after)
    number = next(
        (n for n, (a, b) in enumerate(zip(then, now, strict=False)) if a[1] != b[1]),
        min(len(then), len(now)),
    )
    if number == len(then) == len(now):
        return None
    if number == len(then):
        what = f"line {now[number][0]} is new: {now[number][1].strip()[:1000]!r}"
    elif number == len(now):
        what = f"line {then[number][0]} is gone: {then[number][1].strip()[:1000]!r}"
    else:
        place, line = now[number]
        before = then[number][1].strip()[:1000]
        what = f"line {place} was {before!r}, now it is {line.strip()[:1000]!r}"
    return f"the recipe has changed: {what}"


def _lines(text: str) -> list[tuple[int, str]]:
    """The lines that say something, with their numbers."""
    lines = (
        (number, _COMMENT.sub("", line).rstrip())
        for number, line in enumerate(text.splitlines(), 1)
    )
    return [(number, line) for number, line in lines if line]


def _model_difference(then: list[Any], now: list[Any]) -> str | None:
    before = {model["reference"]: model for model in then}
    for model in now:
        reference = model["reference"]
        if reference not in before:
            return f"model {reference} was not part of it"
        earlier = before[reference]
        if ("adapter" in earlier) != ("adapter" in model):
            return f"model {reference} is read with an adapter now, or was then"
        pairs = zip(_with_adapters([earlier]), _with_adapters([model]), strict=True)
        for one, other in pairs:
            found = _files_difference(reference, one, other)
            if found is not None:
                return found
    return None


def _with_adapters(models: list[Any]) -> list[Any]:
    """Models and their adapters, each with a folder and files."""
    parts = []
    for model in models:
        parts.append(model)
        if "adapter" in model:
            parts.append(model["adapter"])
    return parts


def _files_difference(
    reference: str, earlier: Mapping[str, Any], now: Mapping[str, Any]
) -> str | None:
    if earlier["folder"] != now["folder"]:
        before = str(earlier["folder"])[:MOST_PATH]
        return f"model {reference} was at {before}, it is at {now['folder']}"
    files = {file["path"]: file for file in earlier["files"]}
    for file in now["files"]:
        known = files.get(file["path"])
        if known is None:
            return f"model {reference} has a file {file['path']} that it had not"
        for key, word in (
            ("size_bytes", "size"),
            ("header_digest", "header"),
            ("modified_ns", "time of modification"),
            ("pin", "version"),
        ):
            if known.get(key) != file.get(key):
                path = Path(now["folder"], file["path"])
                return f"{path} has changed: its {word} is not what it was"
    if len(files) != len(now["files"]):
        return f"model {reference} lacks files that it had"
    return None


def _tokenizer_path(
    recipe: Recipe, document: Mapping[str, Any], where: Path | str
) -> dict[str, str]:
    """Where the tokenizer's source was, if it is not a model of the recipe.

    Raises:
        InputError: the document is damaged.
    """
    paths = {}
    for merge in (*recipe.merges, recipe):
        if merge.tokenizer is None or merge.tokenizer.source in (UNION, BASE):
            continue
        try:
            entry = document["tokenizer"]
            folder = (entry if merge is recipe else entry["merges"][merge.name])["folder"]
            if not isinstance(folder, str):
                raise TypeError("text expected")
        except (KeyError, TypeError) as error:
            raise InputError(f"{where} is damaged ({brief(error)})") from error
        paths[merge.tokenizer.source] = folder
    return paths


def _tokenizer_difference(then: Any, now: Any) -> str | None:
    """What is not as it was of the tokenizer that is written."""
    before, after = ((each or {"folder": None, "files": {}}) for each in (then, now))
    if before["folder"] != after["folder"]:
        folder = str(before["folder"])[:MOST_PATH]
        return f"its tokenizer was made from {folder}, now from {after['folder']}"
    for name in sorted({*before["files"], *after["files"]}):
        if before["files"].get(name) != after["files"].get(name):
            return f"a tokenizer has changed: {str(name)[:200]} of the output is not what it was"
    if before.get("rows") != after.get("rows") or before.get("merges") != after.get("merges"):
        return "a tokenizer has changed: its tokens have other numbers than they had"
    return None


def _first_changed_file(models: Any) -> str | None:
    """What has changed of the models' files, as far as a look at the folders shows."""
    try:
        for part in _with_adapters(models):
            for file in part["files"]:
                if file["modified_ns"] is None:
                    continue  # of the Hub: its commit says what it is, and it can be fetched again
                path = Path(part["folder"], file["path"])
                try:
                    now = path.stat()
                except OSError as error:
                    return f"{str(path)[:MOST_PATH]} cannot be read any more: {error.strerror}"
                if now.st_size != file["size_bytes"]:
                    return f"{path} has changed: its size is not what it was"
                if now.st_mtime_ns != file["modified_ns"]:
                    return f"{path} has changed: its time of modification is not what it was"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"what stands there of the models is damaged ({brief(error)})"
    return None


def content_hashes(checkpoints: Mapping[str, Checkpoint]) -> dict[str, str]:
    """The xxh3_128 of every input file's whole content, by path.

    Raises:
        LazymergeError: one cannot be read.
    """
    hashes: dict[str, str] = {}
    for checkpoint in checkpoints.values():
        for folder, file in (
            (folder, file) for folder, files in checkpoint.files_by_folder for file in files
        ):
            path = os.path.join(folder, file.path)
            if path in hashes or (file.modified_ns is None and not os.path.exists(path)):
                continue  # of the Hub, and not fetched: its commit says what it is
            try:
                hashes[path] = file_checksum(Path(path))
            except OSError as error:
                raise LazymergeError(f"reading {path}: {error.strerror}") from error
    return hashes


def check_hashes(then: object, now: Mapping[str, str], where: str) -> None:
    """Checks that files have the contents that they had.

    then: what stands in an output's document, `where`.

    Raises:
        InputError: one has not.
    """
    if not isinstance(then, dict):
        raise InputError(
            f"input_checksums in {where} is no mapping: the file is damaged; give --overwrite to "
            "begin anew"
        )
    for path, content in now.items():
        if path in then and then[path] != content:
            raise InputError(
                f"{path} has changed since the merge was begun: its content is not what it was, "
                "though size and time of modification are; give --overwrite to begin anew"
            )
