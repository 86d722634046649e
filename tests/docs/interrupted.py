"""lazymerge, interrupted by Ctrl-C when it has finished a third of its tensors.

The tensors after that take their time, so that some are left when the signal is seen.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from lazymerge.cli import main
from lazymerge.output.journal import Journal

TENSORS = 90
SECONDS = 0.01

count = 0
finished = Journal.finished


def interrupting(self: Journal, *arguments: Any, **keywords: Any) -> Any:
    """Journal.finished, and a signal."""
    global count
    count += 1
    if count == TENSORS:
        os.kill(os.getpid(), signal.SIGINT)
    if count >= TENSORS:
        time.sleep(SECONDS)
    return finished(self, *arguments, **keywords)


Journal.finished = interrupting  # type: ignore[method-assign]
main.command()
