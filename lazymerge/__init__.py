"""lazymerge: merge model checkpoints that do not fit in memory.

    import lazymerge as lm

    plan = lm.plan("recipe.yml", memory="2GiB")
    print(plan.summary())
    lm.run(plan, "out/")

Importing the package imports neither torch nor anything else that is heavy.
"""

from .version import __version__

__all__ = ["__version__"]
