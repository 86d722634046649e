"""How a run reads and computes. Of this, the output depends on the class of device alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .blocks import DeviceClass
from .native import library
from .network import Network

ReadMode = Literal["mmap", "pread"]
Kernels = Literal["native", "torch"]

DEFAULT_READ_MODE: ReadMode = "pread"


@dataclass(frozen=True, slots=True)
class Execution:
    """How a run reads and computes.

    read_mode: inputs are decoded where they are mapped, or copied into the arena first.
    kernels: the native ones where they can do what a stage asks for, or torch alone.
    device: who computes.
    vram_limit_bytes: what may be allocated on an accelerator; None: a share of what is free when
        the run starts.
    reference_files: paths of the files of the model that statistics, gathered on the way, compare
        with; None: none are gathered. Bytes do not depend on it.
    streams: models of the Hub that are not in its cache are read over the network while they are
        merged, and not downloaded first.
    stores: the output goes into an object store.
    network: how inputs that lie elsewhere are fetched.
    """

    read_mode: ReadMode = DEFAULT_READ_MODE
    kernels: Kernels = "native"
    device: DeviceClass = "cpu"
    vram_limit_bytes: int | None = None
    streams: bool = False
    reference_files: frozenset[str] | None = None
    stores: bool = False
    network: Network = field(default_factory=Network)

    @property
    def gathers(self) -> bool:
        """Whether statistics of what is written are gathered."""
        return self.reference_files is not None


def default_kernels() -> Kernels:
    """Native ones where they are built."""
    return "native" if library.is_available() else "torch"
