"""The live display of a run: on a terminal a bar and what goes with it, elsewhere plain lines."""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..engine.baseline import resident_bytes
from ..engine.plan import Plan
from ..engine.report import Observer, Phase, RunReport, Silent
from ..sizes import counted, format_bytes, format_memory, format_seconds
from .console import escaped

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from .log_json import JsonLog

REFRESHES_PER_SECOND = 8
PLAIN_SECONDS = 10.0
"""Between two lines where there is no terminal."""
RATE_WINDOW_SECONDS = 5.0
"""The rate shown is that of the last seconds, not of the whole run."""
MOST_SLOWEST = 3
"""Tensors that have taken longest, of which more are not shown."""

PHASES: dict[Phase, str] = {
    "hashing": "reading the inputs for their checksums",
    "checking": "reading what an earlier run has written",
    "merging": "merging",
    "finishing": "writing the last files",
}


class Progress(Silent):
    """Counts what the workers report."""

    def __init__(
        self,
        plan: Plan,
        console: Console | None,
        log: JsonLog | None = None,
        *,
        is_elsewhere: bool = False,
    ) -> None:
        """console: for notes; None: there are none. log: is told everything, too.

        is_elsewhere: other processes merge, and this one's memory is not what counts.
        """
        self._is_elsewhere = is_elsewhere
        self.plan = plan
        self._console = console
        self._log = log
        self._bytes_to_write = sum(
            tensor.size_bytes for shard in plan.shards for tensor in shard.tensors
        )
        self._planned_bytes = plan.bytes_read + self._bytes_to_write
        self.done_bytes = self._written_bytes = 0
        self.tensors = 0
        self.current = ""
        self.phase: Phase | None = None
        self.slowest: list[tuple[float, str]] = []
        """Seconds from first block to last, and names; a heap."""
        self.began_at = time.monotonic()
        self._begun: dict[str, float] = {}
        self._lock = threading.Lock()
        self._history: deque[tuple[float, int]] = deque([(self.began_at, 0)])
        self.is_fetching = bool(plan.remote_inputs)
        self.bytes_to_fetch = plan.bytes_to_fetch
        self.fetched_bytes = 0
        self._fetch_history: deque[tuple[float, int]] = deque([(self.began_at, 0)])

    def entered(self, phase: Phase) -> None:
        self.phase = phase
        if phase == "merging":
            self._history = deque([(time.monotonic(), self.done_bytes)])
            self._fetch_history = deque([(time.monotonic(), self.fetched_bytes)])
        if self._log is not None:
            self._log.event("phase", phase=phase)

    def began(self, tensor: str) -> None:
        with self._lock:
            self._begun[tensor] = time.monotonic()

    def moved(self, bytes_read: int, bytes_written: int, tensor: str) -> None:
        with self._lock:
            self.done_bytes += bytes_read + bytes_written
            self._written_bytes += bytes_written
            self.current = tensor

    def fetched(self, size_bytes: int) -> None:
        with self._lock:
            self.fetched_bytes += size_bytes

    def finished(self, tensor: str) -> None:
        now = time.monotonic()
        with self._lock:
            self.tensors += 1
            began = self._begun.pop(tensor, None)
            seconds = 0.0 if began is None else now - began
            if began is not None:
                heapq.heappush(self.slowest, (seconds, tensor))
            if len(self.slowest) > MOST_SLOWEST:
                heapq.heappop(self.slowest)
        if self._log is not None:
            self._log.event("tensor", tensor=tensor, seconds=round(seconds, 4))

    def resumed(self, bytes_read: int, bytes_written: int, tensors: int) -> None:
        self.done_bytes = bytes_read + bytes_written
        self._written_bytes = bytes_written
        self.tensors = tensors
        self.bytes_to_fetch = 0  # what is left of it is not known
        if self._log is not None:
            self._log.event("resumed", tensors=tensors, bytes_written=bytes_written)
        self._say(
            f"{tensors} of {counted(len(self.plan.tensors), 'tensor')} "
            f"{'is' if tensors == 1 else 'are'} there already "
            f"({format_bytes(bytes_written)} of {format_bytes(self._bytes_to_write)})"
        )

    def noted(self, message: str) -> None:
        if self._log is not None:
            self._log.event("notice", message=message)
        self._say(message)

    def _say(self, message: str) -> None:
        if self._console is not None:
            self._console.print(message, soft_wrap=True)

    @property
    def total_bytes(self) -> int:
        """What there is to read and write: as planned, or more where data takes more passes than
        others do (ties over models that are nearly alike)."""
        left = max(0, self._bytes_to_write - self._written_bytes)
        return max(self._planned_bytes, self.done_bytes + left)

    @property
    def fraction(self) -> float:
        return min(1.0, self.done_bytes / self.total_bytes) if self.total_bytes else 1.0

    def rate(self) -> float:
        """Bytes per second, read and written, over the last seconds."""
        return _rate(self._history, self.done_bytes)

    def network(self) -> str:
        """What has come over the network, and how fast it comes."""
        of = f" of {format_bytes(self.bytes_to_fetch)}"
        is_known = self.fetched_bytes <= self.bytes_to_fetch
        rate = _rate(self._fetch_history, self.fetched_bytes)
        return f"{format_bytes(self.fetched_bytes)}{of * is_known} · {format_bytes(rate)}/s"

    def place(self) -> str:
        """The layer or tensor being worked on."""
        found = self.plan.stacks.locate(self.current)
        if found is None:
            return escaped(self.current)  # what is live is not escaped by the console
        return escaped(f"{found.stack.prefix}.{found.index} of {found.stack.layer_count}")

    def doing(self) -> str:
        """The phase, and where in it the workers are."""
        if self.phase is None:
            return "preparing"
        place = self.place() if self.phase == "merging" else ""
        return f"{PHASES[self.phase]} {place}".rstrip()

    def figures(self) -> list[str]:
        """Bytes, tensors, rate, time left."""
        rate = self.rate()
        left = max(0, self.total_bytes - self.done_bytes)
        eta = format_seconds(left / rate) if rate > 0 else "–"
        return [
            f"{format_bytes(self.done_bytes)} of {format_bytes(self.total_bytes)}",
            f"{self.tensors} of {counted(len(self.plan.tensors), 'tensor')}",
            f"{format_bytes(rate)}/s",
            f"{eta} left",
        ]

    def log_progress(self) -> None:
        """How far it is, for the log."""
        if self._log is None:
            return
        rate = self.rate()
        left = max(0, self.total_bytes - self.done_bytes)
        self._log.event(
            "progress",
            phase=self.phase,
            bytes_done=self.done_bytes,
            bytes_total=self.total_bytes,
            tensors=self.tensors,
            tensors_total=len(self.plan.tensors),
            bytes_per_second=round(rate),
            seconds_left=round(left / rate, 1) if rate > 0 else None,
            **({"bytes_fetched": self.fetched_bytes} if self.is_fetching else {}),
            resident_bytes=resident_bytes(),
            limit_bytes=self.plan.memory.limit_bytes,
        )

    def plain(self) -> str:
        """All of it in a line."""
        percent = f"{self.fraction * 100:.0f} %"
        network = [f"fetched {self.network()}".replace(" · ", " at ")] if self.is_fetching else []
        memory = [] if self._is_elsewhere else [f"memory {self._memory()}"]
        return ", ".join([percent, *self.figures(), *network, *memory, self.doing()])

    def _memory(self) -> str:
        limit = format_memory(self.plan.memory.limit_bytes)
        return f"{format_memory(resident_bytes())} of {limit}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right", width=5)
        bar.add_row(ProgressBar(total=1.0, completed=self.fraction), f"{self.fraction * 100:.0f} %")
        yield bar
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", no_wrap=True)
        facts.add_column(overflow="ellipsis", no_wrap=True)
        line = Text()
        for number, figure in enumerate(self.figures()):
            line.append(" · " if number else "", style="dim").append(figure)
        facts.add_row("done", line)
        if self.is_fetching:
            facts.add_row("network", Text(self.network()))
        facts.add_row("now", Text(self.doing()))
        if not self._is_elsewhere:
            memory = Table.grid(padding=(0, 2))
            share = resident_bytes() / max(1, self.plan.memory.limit_bytes)
            shown_share = ProgressBar(total=1.0, completed=min(1.0, share), width=20)
            memory.add_row(shown_share, self._memory())
            facts.add_row("memory", memory)
        with self._lock:
            slowest = sorted(self.slowest, reverse=True)
        for number, (seconds, tensor) in enumerate(slowest):
            shown = Text.assemble((f"{format_seconds(seconds):>7}  ", "dim"), escaped(tensor))
            facts.add_row("" if number else "slowest", shown)
        yield facts


