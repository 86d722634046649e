"""The simulation of a cluster, where the answer can be reckoned."""

from __future__ import annotations

import pytest

from benchmarking.cluster_model import COORDINATOR, SCHEDULER, STORAGE, Costs, simulate

FREE = Costs(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1e9)
SECOND = [(10**9, 10)] * 100
"""Groups that take a worker a second each."""


def seconds(costs: Costs, workers: int, storage_rate: float = 1e18) -> float:
    return simulate(SECOND, workers, costs, storage_rate, latency_s=0.0).seconds


def test_workers_share_the_groups() -> None:
    assert seconds(FREE, 1) == pytest.approx(100)
    assert seconds(FREE, 4) == pytest.approx(25)
    assert seconds(FREE, 100) == pytest.approx(1)
    assert seconds(FREE, 60) == pytest.approx(2), "some have a second one, and are waited for"


def test_storage_is_shared() -> None:
    assert seconds(FREE, 4, 2e9) == pytest.approx(50)
    run = simulate(SECOND, 8, FREE, 2e9)
    assert run.busiest == STORAGE
    assert run.busy[STORAGE] == pytest.approx(1, rel=0.01)


def test_fixed_parts_of_groups_do_not_ask_the_storage() -> None:
    slow = Costs(0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 1e9)
    assert seconds(slow, 1) == pytest.approx(150)
    assert seconds(slow, 100, 100e9) == pytest.approx(1.5)


def test_one_coordinator_serves_all() -> None:
    """100 groups of 0.1 s and 10 tensors of 10 ms: 20 s, and a group's second alone at the end."""
    busy = Costs(0.1, 0.01, 0.0, 0.0, 0.0, 0.0, 1e9)
    run = simulate(SECOND, 100, busy, latency_s=0.0)
    assert 20 <= run.seconds <= 21.2
    assert run.busiest == COORDINATOR


def test_one_scheduler_serves_all() -> None:
    busy = Costs(0.0, 0.0, 0.2, 0.0, 0.0, 0.0, 1e9)
    run = simulate(SECOND, 100, busy, latency_s=0.0)
    assert 20 <= run.seconds <= 21.2
    assert run.busiest == SCHEDULER


def test_watching_workers_slows_down_who_watches() -> None:
    watching = Costs(0.1, 0.0, 0.0, 0.005, 0.0, 0.0, 1e9)
    assert 20 <= seconds(watching, 100) <= 21.2, "10 s, in the half of its time that is left"
    assert seconds(FREE, 100) == pytest.approx(1)
