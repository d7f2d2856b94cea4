"""What a person reads while something runs."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text


def announce(console: Console, what: str, detail: str) -> None:
    """One line of the story of a run."""
    console.print(Text.assemble((f"{what:<11} ", "bold"), detail))
