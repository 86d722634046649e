"""Loading torch faster, for the command line only.

`import torch` ends with registering shape rules for its meta device, a quarter of the whole import
(0.45 of 1.6 s, measured with torch 2.13 on Linux), which nothing here uses. The module that holds
them is put off: an empty one stands in its place while torch is imported and is taken away again,
so that whoever imports it later gets the real one. Programs that use lazymerge as a library import
torch themselves and are not touched.
"""

from __future__ import annotations

import gc
import os
import sys
from types import ModuleType

PUT_OFF = "torch._meta_registrations"

WHOLE_TORCH_VARIABLE = "LAZYMERGE_WHOLE_TORCH"
"""Set to anything, the import is left as it is: for plugins that use the meta device."""


is_own_process = False
"""Set by the console script: nobody else's code shares the process."""


def loads_whole() -> bool:
    """Whether torch is, or will be, loaded with all that belongs to it."""
    return not is_own_process or bool(os.environ.get(WHOLE_TORCH_VARIABLE))


def load_torch() -> None:
    """Imports torch without its meta-device rules, if it is not imported yet."""
    if loads_whole() or "torch" in sys.modules:
        return
    sys.modules[PUT_OFF] = ModuleType(PUT_OFF)
    gc.disable()  # 0.11 s of looking for garbage among objects that stay
    try:
        import torch
    finally:
        del sys.modules[PUT_OFF]
        gc.freeze()
        gc.enable()
    package, _, name = PUT_OFF.partition(".")
    if hasattr(torch, name):
        delattr(sys.modules[package], name)
