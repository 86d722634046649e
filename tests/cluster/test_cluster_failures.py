"""Real schedulers and workers under harm: the cheapest of what scripts/cluster_matrix.py does."""

from __future__ import annotations

import pytest

pytest.importorskip("distributed")

from cluster_faults.bench import SMALL, Bench
from cluster_faults.kinds import KINDS
from cluster_faults.trial import SkippedError, Trial


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("matrix"), SMALL)


@pytest.mark.parametrize("kind", ["half", "local-interrupted"])
def test_every_byte_is_there_afterwards(bench: Bench, seed: int, kind: str) -> None:
    trial = Trial(bench, kind, 0, seed)
    try:
        KINDS[kind].make(trial)
    except SkippedError as error:
        pytest.skip(str(error))
    finally:
        trial.close()
    assert not trial.wrong, "\n".join(trial.events)
