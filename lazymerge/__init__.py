"""lazymerge: merge model checkpoints that do not fit in memory.

    import lazymerge as lm

    plan = lm.plan("recipe.yml", memory="2GiB")
    print(plan.summary())
    lm.run(plan, "out/")

Importing the package imports nothing heavy; torch is loaded by the first run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import DoesNotFitError, InputError, LazymergeError, RecipeError
from .version import __version__

if TYPE_CHECKING:
    from .api import (
        diff,
        inspect,
        plan,
        plan_intermediate,
        plan_of_unfinished,
        report,
        resume,
        run,
        status,
        suspicions,
        verify,
    )
    from .engine.comparison import Comparison
    from .engine.output_report import OutputReport
    from .engine.plan import Plan
    from .engine.report import RunReport
    from .methods.plugins import load_plugin

__all__ = [
    "Comparison",
    "DoesNotFitError",
    "InputError",
    "LazymergeError",
    "OutputReport",
    "Plan",
    "RecipeError",
    "RunReport",
    "__version__",
    "diff",
    "inspect",
    "load_plugin",
    "plan",
    "plan_intermediate",
    "plan_of_unfinished",
    "report",
    "resume",
    "run",
    "status",
    "suspicions",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Loads the rest of the interface when it is first used."""
    if name in (
        "inspect",
        "diff",
        "plan",
        "plan_intermediate",
        "plan_of_unfinished",
        "report",
        "resume",
        "run",
        "status",
        "suspicions",
        "verify",
    ):
        from . import api

        return getattr(api, name)
    if name == "Plan":
        from .engine.plan import Plan

        return Plan
    if name == "Comparison":
        from .engine.comparison import Comparison

        return Comparison
    if name == "OutputReport":
        from .engine.output_report import OutputReport

        return OutputReport
    if name == "load_plugin":
        from .methods.plugins import load_plugin

        return load_plugin
    if name == "RunReport":
        from .engine.report import RunReport

        return RunReport
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
