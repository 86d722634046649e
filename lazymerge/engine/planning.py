"""Making a plan: from a recipe and the headers of its models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..adapters import split_reference
from ..checkpoint import Checkpoint
from ..checkpoint.header import garbage_collector_paused
from ..checkpoint.hub_reference import local_path
from ..graph.compile import compile_recipe, config_of
from ..graph.verify import verify_graph
from ..methods import METHODS
from ..methods.plugins import load_installed
from ..output.layout import OutputTensor, lay_out
from ..output.sidecars import copied_files, sidecar_files
from ..recipe import Recipe, Signature, load_recipe
from ..vocabulary.files import is_tokenizer_file
from .download import fetch_tokenizers
from .likeness import kinds_of
from .models import open_models
from .needs import execution_of, fetch_needs_of, memory_of
from .plan import DEFAULT_MAX_SHARD_BYTES, Plan
from .resources import Resources
from .stages import tensor_tasks
from .tokenizer import TokenizerPlan, plan_tokenizer


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
    execution = execution_of(resources, recipe, checkpoints)
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
        memory=memory_of(
            compiled.graph,
            kinds,
            resources,
            execution,
            tokenizer,
            fetch_needs_of(compiled.graph, tasks, checkpoints, execution),
        ),
        config=config,
        sidecar_folder=source.folder,
        sidecars=sidecars_of(
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


def _recipe_notices(recipe: Recipe) -> list[str]:
    return [
        f"{recipe.path}:{warning.position.line}: {warning.message}"
        if warning.position
        else warning.message
        for warning in recipe.warnings
    ]


def sidecars_of(
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
