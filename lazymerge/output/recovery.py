"""What of an unfinished output can be used, and making it ready to go on.

The journal says which tensors are complete; nothing of what it says is taken for true that the
files do not bear out:

    a shard         is used if its size and header are those of the plan, under its final name or
                    its partial one; else it is made anew
    a tensor        is done if its record names the place where the plan puts it in a shard that
                    is used, and was written since this machine started, to the very file that is
                    there: what a process hands to the system outlives the process. Other records
                    (a power failure may have kept the record and lost the data; a copy, or a file
                    from a backup, may be older than the journal) are believed when the tensor's
                    bytes give the checksum
    a final name    is taken back from a shard that lacks a tensor
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .checksum import tensor_checksum
from .identity import file_identity
from .journal import Finished, boot_id
from .layout import Shard, shard_header
from .writer import PARTIAL_SUFFIX, open_shard, write_error


@dataclass(frozen=True, slots=True)
class Recovery:
    """What is there already.

    finished: tensors that need not be computed again, by name.
    complete: shards under their final names. begun: shards to go on with, under partial names.
    checked: tensors whose bytes were read and gave their checksums.
    lost: tensors that the journal has and the files have not.
    """

    finished: Mapping[str, Finished]
    complete: frozenset[str]
    begun: frozenset[str]
    checked: int
    lost: int


NOTHING = Recovery({}, frozenset(), frozenset(), 0, 0)
"""Of an output that is begun anew."""


def recover(
    folder: Path,
    shards: Sequence[Shard],
    journalled: Mapping[str, Finished],
    span_bytes: Callable[[str], int],
    *,
    recheck: bool = False,
) -> Recovery:
    """Finds out what is there, and renames or removes files until all is as Recovery says.

    span_bytes: length of a tensor's spans, by its name.
    recheck: believe no record without reading the tensor.

    Raises:
        LazymergeError: a file cannot be read, renamed or removed.
    """
    finished: dict[str, Finished] = {}
    complete, begun = set(), set()
    checked = claimed = 0
    for shard in shards:
        final = folder / shard.file
        partial = folder / (shard.file + PARTIAL_SUFFIX)
        path = final
        claims = {
            tensor.name: record
            for tensor in shard.tensors
            if (record := journalled.get(tensor.name)) is not None
            and (record.file, record.start, record.stop_exclusive)
            == (shard.file, tensor.start, tensor.stop_exclusive)
        }
        claimed += len(claims)
        try:
            if not _is_shard(final, shard):
                final.unlink(missing_ok=True)
                path = partial
            else:
                partial.unlink(missing_ok=True)
            if not _is_shard(path, shard):
                path.unlink(missing_ok=True)
                continue
            descriptor = open_shard(path)
            try:
                identity = file_identity(descriptor)
                for name, record in claims.items():
                    if recheck or is_doubted(record) or record.identity != identity:
                        sum_now = tensor_checksum(
                            descriptor, record.start, record.stop_exclusive, span_bytes(name)
                        )
                        if sum_now != record.checksum:
                            continue
                        checked += 1
                    finished[name] = record
            finally:
                os.close(descriptor)
            if path == final and all(tensor.name in finished for tensor in shard.tensors):
                complete.add(shard.file)
                continue
            if path == final:
                final.rename(partial)
            begun.add(shard.file)
        except OSError as error:
            raise write_error(path, error) from error
    return Recovery(
        finished, frozenset(complete), frozenset(begun), checked, claimed - len(finished)
    )


def is_doubted(record: Finished) -> bool:
    """Whether a tensor's bytes are to be read before its record is believed: it was not written
    since this machine was started."""
    boot = boot_id()
    return not boot or record.session.boot != boot


def _is_shard(path: Path, shard: Shard) -> bool:
    """Whether a file is as long as the shard and begins with its header."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(status.st_mode) or status.st_size != shard.size_bytes:
        return False
    with path.open("rb") as stream:
        return stream.read(shard.header_bytes) == shard_header(shard)
