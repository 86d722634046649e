"""Workers that cannot do what they are asked for. The others do it; where none can, the command
says why."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import signal
from pathlib import Path

from faults.harness import build_shim

from .bench import REPOSITORY
from .cluster import WORKERS, Cluster
from .trial import SkippedError, Trial


def _with_one(trial: Trial, **options: object) -> Cluster:
    """A cluster of which one worker is started with other options."""
    cluster = Cluster(trial)
    cluster.add_workers(WORKERS - 1)
    cluster.add_workers(1, **options)  # type: ignore[arg-type]
    cluster.wait_for(WORKERS)
    return cluster


def _hidden(folder: Path) -> list[str]:
    """What the command of a process begins with that is to see an empty folder in a folder's place.

    Raises:
        SkippedError: this machine does not make mount namespaces.
    """
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        raise SkippedError("mount namespaces need root and `unshare`")
    mount = f'mount -t tmpfs -o size=64k none {shlex.quote(str(folder))} && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", mount, "sh"]


def _expect_the_others_do_it(trial: Trial, cluster: Cluster, *, is_plain: bool = False) -> None:
    client = trial.run(cluster.address, is_plain=is_plain)
    trial.expect(client.ended(), 0)
    worker = max(trial.workers(), key=lambda worker: worker.name)
    trial.was_struck = not any(line.split()[2] == "ends" for line in trial.lines(worker.pid))
    trial.expect_equal()


def no_input(trial: Trial) -> None:
    """A model's folder is empty on one worker."""
    cluster = _with_one(trial, prefix=_hidden(trial.bench.folder / "a"))
    _expect_the_others_do_it(trial, cluster)


def no_output(trial: Trial) -> None:
    """The output is not on a filesystem that one worker shares."""
    trial.output.mkdir()
    cluster = _with_one(trial, prefix=_hidden(trial.output))
    _expect_the_others_do_it(trial, cluster)


def disk_full(trial: Trial) -> None:
    """Every write of one worker into the output fails: no space, quota or a broken disk."""
    shim = build_shim(trial.bench.folder)
    if shim is None:
        raise SkippedError("a C compiler and Linux are needed")
    code = trial.random.choice([errno.ENOSPC, errno.EDQUOT, errno.EIO])
    trial.say(f"writes of one worker fail: {errno.errorcode[code]}")
    environment = {
        "LD_PRELOAD": str(shim),
        "FAULTS_ROOT": str(trial.output),
        "FAULTS_STRUCK": str(trial.folder / "struck"),
        "FAULTS_FAIL_CALL": "pwrite",
        "FAULTS_FAIL_AT": str(trial.random.randint(1, 20)),
        "FAULTS_ERRNO": str(code),
    }
    cluster = _with_one(trial, environment=environment)
    client = trial.run(cluster.address)
    trial.expect(client.ended(), 0)
    trial.was_struck = (trial.folder / "struck").exists()
    trial.expect_equal()


def scratch_full(trial: Trial) -> None:
    """The disk on which one worker has what is Dask's is full."""
    cluster = Cluster(trial)
    cluster.add_workers(WORKERS - 1)
    scratch = trial.folder / "scratch" / f"worker{WORKERS - 1}"
    scratch.mkdir()
    fill = f"head -c 60k /dev/zero > {shlex.quote(str(scratch))}/full; "
    *prefix, mount, name = _hidden(scratch)
    cluster.add_workers(1, prefix=[*prefix, mount.replace("exec", fill + "exec"), name])
    cluster.wait_for(WORKERS - 1)
    client = trial.run(cluster.address)
    trial.was_struck = client.is_alive
    trial.expect(client.ended(), 0)
    trial.expect_equal()


def other_version(trial: Trial) -> None:
    """One worker has another version of lazymerge: the command refuses to begin, or, where that
    worker came later, gives the work to others."""
    copy = trial.folder / "other"
    shutil.copytree(REPOSITORY / "lazymerge", copy / "lazymerge", ignore=_compiled)
    version = copy / "lazymerge" / "version.py"
    version.write_text(version.read_text() + '\n__version__ = "0.0.1"\n')
    path = os.pathsep.join([str(copy), *_paths(trial)])
    _foreign(trial, {"PYTHONPATH": path}, "0.0.1")


def _compiled(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "__pycache__"]


def _paths(trial: Trial) -> list[str]:
    return trial.bench.environment["PYTHONPATH"].split(os.pathsep)


def no_lazymerge(trial: Trial) -> None:
    """One worker has no lazymerge: as with another version."""
    (trial.folder / "none").mkdir()
    (trial.folder / "none" / "lazymerge.py").write_text(
        "raise ImportError(\"No module named 'lazymerge'\")\n"
    )
    path = os.pathsep.join([str(trial.folder / "none"), *_paths(trial)])
    _foreign(trial, {"PYTHONPATH": path}, "lazymerge")


def _foreign(trial: Trial, environment: dict[str, str], says: str) -> None:
    if trial.random.random() < 0.5:
        cluster = _with_one(trial, environment=environment)
        ended = trial.run(cluster.address).ended()
        trial.was_struck = True
        trial.expect(ended, 2, says=says)
        left = sorted(path.name for path in trial.output.glob("**/*"))
        if left:
            trial.complain(f"nothing was begun, and there is left: {left}")
        trial.signal(trial.workers()[-1].pid, signal.SIGKILL, "that worker")
        return
    cluster = Cluster(trial)
    cluster.add_workers(WORKERS - 1)
    cluster.wait_for(WORKERS - 1)
    client = trial.run(cluster.address)
    trial.when(0.05, client)
    cluster.add_workers(1, environment=environment)
    trial.was_struck = client.is_alive
    trial.expect(client.ended(), 0)
    for worker in trial.workers():
        if worker.name == f"worker{WORKERS - 1}" and any(
            line.split()[2] == "ends" for line in trial.lines(worker.pid)
        ):
            trial.complain("the worker with another version has made tensors")
    trial.expect_equal()


def little_memory(trial: Trial) -> None:
    """One worker has less memory than a group needs, or all have."""
    if trial.random.random() < 0.5:
        cluster = _with_one(trial, memory_limit="100MiB", nannies=False)
        _expect_the_others_do_it(trial, cluster, is_plain=True)
        return
    cluster = Cluster(trial, nannies=False)
    cluster.add_workers(memory_limit="100MiB")
    cluster.wait_for(WORKERS)
    ended = trial.run(cluster.address, is_plain=True).ended()
    trial.was_struck = True
    trial.expect(ended, 3, says="the smallest limit that works is --memory")


def no_plugin(trial: Trial) -> None:
    """The plugin that the recipe needs is not there on one worker, or is another file."""
    merge = trial.bench.merge_by_plugin
    assert merge.plugin is not None
    copy = trial.folder / "plugins" / merge.plugin.name
    copy.parent.mkdir()
    shutil.copy(merge.plugin, copy)
    cluster = _with_one(trial, prefix=_hidden(copy.parent))
    client = trial.run(cluster.address, "--plugin", str(copy), merge=merge)
    trial.expect(client.ended(), 0)
    worker = max(trial.workers(), key=lambda worker: worker.name)
    trial.was_struck = not any(line.split()[2] == "ends" for line in trial.lines(worker.pid))
    trial.expect_equal(merge)
