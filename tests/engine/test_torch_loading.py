"""The command's import of torch leaves nothing undone that somebody may need later."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, sys
from lazymerge.engine import torch_loading
from lazymerge.engine.torch_loading import PUT_OFF, load_torch
load_torch()
assert "torch" not in sys.modules, "only where the process is the command's own"
torch_loading.is_own_process = True
load_torch()
import torch
assert PUT_OFF not in sys.modules, "put off"
assert not hasattr(torch, "_meta_registrations")
assert torch.hardshrink(torch.ones(3), 0.5).sum() == 3
from torch import _meta_registrations
assert len(vars(_meta_registrations)) > 100, "the real module, when asked for"
x = torch.empty(3, 4, device="meta") @ torch.empty(4, 5, device="meta")
assert x.shape == (3, 5)
"""


def test_the_put_off_module_can_still_be_imported() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
