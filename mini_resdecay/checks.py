"""Answers to the exercises: right, or the name of the mistake.

    check("ex-01-3", my_function)        # Not yet: it looks as if you left out the shortcut.

An exercise is a solution, cases to try it on, and the mistakes that people make, each of them
written out: an answer that behaves like a mistake is told which one it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .shortcuts import known


@dataclass(frozen=True)
class Exercise:
    """`solution` and `mistakes` (message -> answer) are functions, tried on `cases`, or values.

    A case is a tuple of arguments. `tolerance` is relative, and absolute near zero.
    """

    solution: Any
    mistakes: Mapping[str, Any]
    cases: Sequence[tuple[Any, ...]] = ()
    tolerance: float = 1e-5


@dataclass(frozen=True)
class Verdict:
    """What `check` says: true in an `assert` if the answer is right; printed as its message."""

    right: bool
    message: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return f"{'Right' if self.right else 'Not yet'}: {self.message}"


def check(label: str, answer: Any) -> Verdict:
    """Compare an answer (a value, or a function) with the exercise `label`, such as "ex-01-3".

    Raises ValueError for an unknown label.
    """
    exercise = EXERCISES[known("label", label, EXERCISES)]
    if callable(exercise.solution) and not callable(answer):
        return Verdict(False, f"this exercise wants a function, got {type(answer).__name__}.")
    try:
        got = _outcomes(answer, exercise.cases)
    except Exception as error:  # whatever a reader's code raises is an answer of its own
        return Verdict(False, f"your code stopped with {type(error).__name__}: {error}")
    if any(value is None for value in got):
        return Verdict(False, "nothing came back yet. Does the function return its result?")
    if _same(got, _outcomes(exercise.solution, exercise.cases), exercise.tolerance):
        return Verdict(True, "well done.")
    for message, mistake in exercise.mistakes.items():
        if _same(got, _outcomes(mistake, exercise.cases), exercise.tolerance):
            return Verdict(False, message)
    return Verdict(False, "not one of the usual mistakes. Try it on a case you can do by hand.")


def _outcomes(answer: Any, cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [answer(*_copied(case)) for case in cases] if callable(answer) else [answer]


def _copied(case: tuple[Any, ...]) -> tuple[Any, ...]:
    """A reader's function may write into its arguments; the next one must not see that."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in case)


def _same(got: Any, wanted: Any, tolerance: float) -> bool:
    if isinstance(wanted, str | bool) or isinstance(got, str | bool):
        return type(got) is type(wanted) and got == wanted
    if isinstance(wanted, list | tuple) and isinstance(got, list | tuple):
        pairs = zip(got, wanted, strict=False)
        return len(got) == len(wanted) and all(_same(a, b, tolerance) for a, b in pairs)
    try:
        a, b = (torch.as_tensor(value, dtype=torch.float64) for value in (got, wanted))
    except (TypeError, ValueError, RuntimeError):
        return False
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


# ---- Chapter 1 -------------------------------------------------------------------------------

CHAPTER_1: dict[str, Exercise] = {}

# ---- Chapter 2 -------------------------------------------------------------------------------

CHAPTER_2: dict[str, Exercise] = {}

# ---- Chapter 3 -------------------------------------------------------------------------------

CHAPTER_3: dict[str, Exercise] = {}

EXERCISES: dict[str, Exercise] = {**CHAPTER_1, **CHAPTER_2, **CHAPTER_3}
