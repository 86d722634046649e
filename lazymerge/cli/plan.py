"""lazymerge plan: what a merge will do, from headers alone."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from ..output.store.address import StoreAddress, place_of
from ..sizes import format_bytes
from .intermediates import IntermediateOption, as_options, folders_asked
from .options import (
    CacheLimitOption,
    CacheOption,
    DeviceOption,
    JsonOption,
    MemoryOption,
    PluginOption,
    ReadModeChoice,
    ReadModeOption,
    RecipeArgument,
    SeedOption,
    ShardSizeOption,
    StreamOption,
    TruncateOption,
    VramOption,
    WholeFilesOption,
    WorkersOption,
    plan_of,
)
from .plan_html import HtmlOption, write_page

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..engine.intermediates import Output
    from ..engine.plan import Plan
    from ..graph.drawing import Picture
    from ..inspection.estimate import Estimate

STANDARD_OUTPUT = Path("-")

MOST_TREES = 3
"""Tensors that --tensor shows unless --most says otherwise."""

MOST_DRAWN = 50
"""Tensors that --tensor has drawn: a picture of more is not read."""


class Why(str, Enum):
    """What can be explained."""

    memory = "memory"


BELOW = "Shown below the first screen"
EXPORTS = "Pictures"


def plan(
    recipe: RecipeArgument,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="OUT", help="Output folder, or s3://bucket/prefix."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and write nothing.")
    ] = False,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="FILE", help="Save the plan here.")
    ] = None,
    split: Annotated[
        int | None,
        typer.Option(
            "--split",
            metavar="N",
            min=1,
            help="Write N parts into OUT that machines run apart from each other; see join.",
        ),
    ] = None,
    as_json: JsonOption = False,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Estimate the time; --measure reads a sample of the inputs and writes a nameless "
            "file for it.",
            show_default="made-up data and no file, with --dry-run in text; else not at all",
        ),
    ] = None,
    layers: Annotated[
        bool,
        typer.Option("--layers", help="Parameters layer by layer.", rich_help_panel=BELOW),
    ] = False,
    tensor: Annotated[
        str | None,
        typer.Option(
            "--tensor",
            metavar="REGEX",
            help="Operations of the tensors whose names match.",
            rich_help_panel=BELOW,
        ),
    ] = None,
    most: Annotated[
        int,
        typer.Option("--most", min=1, help="Tensors that --tensor shows.", rich_help_panel=BELOW),
    ] = MOST_TREES,
    ops: Annotated[
        bool, typer.Option("--ops", help="Operations by kind.", rich_help_panel=BELOW)
    ] = False,
    why: Annotated[
        Why | None,
        typer.Option("--why", help="What the peak consists of.", rich_help_panel=BELOW),
    ] = None,
    diff: Annotated[
        Path | None,
        typer.Option(
            "--diff",
            metavar="RECIPE",
            help="What would change with another recipe or saved plan.",
            rich_help_panel=BELOW,
        ),
    ] = None,
    models: Annotated[
        bool, typer.Option("--models", help="All models.", rich_help_panel=BELOW)
    ] = False,
    notices: Annotated[
        bool, typer.Option("--notices", help="All that looks wrong.", rich_help_panel=BELOW)
    ] = False,
    dot: Annotated[
        Path | None,
        typer.Option(
            "--dot",
            metavar="FILE",
            help="Draw the graph for Graphviz, folded by layer, or what --tensor matches; "
            "- is standard output.",
            rich_help_panel=EXPORTS,
        ),
    ] = None,
    mermaid: Annotated[
        Path | None,
        typer.Option(
            "--mermaid", metavar="FILE", help="The same for Mermaid.", rich_help_panel=EXPORTS
        ),
    ] = None,
    html: HtmlOption = None,
    memory: MemoryOption = None,
    workers: WorkersOption = None,
    read_mode: ReadModeOption = ReadModeChoice.pread,
    device: DeviceOption = None,
    vram: VramOption = None,
    max_shard_size: ShardSizeOption = "5GB",
    unsafe_truncate_embeddings: TruncateOption = False,
    seed: SeedOption = None,
    plugin: PluginOption = None,
    stream: StreamOption = False,
    cache: CacheOption = None,
    cache_limit: CacheLimitOption = None,
    whole_files: WholeFilesOption = False,
    write_intermediate: IntermediateOption = None,
) -> None:
    """Say what a merge will do: what goes in and comes out, time, memory, disk, what looks wrong.

    Reads headers and no tensor data. Without --dry-run the plan is saved, in OUT or with --save,
    and `lazymerge run` can run it later.
    """
    if not dry_run and save is None and output is None:
        raise InputError(
            "say where to save the plan (-o OUT or --save FILE), or give --dry-run to only see it"
        )
    where = None if output is None else place_of(output)
    store = where if isinstance(where, StoreAddress) else None
    folder = where if isinstance(where, Path) else None
    if store is not None and save is None and not dry_run:
        raise InputError(
            f"plans are saved on the local disk: give --save FILE, or --dry-run to only see what "
            f"goes to {store}"
        )
    if split is not None and (folder is None or save is not None or write_intermediate):
        raise InputError(
            "--split writes the parts into OUT: give -o OUT, and neither --save nor "
            "--write-intermediate"
        )
    printed = [option for option in (dot, mermaid) if option == STANDARD_OUTPUT]
    if len(printed) + as_json > 1:
        raise InputError("--json, --dot - and --mermaid - print one document each: choose one")
    if as_json and (layers or ops or diff or why or models or notices or tensor is not None):
        raise InputError(
            "--json prints all of the plan: leave --layers, --tensor, --ops, --why, --diff, "
            "--models and --notices out"
        )

    def planned(source: Path) -> Plan:
        return plan_of(
            source,
            memory,
            workers,
            read_mode,
            device,
            vram,
            max_shard_size,
            unsafe_truncate_embeddings,
            seed,
            plugin,
            stream=stream,
            cache=cache,
            cache_limit=cache_limit,
            whole_files=whole_files,
        )

    made = planned(recipe)
    if store is not None:
        made = made.into_store()

    from ..engine.intermediates import check_outputs, outputs_of
    from ..engine.plan import read_folders
    from ..output.folder import check_output_folder

    folders = folders_asked(write_intermediate, made.recipe, where)
    outputs = outputs_of(made, folder or Path("OUT"), folders)
    place = folder or Path()
    if folder is not None and split is None:
        # a dry run may look at what would replace an earlier output; a plan is not saved into one
        check_output_folder(folder, read_folders(made), overwrite=dry_run)
        check_outputs(outputs, overwrite=True)
    if store is not None:
        from ..engine.store.contents import check_address

        check_address(made, store, overwrite=dry_run)
    shown = outputs[-1].plan
    if dot is not None or mermaid is not None:
        _draw(shown, tensor, dot, mermaid)
    in_text = not as_json and not printed
    # how fast a store takes what is written only a run can tell
    measures = store is None and (measure if measure is not None else dry_run and in_text)

    def estimated(plan: Plan) -> Estimate | None:
        return estimate_of(plan, place, touches_files=bool(measure)) if measures else None

    estimate = estimated(shown)
    if html is not None:
        write_page(outputs, place, html, estimate, is_given=folder is not None)
    if as_json:
        from .console import print_json

        print_json(plan_document(outputs, place, estimate, store))
    elif in_text:
        from .console import results
        from .plan_view import plan_view

        console = results()
        console.print(
            plan_view(
                shown,
                place,
                is_given=folder is not None,
                store=store,
                before=outputs[:-1],
                estimated=estimate,
                shows_models=models,
                shows_notices=notices,
            )
        )
        for part in _sections(shown, layers, ops, tensor, most, why):
            console.print(part)
        if diff is not None:
            console.print(_difference(shown, diff, planned, estimate, estimated))
    if split is not None and dry_run:
        from ..engine.splitting import split_plan
        from .console import messages

        for piece in split_plan(made, split):
            assert piece.split is not None
            size = format_bytes(piece.bytes_read + piece.bytes_written)
            shards = ", ".join(shard.file for shard in piece.shards)
            messages().print(
                f"part {piece.split.number} of {split}: moves {size}: {shards}", soft_wrap=True
            )
    if dry_run:
        return
    if split is not None and folder is not None:
        _write_parts(made, folder, split)
        return
    _save(made, save, where, as_options(folders))


def _write_parts(made: Plan, output: Path, count: int) -> None:
    from ..engine.splitting import write_parts
    from .console import messages

    paths = write_parts(made, output, count)
    first = shlex.quote(str(paths[0]))
    messages().print(
        f"{count} parts written; run each, anywhere, like the first:\n"
        f"  lazymerge run {first} -o {first.replace('.json', '')}\n"
        f"and then: lazymerge join {shlex.quote(str(output))}",
        soft_wrap=True,
    )


def _save(made: Plan, save: Path | None, output: Path | StoreAddress | None, options: str) -> None:
    from .console import messages

    if save is None:
        assert isinstance(output, Path)
        from ..output.folder import PLAN_PATH

        save = output / PLAN_PATH
        save.parent.mkdir(parents=True, exist_ok=True)
    made.save(save)
    messages().print(
        f"plan saved; run it with: lazymerge run {save} -o {output or 'OUT'}{options}",
        soft_wrap=True,
    )


def estimate_of(plan: Plan, place: Path, *, touches_files: bool) -> Estimate | None:
    """How long a run takes on this machine, measured now; None for what takes no time.

    touches_files: inputs may be read, and an unnamed file written in the place.
    """
    from ..inspection.estimate import estimate
    from ..inspection.measurement import measure
    from .plan_time import SMALL_BYTES

    if plan.bytes_read + plan.bytes_written < SMALL_BYTES:
        return None
    return estimate(plan, measure(plan, place, touches_files=touches_files))


def _sections(
    plan: Plan, layers: bool, ops: bool, tensor: str | None, most: int, why: Why | None
) -> Iterator[RenderableType]:
    """What is shown below the first screen, in the order of the options."""
    from . import plan_sections as sections

    if layers:
        yield sections.layers_view(plan)
    if tensor is not None:
        from ..inspection.operations import steps_of
        from .tensor_names import matching

        names = matching([each.name for each in plan.tensors], tensor)
        yield sections.tensors_view(steps_of(plan, names[:most]), tensor, len(names))
    if ops:
        from ..inspection.operations import operation_kinds

        yield sections.operations_view(operation_kinds(plan))
    if why is Why.memory:
        from ..inspection.memory_parts import memory_parts

        yield sections.memory_view(memory_parts(plan))


def _difference(
    plan: Plan,
    other: Path,
    planned: Callable[[Path], Plan],
    estimate: Estimate | None,
    estimated: Callable[[Plan], Estimate | None],
) -> RenderableType:
    from ..inspection.differences import differences
    from .plan_sections import differences_view

    its = planned(other)
    found = differences(plan, its)
    again = None if found.is_equal or estimate is None else estimated(its)
    return differences_view(found, str(other), (plan, its), (estimate, again))


def _draw(plan: Plan, tensor: str | None, dot: Path | None, mermaid: Path | None) -> None:
    from ..graph.drawing import to_dot, to_mermaid
    from ..inspection.pictures import folded_picture, unfolded_picture
    from ..output.target import write_target

    if tensor is None:
        picture = folded_picture(plan)
    else:
        from .tensor_names import matching

        names = matching([each.name for each in plan.tensors], tensor)
        if len(names) > MOST_DRAWN:
            raise InputError(
                f"--tensor {tensor[:80]!r} matches {len(names)} tensors, and a picture of more "
                f"than {MOST_DRAWN} is not read: give a longer expression"
            )
        picture = unfolded_picture(plan, names)
    drawn: list[tuple[Path | None, Callable[[Picture], str]]] = [(dot, to_dot)]
    drawn.append((mermaid, to_mermaid))
    for path, text_of in drawn:
        if path == STANDARD_OUTPUT:
            typer.echo(text_of(picture), nl=False)
        elif path is not None:
            text = text_of(picture)
            write_target(path, text, text.partition("\n")[0].encode())


def plan_document(
    outputs: Sequence[Output],
    place: Path,
    estimate: Estimate | None,
    store: StoreAddress | None = None,
) -> dict[str, Any]:
    """The plan for JSON, as `lazymerge schema --plan` describes it."""
    from ..inspection.findings import suspicions_of
    from ..output.folder import free_disk_bytes

    plan = outputs[-1].plan
    needed = 0 if store is not None else sum(each.plan.bytes_written for each in outputs)
    document: dict[str, Any] = {
        **plan.as_dict(),
        "suspicions": [each.as_dict() for each in suspicions_of(plan)],
        "disk": {"needed_bytes": needed, "free_bytes": free_disk_bytes(place)},
        **({} if store is None else {"store": str(store)}),
    }
    state = plan.cache_state
    if state is not None:
        free = free_disk_bytes(Path(state.folder))
        document["cache_disk"] = {"needed_bytes": state.grows_bytes, "free_bytes": free}
    if estimate is not None:
        document["estimate"] = estimate.as_dict()
    if len(outputs) > 1:
        document["intermediates"] = [_document(each) for each in outputs[:-1]]
    return document


def _document(output: Output) -> dict[str, object]:
    """What is to be known of a merge that is written too."""
    document = output.plan.as_dict()
    told = ("fingerprint", "totals", "memory", "notices", "output")
    folder = str(output.folder)
    return {"name": output.name, "folder": folder, **{key: document[key] for key in told}}
