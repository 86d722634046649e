"""Model references with adapters: `model+adapter`.

What lies on disk goes first: a folder `a+b` is that folder. Where a name holds several `+`, the one
is meant between a model and an adapter that are both there, or behind a model that is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..architecture import is_vocabulary, output_config
from ..architecture.tying import untied
from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.hub import HubSource
from ..checkpoint.hub_reference import SCHEME, local_path
from ..checkpoint.remote_reference import is_url
from ..checkpoint.tensor import Adapter, TensorInfo
from ..checkpoint.wording import quoted
from ..errors import InputError
from .matching import Adapted, adapted_tensors
from .reading import AdapterFiles, read_adapter

SEPARATOR = "+"


def open_model(reference: str) -> Checkpoint:
    """Opens a model, with its adapter where the reference names one: headers, indexes and configs
    are read, tensor data is not.

    reference: as open_checkpoint, or two of them joined by +: the model and the adapter.

    Raises InputError naming the file, the tensor and the remedy.
    """
    path, adapter_path = split_reference(reference)
    model = open_checkpoint(path)
    model = replace(model, path=_path_of(path, model.hub))
    if adapter_path is None:
        return model
    adapter = read_adapter(adapter_path)
    adapted = adapted_tensors(model, adapter)
    tensors = adapted.tensors
    changed = [tensor.change for tensor in tensors.values() if tensor.change is not None]
    replaced = sum(tensor.folder is not None for tensor in tensors.values())
    return replace(
        model,
        reference=reference,
        tensors=tensors,
        config=_config(model, adapted),
        path=f"{model.path}{SEPARATOR}{_path_of(adapter_path, adapter.hub)}",
        header_bytes_read=model.header_bytes_read + adapter.header_bytes_read,
        adapter=Adapter(
            reference=adapter_path,
            folder=adapter.folder,
            files=adapter.files,
            kind="DoRA" if adapter.config.is_dora else "LoRA",
            ranks=tuple(sorted({change.rank for change in changed})),
            parameter_count=sum(tensor.element_count for tensor in adapter.tensors.values()),
            changed=len(changed),
            replaced=replaced,
            hub=adapter.hub,
            remote=adapter.remote,
        ),
        notices=(*model.notices, *adapted.notices, *_notices(model, adapter, tensors)),
    )


def _path_of(reference: str, hub: HubSource | None) -> str:
    """What opens a model or an adapter again, wherever that is done."""
    if hub is not None:
        return f"{SCHEME}{hub.repository}@{hub.commit}"
    return reference if is_url(reference) else os.path.abspath(local_path(reference))


def split_reference(reference: str) -> tuple[str, str | None]:
    """The model and the adapter of a reference; None where there is no adapter.

    Raises InputError where it is not clear which + joins them.
    """
    if SEPARATOR not in reference or _is_there(reference):
        return reference, None
    places = [place for place, mark in enumerate(reference) if mark == SEPARATOR]
    pairs = [(reference[:place], reference[place + 1 :]) for place in places]
    pairs = [pair for pair in pairs if all(pair)]
    models = [pair for pair in pairs if _is_there(pair[0])]
    chosen = [pair for pair in models if _is_there(pair[1])] or models or pairs
    if len(chosen) != 1:
        problem = "names no model, or no adapter" if not chosen else "can be read in several ways"
        raise InputError(
            f"model {quoted(reference)}: {problem}. Write MODEL+ADAPTER, paths of which not both "
            "hold a +."
        )
    return chosen[0]


def is_local(reference: str) -> bool:
    """Whether a model and its adapter are on the local disk, so that nobody else is asked."""
    try:
        parts = split_reference(reference)
    except InputError:
        return False
    return all(part is None or _is_there(part) for part in parts)


def _is_there(path: str) -> bool:
    try:
        return os.path.lexists(local_path(path))
    except ValueError:  # a NUL
        return False


def _config(model: Checkpoint, adapted: Adapted) -> dict[str, object] | None:
    """The model's config, with the rows of its embeddings where the adapter brings others, and
    untied where it brings a head."""
    config = model.config
    if config is None:
        return None
    rows = _rows_of_embeddings(model, adapted.tensors)
    if rows:
        config = output_config(config, None, max(rows))
    return untied(config) if adapted.is_untied else config


def _rows_of_embeddings(model: Checkpoint, tensors: Mapping[str, TensorInfo]) -> set[int]:
    """Numbers of rows, where they are not what they are in the model."""
    return {
        tensor.shape[0]
        for name, tensor in tensors.items()
        if is_vocabulary(name)
        and name in model.tensors
        and tensor.shape != model.tensors[name].shape
    }


def _notices(
    model: Checkpoint, adapter: AdapterFiles, tensors: Mapping[str, TensorInfo]
) -> list[str]:
    rows = _rows_of_embeddings(model, tensors)
    if not rows:
        return []
    counts = " and ".join(map(str, sorted(rows)))
    return [
        f"the adapter brings embeddings of {counts} rows, more or fewer than the model's own; its "
        f"tokenizer, if {Path(adapter.folder).name} holds one, is not copied"
    ]
