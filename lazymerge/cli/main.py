"""The `lazymerge` command: its subcommands, and how failures become exit codes.

0 done · 1 a failure at run time · 2 wrong usage, recipe or input · 3 does not fit · 130 interrupted
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from ..engine import torch_loading
from ..errors import LazymergeError, printable
from ..version import __version__
from . import (
    diff,
    inspect,
    join,
    methods,
    plan,
    report,
    resume,
    run,
    running,
    schema,
    status,
    verify,
)

EXIT_INTERRUPTED = 130

# typer uses the installed click or, in newer versions, a copy of its own; the common ancestor of
# its usage errors is found through the one of them that typer exports.
_UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="lazymerge",
    help="Merge model checkpoints that do not fit in memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(plan.plan)
app.command()(run.run)
app.command()(resume.resume)
app.command()(join.join)
app.command()(status.status)
app.command()(report.report)
app.command()(diff.diff)
app.command()(verify.verify)
app.command()(inspect.inspect)
app.command()(methods.methods)
app.command()(schema.schema)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lazymerge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main(program: Callable[[], object] = lambda: app(standalone_mode=False)) -> NoReturn:
    """Runs the command line and exits.

    program: what to run; returns its exit code, or something else for 0.
    """
    for name in ("SIGTERM", "SIGHUP"):  # as Ctrl-C: stop in good order; a second one, at once
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_DFL:
            signal.signal(getattr(signal, name), _interrupt)
    try:
        code = program()
        if code == EXIT_INTERRUPTED:  # what newer versions of typer make of Ctrl-C
            raise KeyboardInterrupt
    except _UsageError as error:
        error.show()
        code = error.exit_code
    except LazymergeError as error:
        _say(str(error))
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted")
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # whoever read our output has gone; say no more, not even while closing stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) and error.filename is not None:
            name = os.fsdecode(error.filename)
            _say(f"{name}: {error.strerror}; use another path")
            code = 2
        else:
            _say(str(error))
            code = 1
    for words in running.advice:
        _say(words)
    running.advice.clear()
    sys.exit(code if isinstance(code, int) else 0)


def command(run: Callable[[], NoReturn] = main) -> NoReturn:
    """The console script: `main`, then the quickest way out.

    Python takes 0.3 to 0.8 s to take torch apart again at exit (measured with torch 2.13), and
    nothing is left to do by then: files are closed and threads joined.
    """
    torch_loading.is_own_process = True
    try:
        run()
    except SystemExit as exit_:
        code = exit_.code
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = 1
    remote = sys.modules.get("lazymerge.checkpoint.remote")
    if remote is not None:  # it may have folders of small files
        remote.remove_folders()
    os._exit(code if isinstance(code, int) else 1)


def _say(message: str) -> None:
    """A message on stderr, every line under the program's name."""
    for line in message.splitlines():
        print(f"lazymerge: {printable(line)}", file=sys.stderr)
