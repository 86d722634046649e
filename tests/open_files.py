"""What this process has open of a folder.

Of no other: connections that an earlier test left idle are closed some seconds after it.
"""

from __future__ import annotations

import os
from pathlib import Path


def open_files(folder: Path) -> list[str]:
    """The paths of all open files in a folder, itself among them, and of files in memory; a path
    as often as it is open, in order."""
    inside = os.path.realpath(folder)
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:  # that of the listing itself, or another thread's
            continue
        if path == inside or path.startswith((f"{inside}/", "/memfd:")):
            found.append(path)
    return sorted(found)
