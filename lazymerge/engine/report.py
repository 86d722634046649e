"""What a run tells: while it proceeds, and when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from .nonfinite import NonfiniteTensor


Phase = Literal["hashing", "checking", "merging", "finishing"]
"""What a run is doing: reading its inputs to know their contents, reading what an earlier run has
left, merging, or writing the last files and waiting for the disk."""


class Observer(Protocol):
    """Is told how a run proceeds; `moved` and `finished` are called from the workers' threads."""

    def entered(self, phase: Phase) -> None:
        """What is being done from now on."""

    def began(self, tensor: str) -> None:
        """Work on an output tensor begins; called from the workers' threads. Not of tensors that
        others make."""

    def moved(self, bytes_read: int, bytes_written: int, tensor: str) -> None:
        """A block was done, or several at once."""

    def fetched(self, size_bytes: int) -> None:
        """So many more bytes have come over the network; from the threads that wait for them."""

    def finished(self, tensor: str) -> None:
        """An output tensor is complete."""

    def resumed(self, bytes_read: int, bytes_written: int, tensors: int) -> None:
        """An earlier run has done this much; called before all else, if at all."""

    def noted(self, message: str) -> None:
        """Something that a person should know."""


class Silent:
    """Is told everything and says nothing; to be derived from by who wants to hear some of it."""

    def entered(self, phase: Phase) -> None:
        pass

    def began(self, tensor: str) -> None:
        pass

    def moved(self, bytes_read: int, bytes_written: int, tensor: str) -> None:
        pass

    def fetched(self, size_bytes: int) -> None:
        pass

    def finished(self, tensor: str) -> None:
        pass

    def resumed(self, bytes_read: int, bytes_written: int, tensors: int) -> None:
        pass

    def noted(self, message: str) -> None:
        pass


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run did.

    output: the folder, absolute.
    seconds: from the first block to the last byte synced; planning and start-up not included.
    bytes_read: of inputs, all passes.
    bytes_written: of tensors.
    resumed_tensors: tensors that an earlier run had finished; none of their bytes is counted.
    bytes_fetched: of inputs, over the network.
    measured_bytes: the process's peak resident set.
    measured_vram_bytes: the most that was allocated on an accelerator; device: its name.
    nonfinite: the output tensors that hold inf or nan, in the order of the output.
    cluster: where others made the tensors: the address, and how many workers made how many groups,
        of which some were made more than once; measured_bytes is then that of the largest worker,
        and projected_bytes among these what workers had planned at most.
    """

    output: str
    seconds: float
    bytes_read: int
    bytes_written: int
    measured_bytes: int
    measured_vram_bytes: int | None = None
    device: str | None = None
    nonfinite: tuple[NonfiniteTensor, ...] = ()
    resumed_tensors: int = 0
    cluster: Mapping[str, Any] | None = None
    bytes_fetched: int = 0