def _rate(history: deque[tuple[float, int]], done: int) -> float:
    """Bytes per second over the last seconds. history: times and what was done by then; what is
    done now is added to it."""
    now = time.monotonic()
    history.append((now, done))
    while len(history) > 2 and now - history[0][0] > RATE_WINDOW_SECONDS:
        history.popleft()
    then, before = history[0]
    return (done - before) / max(now - then, 1e-6)


@contextmanager
def progress_display(
    plan: Plan,
    console: Console,
    *,
    quiet: bool,
    log: JsonLog | None = None,
    is_elsewhere: bool = False,
) -> Iterator[Observer]:
    """Shows a run's progress while the block runs, and yields the observer to feed.

    quiet: shows nothing. log: is told everything, even so. is_elsewhere: as of Progress.
    """
    progress = Progress(plan, None if quiet else console, log, is_elsewhere=is_elsewhere)
    with _every(log.seconds if log else 0.0, progress.log_progress):
        if quiet:
            yield progress
        elif console.is_terminal:
            from rich.live import Live

            with Live(
                progress,
                console=console,
                refresh_per_second=REFRESHES_PER_SECOND,
                transient=True,
            ):
                yield progress
        else:
            with _every(PLAIN_SECONDS, lambda: console.print(progress.plain(), soft_wrap=True)):
                yield progress


