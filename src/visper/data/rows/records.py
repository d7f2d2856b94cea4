"""Records (conversations with their images) and drops (rows left out, counted by reason)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from visper.common.console import printable
from visper.common.errors import DataError
from visper.common.files import place_of, write_text


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation, without its image tags."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class ShownImage:
    """An image of a conversation: its path, the index of its turn, and the number of characters of the turn's text
    before it. The only image of a turn comes first."""

    path: str
    turn: int
    at: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation, with its images in reading order."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[ShownImage, ...] = ()


@dataclass(frozen=True, slots=True)
class Drop:
    """A row that is left out, with the reason (used for counting) and what was found."""

    sample_id: str
    reason: str
    detail: str = ""


class DropList:
    """The rows left out of a run, each counted once.

    ``agreed`` rows are those of the run's ``data.drop_list``: they are written with the others, but do not count toward
    the limit.
    """

    def __init__(self, drops: Iterable[Drop] = (), agreed: Iterable[Drop] = ()) -> None:
        self._drops: dict[str, Drop] = {}
        self.agreed = {drop.sample_id: drop for drop in agreed}
        self.extend(drops)

    def __len__(self) -> int:
        return len(self._drops)

    def __iter__(self) -> Iterator[Drop]:
        return iter(self._drops.values())

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._drops

    def add(self, sample_id: str, reason: str, detail: str = "") -> None:
        """Adds a bad row; the first reason of a row is kept. Control characters in ``detail`` are escaped."""
        self._drops.setdefault(sample_id, Drop(sample_id, reason, printable(detail)))

    def extend(self, drops: Iterable[Drop]) -> None:
        """Adds the drops of a batch or another list."""
        for drop in drops:
            self.add(drop.sample_id, drop.reason, drop.detail)

    def counts(self) -> dict[str, int]:
        """Rows per reason, most frequent first."""
        return dict(Counter(drop.reason for drop in self).most_common())

    def write(self, path: Path) -> None:
        """Writes one JSON object per line (``sample_id``, ``reason``, ``detail``), atomically."""
        write_text(
            path,
            "".join(json.dumps(asdict(drop), ensure_ascii=False) + "\n" for drop in [*self.agreed.values(), *self]),
        )

    @staticmethod
    def read(path: Path) -> list[Drop]:
        """Reads a file written by ``write``.

        Raises:
            DataError: the file is missing or not a drop list.
        """
        try:
            return [Drop(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
        except FileNotFoundError as error:
            raise DataError(
                "no such file", f"{place_of(path)}: expected a drop list; check 'data.drop_list'"
            ) from error
        except (TypeError, ValueError) as error:
            raise DataError(
                "not a drop list", f"'{path}': expected lines of sample_id, reason and detail: {error}"
            ) from error

    def check(self, total: int, limit: float, else_do: str = "raise 'data.drop_limit'") -> None:
        """Refuses a run that would lose too many rows.

        Args:
            total: number of rows, good and bad.
            limit: largest accepted share of bad rows, 0 to 1.
            else_do: what to do other than to repair the data, for the message.

        Raises:
            DataError: the share of bad rows is above ``limit``, or no good row is left.
        """
        if len(self) <= limit * total and (len(self) < total or total == 0):
            return
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.counts().items())
        first = next(iter(self))
        left = "" if len(self) < total else "; no row is left to train on, whatever the limit"
        remedy = f"Repair the data or {else_do}" if len(self) < total else "Repair the data"
        raise DataError(
            "too many bad rows",
            f"{len(self)} of {total} rows ({len(self) / total:.1%}), allowed {limit:.1%}: {reasons}; the first is "
            f"'{first.sample_id}' ({first.reason}: {first.detail}){left}. {remedy}",
        )


def is_supervised(answer: str) -> bool:
    """Whether training supervises an answer. An empty one, or one of white space, is only context."""
    return bool(answer.strip())


def unsupervised(answers: Iterable[str]) -> tuple[str, str] | None:
    """The reason and detail for which training leaves out a row with these answers, whatever the tokenizer, if any."""
    return None if any(map(is_supervised, answers)) else ("no supervised token", "every answer is empty")


def own_id(row: Any) -> str:
    """The row's own id with control characters escaped; empty if it has none."""
    found = row.get("id") if isinstance(row, dict) else None
    return "" if found is None else printable(str(found))


def source_names(files: Sequence[Path]) -> list[str]:
    """A name for each source: the file's stem, numbered if several files share it."""
    stems = Counter(file.stem for file in files)
    return [file.stem if stems[file.stem] == 1 else f"{file.stem}-{i}" for i, file in enumerate(files)]
