"""Untrusted text is printed as plain text: no control characters, no markup."""

import io
import re
from pathlib import Path

import pytest
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from visper.common.console import Console, announce, printable, track

SOURCES = Path(__file__).parents[2] / "src"
HOSTILE = "a\x1b]0;owned\x07\x1b[2J\x9b31m\u202eb\ud800[/red][link=http://evil]:smile:"
SHOWN = r"\x1b[2J\x9b31m\u202eb\ud800[/red]"  # a cell of a table is cut behind
WAYS = {
    "print": lambda console: console.print(HOSTILE),
    "a Text": lambda console: announce(console, "rows", HOSTILE),
    "a style": lambda console: console.print(Text(HOSTILE, style="red"), style="bold"),
    "a table": lambda console: console.print(_table()),
    "a progress bar": lambda console: list(track([1, 2], HOSTILE, console=console)),
}


def _table():
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    return table


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_printed_holds_no_command_to_the_terminal(way, terminal):
    file = io.StringIO()
    WAYS[way](Console(file=file, force_terminal=terminal, width=300))
    shown = file.getvalue()
    assert SHOWN in re.sub(r"\x1b\[[\d;]*m", "", shown)
    # Of the terminal's commands only rich's own are left: colors, the cursor of a progress bar.
    assert not set(re.sub(r"\x1b\[[?\d;]*[mhlAK]|\r|\n", "", shown)) & set("\x1b\x07\x9b\u202e\ud800\r")


def test_progress_still_moves_the_cursor():
    file = io.StringIO()
    with Progress(console=Console(file=file, force_terminal=True)) as progress:
        progress.add_task("x", total=1)
    assert "\x1b[?25l" in file.getvalue()


def test_printable_keeps_what_a_terminal_shows():
    assert printable("naïve 文字\u3000é👩\u200d💻") == "naïve 文字\u3000é👩\u200d💻"
    assert printable("a\nb\tc\x00") == r"a\nb\tc\x00" and printable("a\nb", keep="\n") == "a\nb"


def test_nothing_prints_past_this_console():
    """rich's own console would take names for markup."""
    past = re.compile(r"from rich\.console import|from rich\.progress import .*\btrack\b|from rich import print")
    files = {f.relative_to(SOURCES).as_posix() for f in SOURCES.rglob("*.py") if past.search(f.read_text("utf-8"))}
    assert not files


def test_a_line_of_the_story_is_one_line_of_a_file(tmp_path):
    written = io.StringIO()
    announce(Console(file=written, width=40), "resumed", "/a/long/path/to/checkpoints/checkpoint-4 at step 4 of 12")
    assert "checkpoint-4 at step 4" in written.getvalue() and written.getvalue().count("\n") == 1
