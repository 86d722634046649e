"""Finding merge methods that are not lazymerge's own: installed packages, and files by name."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from hashlib import blake2b
from importlib.metadata import entry_points
from pathlib import Path

from ..errors import InputError

GROUP = "lazymerge.methods"

_loaded: dict[str, str] = {}
"""Digests of the plugins' texts that this process has run, by name of the module."""


@cache
def load_installed() -> tuple[str, ...]:
    """Imports what installed packages name in the entry-point group; returns the names.

    Raises:
        InputError: one cannot be imported.
    """
    names = []
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            raise InputError(
                f"the installed plugin {entry.name} ({entry.value}) cannot be loaded: "
                f"{type(error).__name__}: {error}; update or uninstall its package"
            ) from error
        names.append(entry.name)
    return tuple(names)


def installed_versions() -> dict[str, str]:
    """Versions of the packages that `load_installed` has to do with, by name."""
    packages = [entry.dist for entry in entry_points(group=GROUP) if entry.dist is not None]
    return {package.name: package.version for package in packages}


def load_plugin(path: Path | str) -> None:
    """Runs a Python file that declares merge methods (lazymerge.methods.own). Once for each file.

    Raises:
        InputError: there is no such file, it cannot be run, or it is not what this process has run
            under that name: a cluster's worker lives longer than a plugin stays as it is.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"there is no plugin {path}")
    name = f"lazymerge_plugin_{blake2b(str(file.resolve()).encode(), digest_size=8).hexdigest()}"
    digest = plugin_digest(file)
    if name in sys.modules:
        if _loaded.get(name, digest) != digest:
            raise InputError(
                f"plugin {path} has changed since this process loaded it; start the process anew "
                "(a cluster's workers, or Python)"
            )
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise InputError(f"plugin {path} is not a Python file (it must end in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        line = _line_of(error, file)
        raise InputError(f"plugin {path}{line}: {type(error).__name__}: {error}") from error
    _loaded[name] = digest


def plugin_digest(path: Path) -> str:
    """Of a plugin's text."""
    return blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _line_of(error: Exception, file: Path) -> str:
    """Where in the file an error came from, as far as it says."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    trace = error.__traceback__
    line = ""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            line = f", line {trace.tb_lineno}"
        trace = trace.tb_next
    return line
