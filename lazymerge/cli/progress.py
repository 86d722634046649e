"""The live display of a run: on a terminal a bar and a line of figures, elsewhere plain lines."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..engine.baseline import peak_resident_bytes
from ..engine.plan import Plan
from ..engine.report import Observer, RunReport
from ..sizes import format_bytes, format_memory, format_seconds
from .console import escaped

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

REFRESHES_PER_SECOND = 8
PLAIN_SECONDS = 10.0
"""Between two lines where there is no terminal."""
RATE_WINDOW_SECONDS = 5.0
"""The rate shown is that of the last seconds, not of the whole run."""


class Progress:
    """Counts what the workers report."""

    def __init__(self, plan: Plan, console: Console | None) -> None:
        """console: for notes; None: there are none."""
        self.plan = plan
        self._console = console
        self.total_bytes = plan.bytes_read + sum(
            tensor.size_bytes for shard in plan.shards for tensor in shard.tensors
        )
        self.done_bytes = 0
        self.tensors = 0
        self.current = ""
        self.began = time.monotonic()
        self._lock = threading.Lock()
        self._history: deque[tuple[float, int]] = deque([(self.began, 0)])

    def moved(self, bytes_read: int, bytes_written: int, tensor: str) -> None:
        with self._lock:
            self.done_bytes += bytes_read + bytes_written
            self.current = tensor

    def finished(self, tensor: str) -> None:
        with self._lock:
            self.tensors += 1

    def resumed(self, bytes_read: int, bytes_written: int, tensors: int) -> None:
        self.done_bytes = bytes_read + bytes_written
        self.tensors = tensors
        self._history = deque([(time.monotonic(), self.done_bytes)])
        self.noted(
            f"{tensors} of {len(self.plan.tensors)} tensors are there already "
            f"({format_bytes(bytes_written)} of {format_bytes(self.plan.bytes_written)})"
        )

    def noted(self, message: str) -> None:
        if self._console is not None:
            self._console.print(message, soft_wrap=True)

    @property
    def fraction(self) -> float:
        return min(1.0, self.done_bytes / self.total_bytes) if self.total_bytes else 1.0

    def rate(self) -> float:
        """Bytes per second, read and written, over the last seconds."""
        now = time.monotonic()
        self._history.append((now, self.done_bytes))
        while len(self._history) > 2 and now - self._history[0][0] > RATE_WINDOW_SECONDS:
            self._history.popleft()
        then, before = self._history[0]
        return (self.done_bytes - before) / max(now - then, 1e-6)

    def place(self) -> str:
        """The layer or tensor being worked on."""
        found = self.plan.stacks.locate(self.current)
        if found is None:
            return escaped(self.current)  # what is live is not escaped by the console
        return escaped(f"{found.stack.prefix}.{found.index} of {found.stack.layer_count}")

    def figures(self) -> list[str]:
        """Bytes, tensors, rate, time left, memory."""
        rate = self.rate()
        left = max(0, self.total_bytes - self.done_bytes)
        eta = format_seconds(left / rate) if rate > 0 else "–"
        return [
            f"{format_bytes(self.done_bytes)} of {format_bytes(self.total_bytes)}",
            f"{self.tensors} of {len(self.plan.tensors)} tensors",
            f"{format_bytes(rate)}/s",
            f"{eta} left",
            f"memory {format_memory(peak_resident_bytes())}",
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right", width=5)
        bar.add_row(ProgressBar(total=1.0, completed=self.fraction), f"{self.fraction * 100:.0f} %")
        yield bar
        separator = " · "
        line = Text(overflow="ellipsis", no_wrap=True)
        for number, figure in enumerate(self.figures()):
            line.append(separator if number else "", style="dim").append(figure)
        yield line
        yield Text(self.place(), style="dim", overflow="ellipsis", no_wrap=True)


@contextmanager
def progress_display(plan: Plan, console: Console, *, quiet: bool) -> Iterator[Observer]:
    """Shows a run's progress while the block runs, and yields the observer to feed."""
    progress = Progress(plan, None if quiet else console)
    if quiet:
        yield progress
        return
    if console.is_terminal:
        from rich.live import Live

        with Live(
            progress,
            console=console,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
        ):
            yield progress
        return
    stop = threading.Event()

    def report() -> None:
        while not stop.wait(PLAIN_SECONDS):
            percent = f"{progress.fraction * 100:.0f} %"
            line = ", ".join([percent, *progress.figures(), progress.place()])
            console.print(line, soft_wrap=True)

    thread = threading.Thread(target=report, name="progress", daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        stop.set()
        thread.join()


def done_line(plan: Plan, report: RunReport) -> RenderableType:
    """What is said when all is done."""
    from rich.text import Text

    moved = report.bytes_read + report.bytes_written
    made = len(plan.tensors) - report.resumed_tensors
    earlier = f" ({report.resumed_tensors} were there)" if report.resumed_tensors else ""
    return Text.assemble(
        ("done", "green"),
        f" in {format_seconds(report.seconds)}: {made} tensors{earlier}, "
        f"{format_bytes(report.bytes_written)} written, "
        f"{format_bytes(moved / report.seconds)}/s, "
        f"peak memory {format_memory(report.measured_bytes)} "
        f"(projected {format_memory(plan.memory.projected_bytes)}, "
        f"limit {format_memory(plan.memory.limit_bytes)})",
    )
