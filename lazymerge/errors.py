"""What can go wrong, and the exit code each kind of failure ends with.

Every message names the file, tensor or line it is about, and the remedy where there is one.
The command line prints the message and nothing else: a traceback is a bug.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


def printable(text: str) -> str:
    """A text with whatever would steer a terminal shown as an escape; line breaks stay.

    Names from files may hold anything.
    """
    return "".join(
        character
        if character.isprintable() or character == "\n"
        else character.encode("unicode_escape").decode()
        for character in text
    )


def brief(error: BaseException, most: int = 300) -> str:
    """An error of Python's in short: what a damaged file holds may be megabytes."""
    text = repr(error)
    return text if len(text) <= most else f"{text[:most]}…"


class LazymergeError(Exception):
    """A failure at run time (exit code 1)."""

    exit_code = 1


class InputError(LazymergeError):
    """Wrong usage, or an input that cannot be used as it is (exit code 2)."""

    exit_code = 2


class InputAtFaultError(InputError):
    """What an input holds cannot be merged: when it has been put right, it is another merge."""


class DoesNotFitError(LazymergeError):
    """The merge needs more memory or disk than there is (exit code 3)."""

    exit_code = 3


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in a text file; both numbers count from 1, as editors do."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a recipe.

    position: where in the recipe; None when it concerns the file as a whole.
    message: what is wrong, what was expected and, where known, the remedy. One sentence or two.
    """

    message: str
    position: Position | None = None


class RecipeError(InputError):
    """Everything that is wrong with a recipe, gathered and raised once.

    str() gives one line `path:line:column: message` per problem, in the order of the file.
    """

    def __init__(self, path: Path | str, problems: Sequence[Problem]) -> None:
        self.path = str(path)
        self.problems = tuple(
            sorted(problems, key=lambda p: p.position if p.position else Position(0, 0))
        )
        super().__init__("\n".join(self._line(problem) for problem in self.problems))

    def _line(self, problem: Problem) -> str:
        if problem.position is None:
            return f"{self.path}: {problem.message}"
        return f"{self.path}:{problem.position.line}:{problem.position.column}: {problem.message}"


class InputErrors(InputError):
    """Several things wrong with the inputs, gathered and raised once, one line each."""

    def __init__(self, messages: Sequence[str]) -> None:
        self.messages = tuple(messages)
        super().__init__("\n".join(self.messages))