@contextmanager
def _every(seconds: float, call: Callable[[], object]) -> Iterator[None]:
    """Calls something again and again while the block runs. seconds: between calls; 0: never."""
    if not seconds:
        yield
        return
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(seconds):
            call()

    thread = threading.Thread(target=repeat, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def done_line(plan: Plan, report: RunReport) -> RenderableType:
    """What is said when all is done."""
    from rich.text import Text

    moved = report.bytes_read + report.bytes_written
    made = len(plan.tensors) - report.resumed_tensors
    before = report.resumed_tensors
    earlier = f" ({before} {'was' if before == 1 else 'were'} there)" if before else ""
    size = report.bytes_fetched
    fetched = f"{format_bytes(size)} fetched, " if size else ""
    return Text.assemble(
        ("done", "green"),
        f" in {format_seconds(report.seconds)}: {counted(made, 'tensor')}{earlier}, "
        f"{format_bytes(report.bytes_written)} written, {fetched}"
        f"{format_bytes(moved / report.seconds)}/s, "
        f"peak memory {format_memory(report.measured_bytes)} ",
        _of_a_worker(report.cluster)
        if report.cluster
        else f"(projected {format_memory(plan.memory.projected_bytes)}, "
        f"limit {format_memory(plan.memory.limit_bytes)})",
    )


def _of_a_worker(cluster: Mapping[str, Any]) -> str:
    workers, groups, repeated = (cluster[key] for key in ("workers", "groups", "repeated"))
    again = f", {repeated} more than once" if repeated else ""
    made = f"{counted(workers, 'worker')} made {counted(groups, 'group')} of tensors"
    projected = format_memory(cluster["projected_bytes"])
    return f"of a worker (projected {projected}; {made}{again})"
