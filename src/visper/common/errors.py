"""Errors shown to users: each says what was found, what was expected and what to do.

An exception that is neither a ``VisperError`` nor an ``OSError`` (such as a full disk) is a bug, and the command line
shows its traceback.
"""

from __future__ import annotations

import signal
from typing import Any


class VisperError(Exception):
    """An error that the user can act on; the command line prints only its message."""

    exit_code: int = 2
    shared = False
    """Whether every process of the run raises it, so that only the first one prints it."""


class ConfigError(VisperError, ValueError):
    """A recipe, an override or an argument is wrong. The message lists every fault found, one per line."""


class DataError(VisperError, ValueError):
    """Data that cannot be used. ``reason`` is a short name used for counting, ``detail`` says what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


class TrainingError(VisperError, ArithmeticError):
    """Training went wrong: a loss that is not finite, a spike, a dead loss term. The message names the rows."""


class StoppedError(VisperError, RuntimeError):
    """The run was told to stop and has saved its state."""

    exit_code = 128 + signal.SIGTERM
    shared = True


class ProcessFailedError(VisperError, RuntimeError):
    """A process of the run failed, and the launcher has stopped the others.

    Args:
        code: the process's exit code, or minus the number of the signal that ended it.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = code if code > 0 else 128 - code


def kind_of(value: Any) -> str:
    """What a value of a JSON or YAML file is, in words: "a list", "an object", "a text" ..."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", int: "a number"}
    kinds |= {float: "a number", type(None): "nothing"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 file", "2 files"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def first_line(error: Exception) -> str:
    """The first line of another library's message, as a sentence."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if line.endswith((".", "!", "?")) else line + "."
