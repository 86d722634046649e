"""The plan: everything a run needs to know and a person may want to know, before it starts.

A plan is made from headers alone and is a value: it can be printed, saved, loaded on another day
and run. `run` consumes a plan and nothing else.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from hashlib import blake2b
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from ..architecture import LayerStacks, find_layer_stacks
from ..checkpoint import Checkpoint
from ..checkpoint.remote_reference import is_url
from ..checkpoint.tensor import DTYPES
from ..graph.compile import ResolvedTensor, seed_of_part
from ..graph.export import graph_to_json
from ..graph.graph import Graph
from ..graph.node import Read
from ..output.layout import Shard
from ..output.manifest import MANIFEST_NAME
from ..output.target import write_target
from ..recipe import Recipe
from ..sizes import format_bytes, format_count, format_memory
from ..version import __version__
from .device.memory import USED_SHARE
from .download import MissingFile, missing_files
from .execution import Execution, ReadMode
from .likeness import Kind, kinds_of
from .memory import MemoryPlan, plan_memory
from .models import adapter_text, counted, dtype_shares, dtype_text
from .needed_ranges import FileChunks, chunks_of, path_of
from .needs import execution_of, fetch_needs_of, memory_of, store_needs_of
from .remote_facts import CacheState, cache_state, network_facts
from .remote_inputs import Distant, remote_inputs
from .resources import Resources
from .stages import TensorTask, bytes_read, expected_passes, tensor_tasks
from .tokenizer import TokenizerPlan

DEFAULT_MAX_SHARD_BYTES = 5_000_000_000
PLAN_FORMAT = 1


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
                f"{counted(len(self.tensors), 'tensor')}, {format_count(elements)} parameters, "
                f"{dtype_text(dict(shares.most_common()))}, {format_bytes(self.bytes_written)} "
                f"in {counted(len(self.shards), 'shard')}",
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
                    f"{passes} over {counted(tensors, 'tensor')}"
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
                f"{counted(memory.workers, 'worker')}, limit {format_memory(memory.limit_bytes)}",
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
            f"{size} in {counted(len(missing), 'file')} of {models} (--models lists them; with "
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
        execution = execution_of(resources, self.recipe, self.checkpoints)
        return replace(
            self,
            memory=memory_of(
                self.graph,
                self.kinds,
                resources,
                execution,
                self.tokenizer,
                fetch_needs_of(self.graph, self.tasks, self.checkpoints, execution),
                store_needs_of(self.graph, self.shards, execution),
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
            fetches=fetch_needs_of(self.graph, self.tasks, self.checkpoints, self.execution),
            store=store_needs_of(self.graph, self.shards, self.execution),
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


@cache
def torch_version() -> str:
    """The version of torch that is installed, without importing it."""
    return installed_version("torch")


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
