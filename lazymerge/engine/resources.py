"""What a run may use, as it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from ..errors import InputError
from .blocks import DeviceClass
from .execution import DEFAULT_READ_MODE, Execution, Kernels, ReadMode, default_kernels
from .network import Network


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
