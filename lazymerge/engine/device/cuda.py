"""NVIDIA GPUs by way of torch: the CUDA calls and nothing else.

Host memory is registered with the driver instead of being taken from torch's pinned allocator,
which rounds every size up to a power of two: a worker's arena then is what the plan says it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import InputError, LazymergeError
from ..arena import Arena
from .interface import DeviceMemory, Event, Outcome

if TYPE_CHECKING:
    from torch import Tensor


def _cuda() -> Any:
    """torch.cuda, of which torch declares too little."""
    import torch

    return torch.cuda


class CudaEvent:
    """A place in a stream. Waiting for it sleeps, so that other workers have the processor."""

    def __init__(self, stream: Any) -> None:
        self.event = _cuda().Event(blocking=True)
        self.event.record(stream)

    def wait(self) -> None:
        self.event.synchronize()


class CudaQueue:
    """A CUDA stream. `run` starts its kernels at once; they execute in the stream's order."""

    def __init__(self, device: Any) -> None:
        self._stream = _cuda().Stream(device)

    def after(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._stream.wait_event(event.event)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with _cuda().stream(self._stream):
            target.copy_(source, non_blocking=True)

    def run(self, work: Callable[[], Any]) -> Outcome:
        with _cuda().stream(self._stream):
            return Outcome(work())

    def exchange(self, target: Tensor, source: Tensor) -> None:
        self.copy(target, source)
        self.record().wait()

    def record(self) -> CudaEvent:
        return CudaEvent(self._stream)


class CudaDevice:
    """The current CUDA device (choose another with CUDA_VISIBLE_DEVICES)."""

    def __init__(self) -> None:
        """
        Raises:
            InputError: there is none.
        """
        import torch

        cuda = _cuda()
        if not cuda.is_available():
            reason = (
                f"torch {torch.__version__} is built without CUDA"
                if torch.version.cuda is None
                else f"torch {torch.__version__} finds no CUDA device on this machine"
            )
            raise InputError(f"--device cuda: {reason}; use --device cpu")
        cuda.init()
        self._device = torch.device("cuda", cuda.current_device())
        self.name = str(cuda.get_device_name(self._device))
        self._pinned: list[Arena] = []  # kept: what is registered must not be unmapped
        cuda.empty_cache()
        cuda.reset_peak_memory_stats(self._device)
        self._reserved_before = int(cuda.memory_reserved(self._device))

    def memory(self) -> DeviceMemory:
        return DeviceMemory(*_cuda().mem_get_info(self._device))

    def allocate(self, size_bytes: int) -> Tensor:
        import torch

        try:
            return torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
        except _cuda().OutOfMemoryError as error:
            raise LazymergeError(f"{self.name} has no {size_bytes} bytes free: {error}") from error

    def pin(self, arena: Arena) -> None:
        address, size = arena.place()
        error = int(_cuda().cudart().cudaHostRegister(address, size, 0))
        if error:
            raise LazymergeError(
                f"CUDA cannot pin {size} bytes of host memory (error {error}); "
                "the limit of locked memory (ulimit -l) may be too small"
            )
        self._pinned.append(arena)

    def queue(self) -> CudaQueue:
        return CudaQueue(self._device)

    def peak_bytes(self) -> int:
        """What torch's allocator has taken from the driver: at least what it has handed out."""
        return int(_cuda().max_memory_reserved(self._device)) - self._reserved_before

    def close(self) -> None:
        cuda = _cuda()
        cuda.synchronize(self._device)
        for arena in self._pinned:
            cuda.cudart().cudaHostUnregister(arena.place()[0])
        self._pinned.clear()
        cuda.empty_cache()
