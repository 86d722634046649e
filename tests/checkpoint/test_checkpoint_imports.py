"""Opening a model must stay light: no torch, no numpy, no safetensors library."""

from __future__ import annotations

import subprocess
import sys


def test_nothing_heavy_is_imported() -> None:
    program = (
        "import sys, lazymerge.checkpoint, lazymerge.architecture;"
        "print(*sorted({'torch', 'numpy', 'safetensors', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""
