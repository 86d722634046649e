"""The plan: everything a run needs to know and a person may want to know, before it starts.

A plan is made from headers alone and is a value: it can be printed, saved, loaded on another day
and run. `run` consumes a plan and nothing else.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from hashlib import blake2b
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, TypeVar, get_args

from ..adapters import is_local, open_model, split_reference
from ..architecture import LayerStacks, find_layer_stacks
from ..architecture.layouts import example, renamed
from ..checkpoint import Checkpoint
from ..checkpoint.at_once import requesting
from ..checkpoint.fused import is_rows_of, taken_apart
from ..checkpoint.header import garbage_collector_paused
from ..checkpoint.hub_reference import SCHEME, is_commit, local_path
from ..checkpoint.remote_reference import is_url
from ..checkpoint.tensor import DTYPES, Adapter
from ..errors import InputError, InputErrors, brief
from ..graph.compile import ResolvedTensor, compile_recipe, config_of, seed_of_part
from ..graph.export import graph_from_json, graph_to_json
from ..graph.graph import Graph
from ..graph.node import Read
from ..graph.verify import IllegalGraphError, verify_graph
from ..methods import METHODS
from ..methods.plugins import load_installed
from ..output.layout import OutputTensor, Shard, lay_out
from ..output.manifest import MANIFEST_NAME
from ..output.sidecars import copied_files, sidecar_files
from ..output.target import write_target
from ..recipe import Recipe, Signature, load_recipe, parse_recipe, part_named
from ..recipe.signature import Scalar
from ..sizes import format_bytes, format_count, format_memory
from ..version import __version__
from ..vocabulary.files import is_tokenizer_file
from .blocks import DeviceClass
from .device.memory import DEFAULT_WORKERS, USED_SHARE, default_device_limit_bytes
from .download import MissingFile, fetch_tokenizers, missing_files
from .execution import DEFAULT_READ_MODE, Execution, Kernels, ReadMode, default_kernels
from .likeness import Kind, kinds_of
from .memory import MemoryPlan, default_limit_bytes, default_workers, plan_memory
from .needed_ranges import FetchNeeds, FileChunks, chunks_of, fetch_needs, path_of
from .network import Network
from .remote_facts import CacheState, cache_state, network_facts
from .remote_inputs import Distant, check_ranges, is_held_whole, remote_inputs
from .stages import TensorTask, bytes_read, expected_passes, tensor_tasks
from .store.memory import StoreNeeds, store_needs
from .tokenizer import TokenizerPlan, plan_tokenizer

MODELS_AT_ONCE = 4
"""That are opened, where some lie elsewhere; of each, several files are asked for at a time."""

DEFAULT_MAX_SHARD_BYTES = 5_000_000_000
PLAN_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run may use. None: the default.

    limit_bytes: bound of the peak resident set.
    workers: threads that compute.
    read_mode: how inputs are read; the output does not depend on it.
    kernels: who computes, on the processor; nor on this.
    device: the class of device that computes; None: the one that a saved plan was made for, else
        the processor. The output depends on it, within an ulp.
    vram_limit_bytes: bound of what is allocated on an accelerator.
    gathers: whether statistics of what is written are gathered; nor does it depend on this.
    streams: models of the Hub are read over the network while they are merged, not downloaded.
    stores: the output goes into an object store, and what is on its way there is memory.
    network: how inputs that lie elsewhere are fetched.
    """

    limit_bytes: int | None = None
    workers: int | None = None
    read_mode: ReadMode = DEFAULT_READ_MODE
    kernels: Kernels | None = None
    device: DeviceClass | None = None
    vram_limit_bytes: int | None = None
    gathers: bool = False
    streams: bool = False
    stores: bool = False
    network: Network = field(default_factory=Network)

    @property
    def execution(self) -> Execution:
        """How a run reads and computes.

        Raises:
            InputError: there is no such device, or --vram without one.
        """
        device = self.device or "cpu"
        if device not in get_args(DeviceClass):
            raise InputError(
                f"there is no device {device!r}, only {', '.join(get_args(DeviceClass))}"
            )
        if device == "cpu" and self.vram_limit_bytes is not None:
            raise InputError(
                "--vram bounds the memory of a GPU: give --device cuda too, or neither"
            )
        return Execution(
            read_mode=self.read_mode,
            kernels=self.kernels or default_kernels(),
            device=device,
            vram_limit_bytes=self.vram_limit_bytes,
            streams=self.streams,
            stores=self.stores,
            network=self.network,
        )


