"""Everything that is wrong with a recipe, gathered to be said at once."""

from __future__ import annotations

from ..errors import Position, Problem
from .source import PROBLEM_LIMIT, recipe_error


class Reporter:
    """Gathers problems and warnings of one recipe."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []

    def report(self, message: str, position: Position) -> None:
        """Notes something that is wrong.

        Raises:
            RecipeError: that is enough.
        """
        self.problems.append(Problem(message, position))
        if len(self.problems) > PROBLEM_LIMIT:
            raise recipe_error(self._path, self.problems)

    def warn(self, message: str, position: Position) -> None:
        """Notes something that is of no effect."""
        self.warnings.append(Problem(message, position))

    def warnings_in_order(self) -> tuple[Problem, ...]:
        """The warnings, as they stand in the recipe."""
        return tuple(sorted(self.warnings, key=lambda w: w.position or Position(0, 0)))
