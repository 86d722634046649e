"""The scan's figures against the same worked out by torch in float64, tensor by tensor."""

from __future__ import annotations

from math import isclose
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from lazymerge.checkpoint import open_checkpoint
from lazymerge.engine.baseline import resident_bytes
from lazymerge.errors import DoesNotFitError, LazymergeError
from lazymerge.inspection import scan as scan_module
from lazymerge.inspection.scan import READ_BYTES, TensorScan, scan_checkpoint, scan_memory

from conftest import write_checkpoint

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""By safetensors name."""

WHOLE = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def of_bits(codes: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of these bits."""
    width = torch.empty(0, dtype=dtype).element_size()
    return torch.from_numpy(codes.astype(f"i{width}")).view(dtype)


def expected(tensor: torch.Tensor) -> dict[str, float | int]:
    values = tensor.to(torch.float64)
    finite = values[torch.isfinite(values)].abs()
    # F8 has no finfo of its own in old versions; its smallest normal number is
    smallest = {torch.float8_e4m3fn: 2.0**-6, torch.float8_e5m2: 2.0**-14}
    normal = smallest.get(tensor.dtype) or torch.finfo(tensor.dtype).tiny
    return {
        "nan": int(torch.isnan(values).sum()),
        "inf": int(torch.isinf(values).sum()),
        "zeros": int((values == 0).sum()),
        "subnormals": int(((finite > 0) & (finite < normal)).sum()),
        "largest": float(finite.max()) if len(finite) else 0.0,
        "norm": float(finite.square().sum().sqrt()) if len(finite) else 0.0,
    }


def scanned(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, TensorScan]:
    write_checkpoint(folder, tensors)
    return {scan.name: scan for scan in scan_checkpoint(open_checkpoint(str(folder)), workers=2)}


def check(scan: TensorScan, tensor: torch.Tensor) -> None:
    for key, value in expected(tensor).items():
        found = getattr(scan, key)
        # squares of the largest and smallest float32 numbers leave its range
        if key == "norm" and not 1e-15 < value < 1e18 and tensor.dtype != torch.float64:
            continue
        assert isclose(found, value, rel_tol=1e-5), (key, found, value)
    content = tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    assert scan.checksum == xxhash.xxh3_128_hexdigest(content)
    assert scan.elements == tensor.numel()
    distinct = len(torch.unique(tensor.view(WHOLE[tensor.element_size()])))
    assert scan.is_constant == (tensor.numel() > 1 and distinct == 1)


@pytest.mark.parametrize("dtype", FLOATS)
@hypothesis_settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.sampled_from([0, 1, 2, 7, 1000, READ_BYTES // 2, READ_BYTES + 3]),
    kind=st.sampled_from(["any bits", "normal", "one number", "mostly zeros"]),
)
def test_figures(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, seed: int, count: int, kind: str
) -> None:
    random = np.random.default_rng(seed)
    torch_dtype = FLOATS[dtype]
    width = torch.empty(0, dtype=torch_dtype).element_size()
    if kind == "any bits":
        codes = random.integers(-(1 << (8 * width - 1)), (1 << (8 * width - 1)) - 1, count)
        tensor = of_bits(codes, torch_dtype)
        if dtype == "F64":  # squares must stay in range
            tensor = torch.where(tensor.abs() < 1e150, tensor, torch.ones_like(tensor))
    elif kind == "one number":
        tensor = torch.full((count,), float(random.normal())).to(torch_dtype)
    else:
        values = random.normal(size=count) * (random.random(count) < 0.1 if kind[0] == "m" else 1)
        tensor = torch.from_numpy(np.asarray(values)).to(torch_dtype)
    check(scanned(tmp_path_factory.mktemp("scan"), {"t": tensor})["t"], tensor)


def test_integers_and_several_files(tmp_path: Path) -> None:
    tensors = {
        "zeros": torch.zeros(3, 5, dtype=torch.int64),
        "numbers": torch.arange(12, dtype=torch.int32).reshape(3, 4),
        "flags": torch.tensor([True, False]),
        "floats": torch.randn(300, 1000),
    }
    write_checkpoint(tmp_path / "m", tensors, shards=3)
    seen: dict[str, int] = {}
    scans = scan_checkpoint(
        open_checkpoint(str(tmp_path / "m")),
        workers=2,
        scanned=lambda size, name: seen.update({name: size}),
    )
    assert seen == {name: tensor.nbytes for name, tensor in tensors.items()}
    by_name = {scan.name: scan for scan in scans}
    assert by_name["zeros"].is_zero
    assert not by_name["numbers"].is_zero
    check(by_name["floats"], tensors["floats"])


def test_results_do_not_depend_on_workers(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {f"t{n}": torch.randn(500, 700, generator=generator) for n in range(5)}
    write_checkpoint(tmp_path / "m", tensors)
    opened = open_checkpoint(str(tmp_path / "m"))
    assert scan_checkpoint(opened, workers=1) == scan_checkpoint(opened, workers=3)


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", {"t": torch.zeros(1000)})
    opened = open_checkpoint(str(tmp_path / "m"))
    with (tmp_path / "m" / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(LazymergeError, match="header promises more"):
        scan_checkpoint(opened)


def test_memory_decides_on_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "reserved_bytes", lambda _: 100 << 20)
    monkeypatch.setattr(scan_module, "resident_bytes", lambda: 0)
    assert scan_memory(10, 1 << 30, 8).workers == 8
    assert scan_memory(10, (100 << 20) + 3 * scan_module.WORKER_BYTES, 8).workers == 2
    with pytest.raises(DoesNotFitError, match="--memory"):
        scan_memory(10, 100 << 20, 8)


def test_buffers_are_bounded(tmp_path: Path) -> None:
    """The memory that a scan takes does not grow with the tensors."""
    path = tmp_path / "m"
    write_checkpoint(path, {"t": torch.zeros(1)})
    scan_checkpoint(open_checkpoint(str(path)), workers=1)
    write_checkpoint(path, {"t": torch.ones(25_000_000, dtype=torch.bfloat16)})
    before = resident_bytes()
    scan_checkpoint(open_checkpoint(str(path)), workers=2)
    assert resident_bytes() - before < 2 * scan_module.WORKER_BYTES + (4 << 20)