@dataclass(frozen=True, slots=True)
class Split:
    """Which part of a merge a plan is (splitting.py).

    number: 1 to count. whole: the fingerprint of the merge that it is a part of.
    """

    number: int
    count: int
    whole: str


@dataclass(frozen=True)
class Plan:
    """A merge, ready to run.

    recipe: as parsed.
    checkpoints: by model reference; base first where it is not listed.
    graph: the operations.
    tensors: how each output tensor comes about, in the order of the graph's writes.
    notices: what a person should know before running it.
    shards: the output files and every tensor's place in them.
    max_shard_bytes: of tensor data in each, where a tensor alone is not larger.
    memory: what the run may and will occupy.
    config: the output's config.json, None where no model has one.
    sidecars: files copied from `sidecar_folder`.
    execution: how the run reads and computes.
    tokenizer: the output's, where the recipe asks for one; then none of its files is a sidecar.
    split: which part of a merge it is; None: the whole.
    """

    recipe: Recipe
    checkpoints: Mapping[str, Checkpoint]
    graph: Graph
    tensors: tuple[ResolvedTensor, ...]
    notices: tuple[str, ...]
    shards: tuple[Shard, ...]
    max_shard_bytes: int
    memory: MemoryPlan
    config: Mapping[str, object] | None
    sidecar_folder: str
    sidecars: tuple[str, ...]
    execution: Execution
    tokenizer: TokenizerPlan | None = None
    split: Split | None = None

    @property
    def resources(self) -> Resources:
        """What it was planned for."""
        return Resources(
            limit_bytes=self.memory.limit_bytes,
            workers=self.memory.workers,
            read_mode=self.execution.read_mode,
            kernels=self.execution.kernels,
            device=self.execution.device,
            vram_limit_bytes=self.execution.vram_limit_bytes,
            gathers=self.execution.gathers,
            streams=self.execution.streams,
            stores=self.execution.stores,
            network=self.execution.network,
        )

    @property
    def read_mode(self) -> ReadMode:
        """How inputs are read."""
        return self.execution.read_mode

    @cached_property
    def tasks(self) -> tuple[TensorTask, ...]:
        """The work of every output tensor, in the order of the output."""
        return tensor_tasks(self.graph)

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """The tasks by kind: those of one kind occupy, read and write the same."""
        return kinds_of(self.graph, self.tasks)

    @cached_property
    def stacks(self) -> LayerStacks:
        """The output's layer stacks."""
        return find_layer_stacks(tensor.name for tensor in self.tensors)

    @cached_property
    def bytes_read(self) -> int:
        """Input bytes of all expected passes."""
        return sum(kind.count * bytes_read(self.graph, kind.first) for kind in self.kinds)

    @cached_property
    def bytes_written(self) -> int:
        """Size of all shards."""
        return sum(shard.size_bytes for shard in self.shards)

    @cached_property
    def passes(self) -> dict[int, int]:
        """Number of output tensors by number of expected passes."""
        passes: Counter[int] = Counter()
        for kind in self.kinds:
            passes[expected_passes(kind.first)] += kind.count
        return dict(sorted(passes.items()))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what the output's bytes depend on: operations, inputs, layout, versions of
        lazymerge and torch, class of device.

        Neither the memory limit nor the number of workers is part of it.
        """
        content: dict[str, object] = {
            "version": __version__,
            "torch": torch_version(),
            "device": self.execution.device,
            "writes": [write.id for write in self.graph.writes],
            "shards": [(shard.file, shard.size_bytes) for shard in self.shards],
            "inputs": [
                [folder, [file.as_dict() for file in files]]
                for checkpoint in self.checkpoints.values()
                for folder, files in checkpoint.files_by_folder
            ],
        }
        if self.tokenizer is not None:
            content["tokenizer"] = self.tokenizer.digests
        if self.split is not None:
            content["split"] = asdict(self.split)
        return blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()

    @property
    def beside_folder(self) -> str:
        """Where the files that are copied are on this machine: `sidecar_folder`, unless that is an
        address."""
        for checkpoint in self.checkpoints.values():
            if checkpoint.folder == self.sidecar_folder:
                return checkpoint.local_folder
        return self.sidecar_folder

    def facts(self) -> list[tuple[str, str]]:
        """What will happen, as (label, sentence) pairs for people."""
        shares: Counter[str] = Counter()
        for write in self.graph.writes:
            shares[write.dtype] += write.element_count * DTYPES[write.dtype].item_bytes
        elements = sum(write.element_count for write in self.graph.writes)
        beside = ["config.json"] if self.config is not None else []
        beside += sorted([*self.sidecars, *(self.tokenizer.files if self.tokenizer else ())])
        memory = self.memory
        return [
            (
                "output",
                f"{_counted(len(self.tensors), 'tensor')}, {format_count(elements)} parameters, "
                f"{dtype_text(dict(shares.most_common()))}, {format_bytes(self.bytes_written)} "
                f"in {_counted(len(self.shards), 'shard')}",
            ),
            *self._download_facts(),
            *network_facts(
                self.remote_inputs,
                self.chunks_to_fetch,
                self.memory,
                self.execution.network,
                self.cache_state,
            ),
            ("beside it", ", ".join([*beside, "README.md", MANIFEST_NAME])),
            (
                "operations",
                ", ".join(f"{count} {kind}" for kind, count in self.graph.count_by_kind().items()),
            ),
            (
                "passes",
                ", ".join(
                    f"{passes} over {_counted(tensors, 'tensor')}"
                    for passes, tensors in self.passes.items()
                ),
            ),
            (
                "data",
                f"reads {format_bytes(self.bytes_read)}, writes {format_bytes(self.bytes_written)}",
            ),
            (
                "memory",
                f"{format_memory(memory.projected_bytes)} peak with "
                f"{_counted(memory.workers, 'worker')}, limit {format_memory(memory.limit_bytes)}",
            ),
            *self._device_facts(),
        ]

    @property
    def missing_files(self) -> tuple[MissingFile, ...]:
        """What is not in the Hub's cache yet, of what a run needs."""
        missing = missing_files(self.checkpoints.values(), self.sidecar_folder, self.sidecars)
        streamed = self.remote_inputs
        return tuple(
            file for file in missing if f"{file.source.folder}/{file.name}" not in streamed
        )

    def _download_facts(self) -> list[tuple[str, str]]:
        missing = self.missing_files
        if not missing:
            return []
        size = format_bytes(sum(file.size_bytes for file in missing))
        models = ", ".join(dict.fromkeys(file.source.repository for file in missing))
        fact = (
            f"{size} in {_counted(len(missing), 'file')} of {models} (--models lists them; with "
            "--stream they are read over the network instead)"
        )
        return [("download", fact)]

    def _downloads(self) -> list[dict[str, Any]]:
        return [
            {"model": file.source.repository, "file": file.name, "size_bytes": file.size_bytes}
            for file in self.missing_files
        ]

    @cached_property
    def remote_inputs(self) -> dict[str, Distant]:
        """The input files that are read over the network, by path."""
        return remote_inputs(self.checkpoints.values(), streams=self.execution.streams)

    @cached_property
    def bytes_to_fetch(self) -> int:
        """Of input files that are read over the network, each byte once."""
        return sum(chunks.size_bytes for chunks in self.chunks_to_fetch.values())

    @property
    def chunks_to_fetch(self) -> dict[str, FileChunks]:
        """What of every file is read over the network, by path."""
        inputs = self.remote_inputs
        reads = (node for node in self.graph if isinstance(node, Read))
        if not inputs:
            return {}
        network = self.execution.network
        return chunks_of((read for read in reads if path_of(read) in inputs), network.gap_bytes)

    @cached_property
    def cache_state(self) -> CacheState | None:
        """What the cache has of what is read over the network; None: there is none, of either."""
        network = self.execution.network
        return cache_state(self.remote_inputs, self.chunks_to_fetch, network, self.bytes_written)

    def _device_facts(self) -> list[tuple[str, str]]:
        vram = self.memory.vram
        if vram is None:
            return []
        limit = (
            f"{USED_SHARE:.0%} of what is free when it runs"
            if vram.limit_bytes is None
            else format_memory(vram.limit_bytes)
        )
        needed = format_memory(vram.projected_bytes)
        return [("device", f"{self.execution.device}, {needed} of its memory, limit {limit}")]

    def summary(self) -> str:
        """The plan in a few lines of plain text."""
        part = f" ({self.recipe.name})" if self.recipe.part_of else ""
        lines = [f"{self.recipe.merge_method}  {self.recipe.path}{part}"]
        for reference, checkpoint in self.checkpoints.items():
            base = " (base)" if reference == self.recipe.base_model else ""
            lines.append(
                f"model       {reference}{base}: "
                f"{format_count(checkpoint.parameter_count)} parameters, "
                f"{format_bytes(checkpoint.size_bytes)}, {dtype_text(dtype_shares(checkpoint))}"
            )
            if checkpoint.adapter is not None:
                lines.append(f"adapter     {adapter_text(checkpoint.adapter)}")
        lines += [f"{label:<12}{fact}" for label, fact in self.facts()]
        lines += [f"notice      {notice}" for notice in self.notices]
        return "\n".join(lines)

    def with_resources(self, resources: Resources) -> Plan:
        """The same merge, to be run with other memory, workers, read mode or device.

        Raises:
            DoesNotFitError: the memory does not suffice.
        """
        resources = replace(
            resources,
            gathers=resources.gathers or self.execution.gathers,
            stores=resources.stores or self.execution.stores,
        )
        execution = _execution(resources, self.recipe, self.checkpoints)
        return replace(
            self,
            memory=_memory(
                self.graph,
                self.kinds,
                resources,
                execution,
                self.tokenizer,
                _fetch_needs(self.graph, self.tasks, self.checkpoints, execution),
                _store_needs(self.graph, self.shards, execution),
            ),
            execution=execution,
        )

    def with_statistics(self) -> Plan:
        """The same merge; statistics of what is written are gathered on the way.

        Raises:
            DoesNotFitError: the memory does not suffice for that.
        """
        if self.execution.gathers:
            return self
        return self.with_resources(replace(self.resources, gathers=True))

    def into_store(self) -> Plan:
        """The same merge, its output going into an object store.

        Raises:
            DoesNotFitError: the memory does not suffice for that.
            InputError: an accelerator is to compute it.
        """
        return self.with_resources(replace(self.resources, stores=True))

    def in_this_process(self, held_bytes: int) -> Plan:
        """The same merge, run by a process that occupies so much already.

        Raises:
            DoesNotFitError: it does not fit beside that.
        """
        if held_bytes <= self.memory.reserved_bytes:
            return self
        memory = plan_memory(
            self.graph,
            self.kinds,
            self.memory.limit_bytes,
            self.memory.workers,
            self.execution,
            held_bytes,
            beside_bytes=0 if self.tokenizer is None else self.tokenizer.held_bytes,
            planning_bytes=0 if self.tokenizer is None else self.tokenizer.planning_bytes,
            fetches=_fetch_needs(self.graph, self.tasks, self.checkpoints, self.execution),
            store=_store_needs(self.graph, self.shards, self.execution),
        )
        return replace(self, memory=memory)

    def recipe_dict(self) -> dict[str, Any]:
        """The recipe for JSON. Of one that is part of another: the seed is that of the whole, which
        `recipe_again` begins from, and the parts' own are what their numbers are drawn by."""
        recipe = self.recipe
        whole = recipe.part_of or recipe
        named = {
            "part": {
                "name": recipe.name,
                "seeds": {str(part.name): seed_of_part(part) for part in (*recipe.merges, recipe)},
            }
        }
        return {
            "path": recipe.path,
            "merge_method": recipe.merge_method,
            "base_model": recipe.base_model,
            "seed": whole.seed,
            "text": recipe.text,
            **({} if recipe.part_of is None else named),
        }

    def models_dict(self) -> list[dict[str, Any]]:
        """The models for JSON, with the files that they are."""
        return [
            {
                "reference": reference,
                "folder": checkpoint.folder,
                "parameters": checkpoint.parameter_count,
                "size_bytes": checkpoint.size_bytes,
                "dtypes": dtype_shares(checkpoint),
                "files": [file.as_dict() for file in checkpoint.files],
                **({} if checkpoint.hub is None else {"hub": checkpoint.hub.as_dict()}),
                **({"adapter": checkpoint.adapter.as_dict()} if checkpoint.adapter else {}),
            }
            for reference, checkpoint in self.checkpoints.items()
        ]

    def as_dict(self) -> dict[str, Any]:
        """The plan for JSON: everything that is needed to run it, and its totals."""
        cached = self.cache_state
        return {
            "format": PLAN_FORMAT,
            "lazymerge": __version__,
            "torch": torch_version(),
            "fingerprint": self.fingerprint,
            "recipe": self.recipe_dict(),
            "totals": {
                "tensors": len(self.tensors),
                "parameters": sum(write.element_count for write in self.graph.writes),
                "operations": self.graph.count_by_kind(),
                "passes": {str(count): tensors for count, tensors in self.passes.items()},
                "bytes_read": self.bytes_read,
                "bytes_written": self.bytes_written,
                "header_bytes_read": sum(c.header_bytes_read for c in self.checkpoints.values()),
                "bytes_to_download": sum(file.size_bytes for file in self.missing_files),
                "bytes_to_fetch": self.bytes_to_fetch,
                **({} if cached is None else {"bytes_cached": cached.held_bytes}),
            },
            "memory": self.memory.as_dict(),
            "read_mode": self.execution.read_mode,
            "kernels": self.execution.kernels,
            "device": self.execution.device,
            **({"streams": True} if self.execution.streams else {}),
            **({"whole_files": True} if self.execution.network.whole_files else {}),
            **({"downloads": self._downloads()} if self.missing_files else {}),
            "notices": list(self.notices),
            "models": self.models_dict(),
            "output": {
                "max_shard_bytes": self.max_shard_bytes,
                "shards": [
                    {
                        "file": shard.file,
                        "size_bytes": shard.size_bytes,
                        "tensors": {
                            t.name: {
                                "dtype": t.dtype,
                                "shape": list(t.shape),
                                "bytes": [t.start, t.stop_exclusive],
                            }
                            for t in shard.tensors
                        },
                    }
                    for shard in self.shards
                ],
                "config": self.config,
                "sidecar_folder": self.sidecar_folder,
                "sidecars": list(self.sidecars),
                **({"tokenizer": self.tokenizer.as_dict()} if self.tokenizer else {}),
            },
            "tensors": [
                {
                    "name": tensor.name,
                    "method": tensor.method,
                    "parameters": dict(tensor.parameters),
                    "models": {model: dict(values) for model, values in tensor.by_model.items()},
                }
                for tensor in self.tensors
            ],
            "graph": graph_to_json(self.graph),
        }

    def save(self, path: Path | str) -> None:
        """Writes the plan as JSON; `load_plan` reads it back.

        Raises:
            InputError: it cannot be written there, or something else is there.
        """
        text = json.dumps(self.as_dict(), ensure_ascii=False) + "\n"
        write_target(Path(path), text, b'{"format": ', b'"lazymerge": ')


