"""Fixtures that run the kernels twice: as this processor runs them, and as any other would."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from lazymerge.engine.native import library

SOURCE = Path(library.__file__).parent / "kernels.c"
PORTABLE = f"""
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#undef __x86_64__
#include "{SOURCE}"
"""
FLAGS = ("-shared", "-fPIC", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")


@cache
def portable_library(compiler: str) -> ctypes.CDLL:
    """The kernels without what only some processors have, built on the spot."""
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "portable.c"), Path(folder, "portable.so")
        source.write_text(PORTABLE)
        subprocess.run([compiler, str(source), "-o", str(built), *FLAGS, "-lm"], check=True)
        portable = ctypes.CDLL(str(built))
    portable.lm_run.argtypes = [ctypes.c_void_p]
    portable.lm_run.restype = None
    portable.lm_stream.argtypes = [ctypes.c_void_p]
    portable.lm_stream.restype = ctypes.c_int32
    assert portable.lm_version() == library.INTERFACE_VERSION
    return portable


@pytest.fixture(scope="module", params=["this processor", "any processor"])
def processor(request: pytest.FixtureRequest) -> Iterator[None]:
    """For modules whose every test is to hold of both."""
    if request.param == "this processor":
        yield
        return
    compiler = shutil.which("cc")
    if compiler is None or not SOURCE.exists():
        pytest.skip("no C compiler")
    portable = portable_library(compiler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_library", lambda: portable)
        yield
