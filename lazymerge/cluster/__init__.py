"""A run's tensors made by the workers of a Dask cluster.

    plan ─► groups (group.py) ─► given to workers (workforce.py, coordinator.py)
         ─► made there (worker.py: the engine's `stream`, into the output's own shards)
         ─► journal, renames, manifest by the process that runs the command (engine/run.py)

Dask brings the groups to the workers, knows which of those are alive, and encrypts; the engine does
the work. Nothing here is imported until a cluster is asked for: `distributed` is an extra.
"""
