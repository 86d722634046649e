"""Plans that were saved: read again, and held against the inputs as they are now."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from ..adapters import open_model, split_reference
from ..checkpoint import Checkpoint
from ..checkpoint.fused import is_rows_of
from ..checkpoint.header import garbage_collector_paused
from ..checkpoint.hub_reference import SCHEME, is_commit
from ..errors import InputError, brief
from ..graph.compile import ResolvedTensor
from ..graph.export import graph_from_json
from ..graph.graph import Graph
from ..graph.node import Read
from ..graph.verify import IllegalGraphError, verify_graph
from ..methods import METHODS
from ..output.layout import OutputTensor, lay_out
from ..recipe import Recipe, parse_recipe, part_named
from ..recipe.signature import Scalar
from ..version import __version__
from .blocks import DeviceClass
from .download import fetch_tokenizers
from .likeness import kinds_of
from .needs import execution_of, fetch_needs_of, memory_of
from .network import Network
from .plan import PLAN_FORMAT, Plan, torch_version
from .planning import sidecars_of, signatures
from .resources import Resources
from .stages import tensor_tasks
from .tokenizer import plan_tokenizer


def load_plan(path: Path | str, resources: Resources | None = None) -> Plan:
    """Reads a saved plan and checks that its inputs are what they were.

    Raises:
        InputError: it is not a plan of this version, or an input has changed since.
        DoesNotFitError: the memory does not suffice.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a saved plan: {error}") from error
    if isinstance(document, dict) and "split" in document and "graph" not in document:
        from .unfinished import plan_again

        return plan_again(document, Path(path), resources or Resources())
    if not isinstance(document, dict) or document.get("format") != PLAN_FORMAT:
        raise InputError(f"{path} is not a plan that this version of lazymerge can read")
    if document.get("lazymerge") != __version__:
        raise InputError(
            f"{path} was made by lazymerge {str(document.get('lazymerge'))[:40]}, this is "
            f"{__version__}; plan the recipe again"
        )
    if document.get("torch") != torch_version():
        raise InputError(
            f"{path} was made with torch {str(document.get('torch'))[:40]}, this is "
            f"{torch_version()}; plan the recipe again"
        )
    try:
        with garbage_collector_paused():
            return _plan_from(document, resources or Resources(), str(path))
    except (
        AttributeError,  # one kind of JSON value where another belongs
        IllegalGraphError,
        IndexError,
        KeyError,
        OverflowError,
        TypeError,
        ValueError,
    ) as error:
        raise InputError(f"{path} is damaged ({brief(error)}); plan the recipe again") from error


def _plan_from(document: dict[str, Any], resources: Resources, path: str) -> Plan:
    recipe = recipe_again(document["recipe"])
    checkpoints = {}
    for model in document["models"]:
        checkpoint = open_model(_reference_again(model))
        parts = [model, *([model["adapter"]] if "adapter" in model else [])]
        for part, (folder, files) in zip(parts, checkpoint.files_by_folder, strict=True):
            now = [file.as_dict() for file in files]
            if folder != part["folder"] or now != part["files"]:
                reference = str(model["reference"])[:MOST_PATH]
                raise InputError(
                    f"model {reference} is not what it was when {path} was made "
                    f"({_first_difference(part, folder, now)}); plan the recipe again"
                )
        checkpoints[model["reference"]] = replace(checkpoint, reference=model["reference"])
    made_for = document["device"]
    if made_for not in get_args(DeviceClass):
        raise ValueError(f"device {made_for!r}")
    if resources.device not in (None, made_for):
        raise InputError(
            f"{path} was made for --device {made_for}, and the last bits of its output depend on "
            f"that; run it there, or plan the recipe again with --device {resources.device}"
        )
    streams = resources.streams or document.get("streams") is True
    resources = replace(
        resources,
        device=made_for,
        streams=streams,
        network=network_again(resources.network, document),
    )
    graph = graph_from_json(document["graph"])
    verify_graph(graph)
    _check_reads(graph, checkpoints, path)
    output = document["output"]
    _check_sidecars(output, checkpoints[recipe.main_model], path)
    if recipe.asks_for_tokenizer:
        fetch_tokenizers(checkpoints.values())
    tokenizer = plan_tokenizer(recipe, checkpoints)
    if (tokenizer and tokenizer.as_dict()) != output.get("tokenizer"):
        raise InputError(
            f"the tokenizer is not what it was when {path} was made; plan the recipe again"
        )
    max_shard_bytes = _of_kind(output["max_shard_bytes"], int)
    tasks = tensor_tasks(graph)
    kinds = kinds_of(graph, tasks)
    execution = execution_of(resources, recipe, checkpoints)
    shards = lay_out(
        [OutputTensor(w.name, w.dtype, w.shape) for w in graph.writes], max_shard_bytes
    )
    plan = Plan(
        recipe=recipe,
        checkpoints=checkpoints,
        graph=graph,
        tensors=_resolved_tensors(
            document["tensors"], graph, {*checkpoints, *(str(m.name) for m in recipe.merges)}
        ),
        notices=tuple(_of_kind(notice, str) for notice in document["notices"]),
        shards=shards,
        max_shard_bytes=max_shard_bytes,
        memory=memory_of(
            graph,
            kinds,
            resources,
            execution,
            tokenizer,
            fetch_needs_of(graph, tasks, checkpoints, execution),
        ),
        config=_of_kind(output["config"], dict, type(None)),
        sidecar_folder=output["sidecar_folder"],
        sidecars=tuple(output["sidecars"]),
        execution=execution,
        tokenizer=tokenizer,
    )
    plan.__dict__.update(tasks=tasks, kinds=kinds)
    if plan.fingerprint != document["fingerprint"]:
        raise InputError(f"{path} was altered after it was made; plan the recipe again")
    return plan


