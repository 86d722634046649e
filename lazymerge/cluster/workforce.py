"""The workers of a Dask cluster, as what makes a run's tensors."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from ..engine.plan import Plan
from ..engine.stages import TensorTask
from ..engine.store.shards import Target
from ..engine.streaming import Conditions, Told
from ..engine.workforce import Account, Taken, outgrows_cache
from ..methods.plugins import plugin_digest
from ..output.layout import Shard
from ..output.store.client import Store
from ..output.store.records import ShardRecord, record_name
from ..output.writer import ShardWriter
from .connection import ClusterAddress, check_versions, connected, workers_of
from .coordinator import Coordinator, Listeners
from .destination import shown_in_folder, shown_in_store
from .group import Division, GroupResult, Terms
from .worker import versions_here


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an output goes.

    folder: the name that messages have for it; of a folder, its path.
    shown: has a run's sign there while the block runs. target: of shards in a store.
    syncs: workers wait until their bytes are on disk.
    """

    folder: str
    shown: Callable[[str], AbstractContextManager[None]]
    target: Target | None = None
    syncs: bool = False


class DaskWorkforce:
    """The workers of a cluster, as what makes a run's tensors."""

    is_elsewhere = True

    def __init__(
        self,
        address: ClusterAddress,
        *,
        limit_bytes: int | None = None,
        threads: int | None = None,
        plugins: Sequence[Path] = (),
    ) -> None:
        """limit_bytes: bound of each worker process's memory; None: the worker's own.

        threads: of each worker; None: as many as the worker has. plugins: files with methods.
        """
        self._address = address
        self._limit_bytes = limit_bytes
        self.may_go_on = False
        """Whether groups have been given away: workers may complete theirs when a run has ended."""
        self._threads = threads
        self._plugins = [(str(path.absolute()), plugin_digest(path)) for path in plugins]

    def make(
        self,
        plan: Plan,
        tasks: Sequence[TensorTask],
        writer: ShardWriter,
        account: Account,
        conditions: Conditions,
        *,
        folder: Path,
        fsync: bool,
    ) -> Taken:
        """As Workforce.make.

        Raises:
            InputError: Dask is not installed, or workers have other versions.
            LazymergeError: no scheduler answers, there are no workers, or workers fail.
        """
        return self._made_by_workers(
            plan,
            tasks,
            Listeners(account, account.lost, lambda result: None),
            conditions,
            _Place(
                str(folder.absolute()),
                lambda token: shown_in_folder(folder, token),
                # what this machine's workers have written is with this machine's system
                syncs=fsync or not self._address.local_workers,
            ),
        )

    def make_shards(
        self,
        plan: Plan,
        shards: Sequence[Shard],
        target: Target,
        told: Told,
        made: Callable[[ShardRecord], None],
        conditions: Conditions,
    ) -> Taken:
        """As ShardWorkforce.make_shards; raises as make does."""
        files = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
        store = Store(target.address)

        def lost(tensor: str) -> None:
            store.remove([record_name(files[tensor])])

        def keep(result: GroupResult) -> None:
            assert result.record is not None
            made(result.record)

        return self._made_by_workers(
            plan,
            [task for task in plan.tasks if task.write.name in files],
            Listeners(told, lost, keep),
            conditions,
            _Place(
                str(target.address),
                lambda token: shown_in_store(target.address, token),
                target=target,
            ),
        )

    def _made_by_workers(
        self,
        plan: Plan,
        tasks: Sequence[TensorTask],
        listeners: Listeners,
        conditions: Conditions,
        place: _Place,
    ) -> Taken:
        if not tasks:
            return Taken(elsewhere_bytes=0)
        device = plan.execution.device
        versions = versions_here()
        with connected(self._address, threads=self._threads, device=device) as client:
            for worker in check_versions(client, versions):
                listeners.told.noted(f"{worker} does not answer; others make what it would")
            terms = Terms(
                token=secrets.token_hex(8),
                folder=place.folder,
                limit_bytes=self._limit_bytes,
                threads=self._threads,
                syncs=place.syncs,
                strict=conditions.strict,
                forgets=outgrows_cache(plan),
                versions=versions,
                plugins=self._plugins,
                target=place.target,
            )
            workers = workers_of(client, device)
            division = Division(plan, tasks, len(workers), conditions.stamps, terms)
            with place.shown(terms.token):
                run = Coordinator(
                    client, division, listeners, terms.token, device, self._address.text
                )
                run.begin_with(workers)
                self.may_go_on = True
                run.to_the_end(conditions.check)
        return Taken(elsewhere_bytes=run.peak_bytes, facts={"cluster": run.facts()})
