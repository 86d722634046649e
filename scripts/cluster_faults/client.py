"""The lazymerge command, as the matrix runs it: with groups that are small for a small model, so
that every worker makes a dozen of them; and with a mistake built in, if one is asked for."""

from __future__ import annotations

import os
import sys
from pathlib import Path

GROUP_VARIABLE = "LAZYMERGE_MATRIX_GROUP_BYTES"


def main() -> None:
    """The command."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from lazymerge.cli.main import command

    if "--cluster" in sys.argv:
        from lazymerge.cluster import group

        group.LEAST_GROUP_BYTES = int(os.environ[GROUP_VARIABLE])
        from cluster_faults.mutations import mutate_client

        mutate_client()
    command()


if __name__ == "__main__":
    main()
