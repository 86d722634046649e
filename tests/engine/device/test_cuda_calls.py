"""cuda.py, line by line, with a driver that only takes notes: the calls exist and are in order.

Whether CUDA does what they ask is for test_cuda.py, on a GPU.
"""

from __future__ import annotations

from collections import Counter
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from device_cases import (
    LEFT_TO_THE_PROCESSOR,
    RECIPES,
    VRAM,
    models,
    on_device,
    run_on,
    run_on_host,
    use_small_blocks,
)
from lazymerge.engine.device import cuda
from lazymerge.engine.device.cuda import CudaDevice
from lazymerge.errors import LazymergeError

from merging import bits, plan_of


class Driver:
    """torch.cuda on a machine without one. Attributes that torch.cuda lacks cannot be used."""

    def __init__(self) -> None:
        self.calls = Counter[str]()
        self.registered: dict[int, int] = {}
        self.waits: list[tuple[Any, Any]] = []
        self.error = 0
        driver = self

        class Event:
            def __init__(self, *, blocking: bool) -> None:
                assert blocking

            def record(self, stream: Any) -> None:
                self.stream = stream

            def synchronize(self) -> None:
                driver.calls["synchronize event"] += 1

        class Stream:
            def __init__(self, device: torch.device) -> None:
                assert device == torch.device("cuda", 0)

            def wait_event(self, event: Event) -> None:
                driver.waits.append((self, event.stream))

        self.Event, self.Stream = Event, Stream
        self.OutOfMemoryError = MemoryError

    def __getattribute__(self, name: str) -> Any:
        if name not in ("calls", "registered", "waits", "error"):
            assert name.startswith("cudaHost") or hasattr(torch.cuda, name), name
        return object.__getattribute__(self, name)

    @contextmanager
    def stream(self, stream: Any) -> Any:
        self.calls["stream"] += 1
        yield

    def cudart(self) -> Driver:
        return self

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if not self.error:
            self.registered[address] = size
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0

    def is_available(self) -> bool:
        return True

    def init(self) -> None:
        pass

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: torch.device) -> str:
        return "a GPU"

    def empty_cache(self) -> None:
        pass

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.calls["reset"] += 1

    def memory_reserved(self, device: torch.device) -> int:
        return 100

    def max_memory_reserved(self, device: torch.device) -> int:
        return 1100

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return VRAM, 2 * VRAM

    def synchronize(self, device: torch.device) -> None:
        self.calls["synchronize"] += 1


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(cuda, "_cuda", lambda: made)
    return made


@pytest.mark.parametrize("method", RECIPES)
def test_a_whole_merge(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    use_small_blocks(monkeypatch)
    plan = on_device(plan_of(tmp_path, RECIPES[method], models()), workers=2)
    expected = run_on_host(plan, tmp_path / "host")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: empty(size, dtype=dtype))
    with closing(CudaDevice()) as device:
        report, merged = run_on(device, plan, tmp_path / "gpu")
        assert list(driver.registered.values()) == [max(plan.memory.arena_bytes, 4096)] * 2
    assert {k: bits(v) for k, v in merged.items()} == {k: bits(v) for k, v in expected.items()}
    assert (report.device, report.measured_vram_bytes) == ("a GPU", 1000)
    assert driver.registered == {}
    assert driver.calls["synchronize"] == 1
    if method not in ("passthrough", *LEFT_TO_THE_PROCESSOR):
        assert len({waiting for waiting, _ in driver.waits}) > 2
        assert all(waiting is not waited_for for waiting, waited_for in driver.waits)


def test_memory_that_cannot_be_had(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    from lazymerge.engine.arena import Arena

    def refuse(*_: Any, **__: Any) -> None:
        raise MemoryError("out of memory")

    with closing(CudaDevice()) as device:
        monkeypatch.setattr(torch, "empty", refuse)
        with pytest.raises(LazymergeError, match="a GPU has no 77 bytes free"):
            device.allocate(77)
        driver.error = 2
        with pytest.raises(LazymergeError, match=r"cannot pin 4096 bytes .*error 2.*ulimit -l"):
            device.pin(Arena(1))
    assert driver.registered == {}
