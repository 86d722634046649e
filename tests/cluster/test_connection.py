"""Certificates that a scheduler's address takes."""

from __future__ import annotations

import pytest
from lazymerge.cluster.connection import connected, parse_address
from lazymerge.errors import InputError

distributed = pytest.importorskip("distributed", reason="the extra [dask] is not installed")

VARIABLES = "DASK_DISTRIBUTED__COMM__TLS__CA_FILE"


def test_no_certificates() -> None:
    with (
        pytest.raises(InputError, match=f"tls://127.0.0.1:9 takes certificates.*{VARIABLES}"),
        connected(parse_address("tls://127.0.0.1:9"), threads=None, device="cpu"),
    ):
        pass