def signatures() -> dict[str, Signature]:
    """The signatures of all known methods, by name; those of installed plugins among them."""
    load_installed()
    return {name: method.signature for name, method in METHODS.items()}


def make_plan(
    recipe: Recipe,
    resources: Resources | None = None,
    *,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    truncate_embeddings: bool = False,
    paths: Mapping[str, str] | None = None,
) -> Plan:
    """Plans a merge from the headers of its models.

    paths: where models are whose references say so from another folder.

    Raises:
        InputError: a model cannot be opened, or tensors cannot be merged.
        DoesNotFitError: the memory does not suffice.
    """
    resources = resources or Resources()
    checkpoints, renamings = open_models(recipe, paths or {})
    if recipe.asks_for_tokenizer:
        fetch_tokenizers(checkpoints.values())
    tokenizer = plan_tokenizer(recipe, checkpoints, paths)
    alignment = None if tokenizer is None else tokenizer.alignment
    compiled = compile_recipe(
        recipe,
        checkpoints,
        truncate_embeddings=truncate_embeddings,
        alignment=alignment,
        merge_alignments={} if tokenizer is None else tokenizer.merge_alignments,
    )
    verify_graph(compiled.graph)
    tasks = tensor_tasks(compiled.graph)
    kinds = kinds_of(compiled.graph, tasks)
    execution = _execution(resources, recipe, checkpoints)
    source = checkpoints[recipe.main_model]
    config, config_notices = config_of(
        compiled.models[recipe.references[0]],
        compiled,
        compiled.models,
        is_vocabulary_matched=alignment is not None,
    )
    plan = Plan(
        recipe=recipe,
        checkpoints=checkpoints,
        graph=compiled.graph,
        tensors=compiled.tensors,
        notices=(
            *_recipe_notices(recipe),
            *renamings,
            *(f"{model}: {notice}" for model, c in checkpoints.items() for notice in c.notices),
            *compiled.notices,
            *(tokenizer.notices if tokenizer else ()),
            *config_notices,
        ),
        shards=lay_out(
            [OutputTensor(w.name, w.dtype, w.shape) for w in compiled.graph.writes],
            max_shard_bytes,
        ),
        max_shard_bytes=max_shard_bytes,
        memory=_memory(
            compiled.graph,
            kinds,
            resources,
            execution,
            tokenizer,
            _fetch_needs(compiled.graph, tasks, checkpoints, execution),
        ),
        config=config,
        sidecar_folder=source.folder,
        sidecars=_sidecars(
            source, (paths or {}).get(source.reference, source.reference), tokenizer
        ),
        execution=execution,
        tokenizer=tokenizer,
    )
    plan.__dict__.update(tasks=tasks, kinds=kinds)  # cached properties that are known already
    return plan


