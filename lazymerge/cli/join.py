"""lazymerge join: make one output of parts that were merged apart from each other."""

from __future__ import annotations

from ..output.store.address import local_place
from .options import FolderArgument, JsonOption
from .running import NoSyncOption


def join(
    output: FolderArgument, no_fsync: NoSyncOption = False, as_json: JsonOption = False
) -> None:
    """Make one output of the parts that `plan --split` has named and `run` has merged."""
    from dataclasses import asdict

    from ..engine.splitting import join_parts
    from .console import messages, print_json

    joined = join_parts(local_place(output), fsync=not no_fsync)
    if as_json:
        print_json(asdict(joined))
        return
    from ..sizes import counted, format_bytes

    parts = f"joined {counted(joined.parts, 'part')}"
    what = parts if joined.parts else "complete, and there are no parts"
    size = f"{counted(joined.tensors, 'tensor')}, {format_bytes(joined.bytes_written)}"
    messages().print(f"{what}: {size}\n{joined.output}", soft_wrap=True)
