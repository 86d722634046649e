"""What a disk may hold after a power failure, put together from the log of what a run did.

What was synced is there. Of everything since (bytes of a file since its last fsync; names in a
folder since that folder's) anything may be there or not: for bytes, any subset of the writes, the
last one perhaps torn at a sector; for names, either the first so many or any subset.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

RECORD = struct.Struct("<IIIq")
SECTOR_BYTES = 512


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the log. other: data written, or the new name. offset: or the new length."""

    name: str
    path: str
    other: bytes
    offset: int


def read_log(path: Path) -> Iterator[Call]:
    """The calls of a log, in order; a torn last record is left out."""
    data = path.read_bytes() if path.exists() else b""
    at = 0
    while at + RECORD.size <= len(data):
        name, place, other, offset = RECORD.unpack_from(data, at)
        at += RECORD.size
        end = at + name + place + other
        if end > len(data):
            return
        yield Call(
            data[at : at + name].decode(),
            data[at + name : at + name + place].decode(),
            data[at + name + place : end],
            offset,
        )
        at = end


@dataclass(eq=False, slots=True)
class Inode:
    """A file or folder. data: what is surely on disk. pending: calls since the last fsync."""

    is_folder: bool = False
    data: bytearray = field(default_factory=bytearray)
    pending: list[Call] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Renaming:
    """A change of names: `before` goes, `after` becomes the inode; None: nothing does."""

    before: str | None
    after: str | None
    inode: Inode

    @property
    def folders(self) -> set[str]:
        return {str(Path(path).parent) for path in (self.before, self.after) if path is not None}


class Disk:
    """A folder, and what would be left of it."""

    def __init__(self, root: Path) -> None:
        """root: is as it is on disk when the first call is made."""
        self._root = root
        self.live: dict[str, Inode] = {}
        self.durable: dict[str, Inode] = {}
        self.names: list[Renaming] = []
        if root.exists():
            for path in (root, *root.rglob("*")):
                inode = Inode(path.is_dir(), bytearray(b"" if path.is_dir() else path.read_bytes()))
                self.live[str(path)] = self.durable[str(path)] = inode

    def apply(self, call: Call) -> None:
        """Follows one call."""
        path = call.path
        match call.name:
            case "create" | "mkdir":
                self.live[path] = Inode(call.name == "mkdir")
                self.names.append(Renaming(None, path, self.live[path]))
            case "rename":
                target = call.other.decode()
                self.live[target] = self.live.pop(path)
                self.names.append(Renaming(path, target, self.live[target]))
            case "link":
                target = call.other.decode()
                self.live[target] = self.live[path]
                self.names.append(Renaming(None, target, self.live[target]))
            case "unlink" | "rmdir":
                self.names.append(Renaming(path, None, self.live.pop(path)))
            case "fsync":
                inode = self.live.get(path, Inode(is_folder=True))
                if not inode.is_folder:
                    for pending in inode.pending:
                        change(inode.data, pending)
                    inode.pending.clear()
                    return
                done = [renaming for renaming in self.names if path in renaming.folders]
                for renaming in done:
                    self._rename(self.durable, renaming)
                self.names = [renaming for renaming in self.names if renaming not in done]
            case _:
                self.live[path].pending.append(call)

    @staticmethod
    def _rename(names: dict[str, Inode], renaming: Renaming) -> None:
        if renaming.before is not None:
            names.pop(renaming.before, None)
        if renaming.after is not None:
            names[renaming.after] = renaming.inode

    def fail(self, random: Random) -> None:
        """Leaves in the folder what a power failure now might leave."""
        names = dict(self.durable)
        kept = self.names
        if random.random() < 0.5:
            kept = kept[: random.randint(0, len(kept))]
        else:
            kept = [renaming for renaming in kept if random.random() < 0.5]
        for renaming in kept:
            self._rename(names, renaming)
        shutil.rmtree(self._root, ignore_errors=True)
        for path in sorted(names):
            inode = names[path]
            if path != str(self._root) and not Path(path).parent.is_dir():
                continue  # its folder is lost
            if inode.is_folder:
                Path(path).mkdir()
            else:
                Path(path).write_bytes(survivors(inode, random))
                os.utime(path, (1, 1))  # before the machine was started again


def survivors(inode: Inode, random: Random) -> bytes:
    """A file's bytes after the failure."""
    data = bytearray(inode.data)
    share = random.choice([0.0, 0.3, 0.7, 1.0])
    for call in inode.pending:
        if random.random() >= share:
            continue
        if call.name == "write" and random.random() < 0.2:
            sectors = random.randint(0, len(call.other) // SECTOR_BYTES)
            call = Call(call.name, call.path, call.other[: sectors * SECTOR_BYTES], call.offset)
        change(data, call)
    return bytes(data)


def change(data: bytearray, call: Call) -> None:
    """Applies a call to a file's bytes."""
    if call.name == "truncate":
        del data[call.offset :]
    elif call.name == "allocate":
        data.extend(bytes(max(0, call.offset - len(data))))
    elif call.name == "write" and call.other:
        end = call.offset + len(call.other)
        data.extend(bytes(max(0, end - len(data))))
        data[call.offset : end] = call.other