def network_again(network: Network, document: Mapping[str, Any]) -> Network:
    """What was agreed to when a plan or an output was begun is agreed to now."""
    whole_files = network.whole_files or document.get("whole_files") is True
    return replace(network, whole_files=whole_files)


def recipe_again(saved: Mapping[str, Any]) -> Recipe:
    """The recipe that a plan or an output was made by.

    saved: as Plan.recipe_dict gives it.

    Raises:
        RecipeError: a method is not known any more.
        InputError: it has no such part.
        AttributeError, KeyError, TypeError: the document is damaged.
    """
    text, path = _of_kind(saved["text"], str), _of_kind(saved["path"], str)
    seed, part = _of_kind(saved["seed"], int), saved.get("part")
    name = None if part is None else _of_kind(part["name"], str)
    recipe = parse_recipe(text, path, signatures()).with_seed(seed)
    return recipe if name is None else part_named(recipe, name)


def _check_reads(graph: Graph, checkpoints: Mapping[str, Checkpoint], path: str) -> None:
    """Every Read of a loaded graph must be a tensor of its models, or some of its rows: a plan
    that someone has edited must not reach other files.

    Raises:
        InputError: one is not.
    """
    known = {
        (folder, part.file, part.name): part
        for checkpoint in checkpoints.values()
        for tensor in checkpoint.tensors.values()
        for folder, part in tensor.parts(checkpoint.folder)
    }
    for node in graph:
        if not isinstance(node, Read):
            continue
        tensor = known.get((node.folder, node.tensor.file, node.tensor.name))
        if tensor is None or not is_rows_of(node.tensor, tensor):
            raise InputError(
                f"{path} reads {node.tensor.name} from {node.folder} where there is no such "
                "tensor; plan the recipe again"
            )


def _resolved_tensors(
    entries: list[dict[str, Any]], graph: Graph, known: Set[str]
) -> tuple[ResolvedTensor, ...]:
    """What a saved plan tells people of its tensors. Nothing is computed from it, so it is no part
    of the fingerprint; what is wrong with it must show here and not when it is printed.

    Raises:
        TypeError, ValueError: it is not of the kind it must be.
    """

    def scalars(values: object) -> dict[str, Scalar | None]:
        checked: dict[str, Scalar | None] = _of_kind(values, dict)
        for value in checked.values():
            _of_kind(value, bool, int, float, str, type(None))
        return checked

    tensors = []
    for entry in entries:
        by_model = {model: scalars(v) for model, v in _of_kind(entry["models"], dict).items()}
        if not by_model.keys() <= known or entry["method"] not in (*METHODS, "copy"):
            raise ValueError(f"tensor {entry['name']}")
        tensors.append(
            ResolvedTensor(entry["name"], entry["method"], scalars(entry["parameters"]), by_model)
        )
    if [tensor.name for tensor in tensors] != [write.name for write in graph.writes]:
        raise ValueError("its tensors are not those of its graph")
    return tuple(tensors)


MOST_PATH = 4_096
"""Characters of a path that a message shows; where it is from may hold megabytes."""


def _of_kind(value: Any, *kinds: type) -> Any:
    """The value, if it is of one of these kinds.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, kinds):
        raise TypeError(f"{value!r} is no {kinds[0].__name__}")
    return value


def _check_sidecars(output: Mapping[str, Any], source: Checkpoint, path: str) -> None:
    """The files that are copied must be the model's own: a plan that someone has edited must
    neither read nor write elsewhere.

    Raises:
        InputError: one is not.
    """
    known = sidecars_of(source, source.folder, None)
    other = [file for file in output["sidecars"] if file not in known]
    if output["sidecar_folder"] != source.folder or other:
        what = (
            f"{str(other[0])[:MOST_PATH]!r}, which is not there"
            if other
            else "files from another folder"
        )
        raise InputError(
            f"{path} copies {what}; the model {source.reference} has the sidecar files "
            f"{', '.join(known) or '(none)'}: plan the recipe again"
        )


def _reference_again(model: Mapping[str, Any]) -> str:
    """What opens a model as it was when a plan or an output was begun: of the Hub, its commit.

    Raises:
        ValueError: it names no commit.
    """
    reference: str = _of_kind(model["reference"], str)
    adapter = model.get("adapter")
    if model.get("hub") is None and (adapter is None or adapter.get("hub") is None):
        return reference
    own, with_adapter = split_reference(reference)
    again = _of_hub(model) or own
    if adapter is None:
        return again
    return f"{again}+{_of_hub(adapter) or with_adapter}"


def _of_hub(part: Mapping[str, Any]) -> str | None:
    """A model or an adapter of the Hub at its commit; None if it is a local one."""
    hub = part.get("hub")
    if hub is None:
        return None
    commit = _of_kind(hub["commit"], str)
    if not is_commit(commit):
        raise ValueError(f"commit {commit!r}")
    return f"{SCHEME}{_of_kind(hub['repository'], str)}@{commit}"


def _first_difference(model: dict[str, Any], folder: str, now: list[dict[str, Any]]) -> str:
    if model["folder"] != folder:
        return f"it was at {str(model['folder'])[:MOST_PATH]}, it is at {folder}"
    then = {file["path"]: file for file in model["files"]}
    for file in now:
        if then.get(file["path"]) != file:
            return f"file {file['path']} has changed"
    return "files are missing"