def plan_recipe_file(
    path: Path | str,
    resources: Resources | None = None,
    *,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    truncate_embeddings: bool = False,
    seed: int | None = None,
) -> Plan:
    """Reads a recipe and plans its merge.

    seed: of random methods, in place of the recipe's.

    Raises:
        RecipeError: the recipe is wrong; all its problems are named.
        InputError, DoesNotFitError: as make_plan.
    """
    recipe = load_recipe(path, signatures())
    with garbage_collector_paused():  # half a million nodes, and no cycles
        return make_plan(
            recipe if seed is None else recipe.with_seed(seed),
            resources,
            max_shard_bytes=max_shard_bytes,
            truncate_embeddings=truncate_embeddings,
        )


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
    execution = _execution(resources, recipe, checkpoints)
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
        memory=_memory(
            graph,
            kinds,
            resources,
            execution,
            tokenizer,
            _fetch_needs(graph, tasks, checkpoints, execution),
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


@cache
def torch_version() -> str:
    """The version of torch that is installed, without importing it."""
    return installed_version("torch")


def dtype_shares(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes by dtype, the largest first."""
    shares: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        shares[tensor.dtype] += tensor.size_bytes
    return dict(shares.most_common())


def adapter_text(adapter: Adapter) -> str:
    """An adapter in a line, for people."""
    ranks = [str(rank) for rank in adapter.ranks]
    rank = (
        "" if not ranks else f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks)}"
    )
    facts = [adapter.reference, adapter.kind, rank]
    facts.append(f"{format_count(adapter.parameter_count)} parameters")
    facts.append(f"changes {_counted(adapter.changed, 'tensor')}")
    if adapter.replaced:
        facts.append(f"replaces {adapter.replaced}")
    return ", ".join(fact for fact in facts if fact)


def dtype_text(shares: Mapping[str, int]) -> str:
    """`BF16`, or `BF16 + F32` where there are several, the largest share first."""
    return " + ".join(shares)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


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
    known = _sidecars(source, source.folder, None)
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


def open_models(
    recipe: Recipe, paths: Mapping[str, str]
) -> tuple[dict[str, Checkpoint], list[str]]:
    """Opens every model of a recipe, with names as the main model writes them; and says in a
    sentence which have others.

    paths: where models are whose references say so from another folder.

    Raises:
        InputErrors: some cannot be opened.
    """
    return _aligned(recipe, _open_all(recipe, paths))


def _open_all(recipe: Recipe, paths: Mapping[str, str]) -> dict[str, Checkpoint]:
    """Opens every model of a recipe; the errors of all of them are raised at once. Those that lie
    elsewhere are asked for at once, too."""

    def open_one(reference: str) -> Checkpoint | str:
        try:
            return replace(open_model(paths.get(reference, reference)), reference=reference)
        except InputError as error:
            return f"{error}{_of_a_merge(reference, recipe)}"

    references = list(recipe.models_read)
    are_here = all(is_local(paths.get(reference, reference)) for reference in references)
    if are_here:
        opened = [open_one(reference) for reference in references]
    else:
        with requesting(MODELS_AT_ONCE) as pool:
            opened = list(pool.map(open_one, references))
    problems = [each for each in opened if isinstance(each, str)]
    if problems:
        raise InputErrors(problems)
    found = zip(references, opened, strict=True)
    return {reference: each for reference, each in found if isinstance(each, Checkpoint)}


def _of_a_merge(reference: str, recipe: Recipe) -> str:
    """What else is to be said of a model that is not there."""
    names = [str(merge.name) for merge in recipe.merges]
    name = next((name for name in names if reference.startswith(f"{name}+")), None)
    if name is None:
        return ""
    return (
        f" (An adapter cannot be put on the merge {name!r} of this file: put it on the models that "
        f"{name!r} is made of, or write {name!r} first, with --write-intermediate)"
    )


def _aligned(
    recipe: Recipe, checkpoints: dict[str, Checkpoint]
) -> tuple[dict[str, Checkpoint], list[str]]:
    """The checkpoints, with names as the base writes them, or the first model where there is no
    base; and a sentence for each whose names are others."""
    names = {reference: reference for reference in checkpoints}
    return aligned(checkpoints[recipe.main_model], checkpoints, names)


Key = TypeVar("Key", bound=Hashable)


def aligned(
    reference: Checkpoint, checkpoints: Mapping[Key, Checkpoint], called: Mapping[Key, str]
) -> tuple[dict[Key, Checkpoint], list[str]]:
    """Checkpoints with names as the reference writes them, and a sentence for each whose names are
    others.

    called: what they are called in it.
    """
    found, sentences = {}, []
    for key, checkpoint in checkpoints.items():
        name = called[key]
        names = renamed(checkpoint.tensors, reference.tensors)
        if names:
            tensors = {names[old]: tensor for old, tensor in checkpoint.tensors.items()}
            checkpoint = replace(checkpoint, tensors=tensors)
            old, new = example(names)
            sentences.append(f"{name} has other names for the same tensors: {old} is {new}")
        parts = taken_apart(checkpoint.tensors, reference.tensors)
        if parts.keys() != checkpoint.tensors.keys():
            checkpoint = replace(checkpoint, tensors=parts)
            sentences.append(
                f"{name} holds projections as one that {reference.reference} has apart"
            )
        found[key] = checkpoint
    return found, sentences


def _execution(
    resources: Resources, recipe: Recipe, checkpoints: Mapping[str, Checkpoint]
) -> Execution:
    if not resources.gathers:
        return resources.execution
    reference = checkpoints[recipe.main_model]
    files = frozenset(f"{reference.folder}/{file.path}" for file in reference.files)
    return replace(resources.execution, reference_files=files)


def _memory(
    graph: Graph,
    kinds: tuple[Kind, ...],
    resources: Resources,
    execution: Execution,
    tokenizer: TokenizerPlan | None,
    fetches: FetchNeeds | None,
    store: StoreNeeds | None = None,
) -> MemoryPlan:
    limit, workers = resources.limit_bytes, resources.workers
    on_device = execution.device != "cpu"
    if limit is None:
        limit = default_device_limit_bytes() if on_device else default_limit_bytes()
    if workers is None:
        workers = default_workers()
        workers = min(DEFAULT_WORKERS, workers) if on_device else workers
    return plan_memory(
        graph,
        kinds,
        limit,
        workers,
        execution,
        beside_bytes=0 if tokenizer is None else tokenizer.held_bytes,
        planning_bytes=0 if tokenizer is None else tokenizer.planning_bytes,
        fetches=fetches,
        store=store,
    )


def _store_needs(
    graph: Graph, shards: tuple[Shard, ...], execution: Execution
) -> StoreNeeds | None:
    """What must be held of an output on its way into a store; None where it is a folder.

    Raises:
        InputError: an accelerator is to compute it.
    """
    if not execution.stores:
        return None
    if execution.device != "cpu":
        raise InputError(
            f"--device {execution.device} writes to folders only: leave it out, or merge into a "
            "folder and copy that"
        )
    return store_needs(graph, shards, execution.device)


def _fetch_needs(
    graph: Graph,
    tasks: tuple[TensorTask, ...],
    checkpoints: Mapping[str, Checkpoint],
    execution: Execution,
) -> FetchNeeds | None:
    """What must be held of inputs that lie elsewhere; None where there are none.

    Raises:
        InputError: an accelerator is to compute with them, or one comes as a whole only.
    """
    paths = remote_inputs(checkpoints.values(), streams=execution.streams)
    return needs_of_remote(graph, tasks, paths, execution)


def needs_of_remote(
    graph: Graph,
    tasks: Sequence[TensorTask],
    paths: Mapping[str, Distant],
    execution: Execution,
) -> FetchNeeds | None:
    """As fetch_needs, for files that may come as a whole only. paths: of the files that lie
    elsewhere; None is returned where there are none.

    Raises:
        InputError: an accelerator is to compute with them, or one comes as a whole only.
    """
    if not paths:
        return None
    network = execution.network
    chunks = chunks_of(
        (node for node in graph if isinstance(node, Read) and path_of(node) in paths),
        network.gap_bytes,
    )
    read = {path: paths[path] for path in chunks}
    check_ranges(read, network)
    whole = [path for path, file in read.items() if is_held_whole(file, network)]
    if execution.device != "cpu":
        raise InputError(
            f"--device {execution.device} merges what is on the local disk only: leave it out, or "
            f"download {next(iter(paths))}"
        )
    ranged = {path: file for path, file in paths.items() if path not in whole}
    needs = fetch_needs(graph, tasks, ranged, execution.device)
    return replace(needs, whole_bytes=sum(chunks[path].held_bytes for path in whole))


def _recipe_notices(recipe: Recipe) -> list[str]:
    return [
        f"{recipe.path}:{warning.position.line}: {warning.message}"
        if warning.position
        else warning.message
        for warning in recipe.warnings
    ]


def _sidecars(
    source: Checkpoint, reference: str, tokenizer: TokenizerPlan | None
) -> tuple[str, ...]:
    """The small files that are copied from a model: those of the tokenizer are not, where it is
    made.

    reference: what it was opened by.
    """
    if source.hub is not None:
        names = copied_files(source.hub.sizes)
    elif source.remote is not None:
        names = sidecar_files(source.remote.folder)
    else:
        model, _ = split_reference(reference)
        names = sidecar_files(source.folder) if Path(local_path(model)).is_dir() else ()
    return tuple(name for name in names if tokenizer is None or not is_tokenizer_file(name))


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


def read_folders(plan: Plan) -> tuple[str, ...]:
    """Absolute paths of all folders of the local disk that a plan reads from."""
    return tuple(
        dict.fromkeys(
            folder
            for folder in (
                *(node.folder for node in plan.graph if isinstance(node, Read)),
                plan.sidecar_folder,
                *(() if plan.tokenizer is None else (plan.tokenizer.folder,)),
            )
            if not is_url(folder)
        )
    )
