"""What a process occupies before it does anything: interpreter, libraries, lazymerge.

It is most of a small merge's memory and differs between systems and versions (torch alone: 150 to
500 MiB), so it is measured and not guessed: a process of its own imports what a run imports, calls
every kind of kernel once and says what it then occupies. Runs store the figure in the user's cache
folder, keyed by the versions it depends on; plans read it there, and measure anew, storing
nothing, where there is none.

    $XDG_CACHE_HOME/lazymerge/baseline.json      (~/.cache by default)
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Literal

from ..version import __version__
from .torch_loading import load_torch, loads_whole

Libraries = Literal["numpy", "torch"]
"""What a run loads: the native kernels do with numpy (for safetensors and selections)."""

MARGIN_BYTES: dict[Libraries, int] = {"numpy": 6 << 20, "torch": 10 << 20}
"""What the same process has been seen to vary by: pages of libraries that are or are not in the
page cache when they are first touched, thread stacks. With torch, merges of tiny models by all
methods took up to 4 MiB more than what measures here, for each touches other kernels."""

FALLBACK_BYTES: dict[Libraries, int] = {"numpy": 80 << 20, "torch": 320 << 20}
"""Where no process can be started to measure it."""

PROGRAM = """
import contextlib, io, sys
import email.parser, rich.live, rich.progress_bar
import lazymerge.cli.download, lazymerge.cli.progress, lazymerge.cli.running
import lazymerge.api, lazymerge.engine.run, lazymerge.engine.torch_loading
from lazymerge.cli.main import app
from lazymerge.engine.baseline import call_kernels, peak_resident_bytes
with contextlib.redirect_stdout(io.StringIO()):
    app(["methods"], standalone_mode=False)
lazymerge.engine.torch_loading.is_own_process = sys.argv[2] == "command"
call_kernels(sys.argv[1])
print(peak_resident_bytes())
"""
"""What is run to measure: a short command with its display, and all that a merge loads."""


def resident_bytes() -> int:
    """What this process occupies now; its peak where the system does not tell."""
    return _status_bytes("VmRSS:") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The process's peak resident set so far.

    Linux keeps ru_maxrss over exec: a run started by a large process would be told of its
    parent's memory. VmHWM is of this program alone.
    """
    peak = _status_bytes("VmHWM:")
    if peak is None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
    return peak


def _status_bytes(field: str) -> int | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return None


def reserved_bytes(libraries: Libraries) -> int:
    """Peak of a process that has loaded everything and merged nothing."""
    measured = _stored().get(_key(libraries)) or _measure(libraries)
    return measured + MARGIN_BYTES[libraries] if measured else FALLBACK_BYTES[libraries]


def store_baseline(libraries: Libraries) -> None:
    """Keeps the figure for later plans; where the cache folder cannot be written, does nothing."""
    stored = _stored()
    key = _key(libraries)
    measured = _measure(libraries) if key not in stored else 0
    if not measured:
        return
    path = _path()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps({**stored, key: measured}, indent=2) + "\n")
        partial.rename(path)
        _stored.cache_clear()


def _path() -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache_home) / "lazymerge" / "baseline.json"


@cache
def _stored() -> dict[str, int]:
    try:
        document = json.loads(_path().read_text())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home
        return {}
    if not isinstance(document, dict):
        return {}
    return {k: v for k, v in document.items() if isinstance(v, int) and 1 << 20 < v < 1 << 40}


@cache
def _code_bytes() -> int:
    """Bytes of the package's modules: more code takes more memory, also within a version. Takes 2
    ms."""
    package = Path(__file__).parents[1]
    return sum(
        os.stat(os.path.join(folder, file)).st_size
        for folder, _, files in os.walk(package)
        for file in files
        if file.endswith((".py", ".so"))
    )


def _key(libraries: Libraries) -> str:
    packages = ("numpy",) if libraries == "numpy" else ("numpy", "torch")
    whole = ["whole"] if libraries == "torch" and loads_whole() else []
    return " ".join(
        [
            *whole,
            f"lazymerge {__version__} {_code_bytes()}",
            f"{platform.system()} {platform.machine()}",
            f"python {platform.python_version()} {sys.executable}",
            *(f"{package} {installed_version(package)}" for package in packages),
        ]
    )


@cache
def _measure(libraries: Libraries) -> int:
    """Starts the process that measures; 0 where that fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, libraries, "program" if loads_whole() else "command"],
            capture_output=True,
            timeout=120,
            check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        return int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


def call_kernels(libraries: Libraries) -> None:
    """Imports what a run imports for its kernels, and calls every kind of them once."""
    import numpy
    import safetensors  # noqa: F401

    numpy.partition(numpy.sort(numpy.arange(10.0, dtype=numpy.float32)), 3)
    if libraries == "torch":
        load_torch()
        import torch

        from ..checkpoint.tensor import DTYPES

        single, double = torch.zeros(99), torch.zeros(99, dtype=torch.float64)
        for dtype in DTYPES.values():
            if dtype.is_float:
                stored = torch.zeros(99, dtype=getattr(torch, dtype.torch_name))
                for vector in (single, double):
                    vector.copy_(stored)
                    stored.copy_(vector)
        for vector in (single, double):
            vector.add_(vector).sub_(vector).mul_(2.0).div_(vector).abs_().clamp_min_(0.0)
            vector.ge_(0).gt_(0).eq_(0)
            torch.hardshrink(vector, 0.5, out=vector)
