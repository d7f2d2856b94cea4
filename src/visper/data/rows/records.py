"""LLaVA's JSON and JSONL files as records: one image at most, turns with roles, bad rows named and counted.

A source is a conversation file and the folder its image paths start from. Published files hold string and integer
ids that repeat, first turns from the model, text rows that contain the literal tag, image rows without one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from visper.common.errors import DataError
from visper.common.files import write_text
from visper.data.rows.json_rows import read_rows

IMAGE_TAG = "<image>"
ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


_HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation, without its image tag."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation. ``image_turn`` is the index of the turn that shows the image; both image fields or none."""

    id: str
    turns: tuple[Turn, ...]
    image: str | None = None
    image_turn: int | None = None


@dataclass(frozen=True, slots=True)
class Drop:
    """A row left out, with the reason it is counted under and what was found."""

    sample_id: str
    reason: str
    detail: str = ""


class DropList:
    """The rows left out of a run, each counted once however often it is met.

    Rows of a list that the run names (``data.drop_list``) are written with the others, but are agreed: no limit counts
    them.
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
        """Notes a bad row; the first reason of a row stays."""
        self._drops.setdefault(sample_id, Drop(sample_id, reason, detail))

    def extend(self, drops: Iterable[Drop]) -> None:
        """Notes the drops that a batch or another list brings."""
        for drop in drops:
            self.add(drop.sample_id, drop.reason, drop.detail)

    def counts(self) -> dict[str, int]:
        """Rows per reason, most frequent first."""
        return dict(Counter(drop.reason for drop in self).most_common())

    def write(self, path: Path) -> None:
        """Writes one JSON object a line (``sample_id``, ``reason``, ``detail``), the whole file or nothing."""
        write_text(
            path,
            "".join(json.dumps(asdict(drop), ensure_ascii=False) + "\n" for drop in [*self.agreed.values(), *self]),
        )

    @staticmethod
    def read(path: Path) -> list[Drop]:
        """The drops that ``write`` wrote.

        Raises:
            DataError: the file is missing or is no drop list.
        """
        try:
            return [Drop(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
        except FileNotFoundError as error:
            raise DataError("no such file", f"'{path}': expected a drop list; check 'data.drop_list'") from error
        except (TypeError, ValueError) as error:
            raise DataError(
                "not a drop list", f"'{path}': expected lines of sample_id, reason and detail: {error}"
            ) from error

    def check(self, total: int, limit: float) -> None:
        """Refuses a run that would lose too much.

        Args:
            total: rows read, good and bad.
            limit: share of bad rows that is still accepted, 0 to 1.

        Raises:
            DataError: the share of bad rows is above ``limit``, or no good row is left.
        """
        if len(self) <= limit * total and (len(self) < total or total == 0):
            return
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.counts().items())
        first = next(iter(self))
        raise DataError(
            "too many bad rows",
            f"{len(self)} of {total} rows ({len(self) / total:.1%}), allowed {limit:.1%}: {reasons}; the first is "
            f"'{first.sample_id}' ({first.reason}: {first.detail}). Repair the data or raise 'data.drop_limit'",
        )


def image_names(file: Path) -> Iterator[str]:
    """The image paths that a conversation file names, as they stand there; bad rows are left to ``open_records``.

    Raises:
        DataError: the file is missing or is not a list of rows.
    """
    for row in read_rows(file):
        named = row.get("image") if isinstance(row, dict) else None
        yield from (name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str) and name)


def parse_row(row: Any, sample_id: str, images: Path) -> Record:
    """One row of LLaVA's JSON as a record. The tag, wherever it stands in its turn, is taken out of the text.

    Raises:
        DataError: the row is no conversation of alternating turns, or shows more than one image.
    """
    if not isinstance(row, dict):
        raise DataError("not a row", f"expected an object with 'conversations', found {type(row).__name__}")
    turns = _turns(row.get("conversations"))
    image = _image(row.get("image"))
    if image is None:
        return Record(sample_id, tuple(turns))
    tagged = [i for i, turn in enumerate(turns) if turn.role == "user" and IMAGE_TAG in turn.text]
    tags = sum(turns[i].text.count(IMAGE_TAG) for i in tagged)
    if tags > 1:
        raise DataError("several image tags", f"{tags} tags '{IMAGE_TAG}' for the image '{image}': one is expected")
    shown_in = tagged[0] if tagged else next(i for i, turn in enumerate(turns) if turn.role == "user")
    # As the published code does: the image leads its turn, whether the tag stood first, last or between.
    if tagged:
        turns[shown_in] = Turn("user", turns[shown_in].text.replace(IMAGE_TAG, "").strip())
    return Record(sample_id, tuple(turns), str(images / image), shown_in)


def _turns(conversations: Any) -> list[Turn]:
    if not isinstance(conversations, list) or not conversations:
        raise DataError("no conversation", f"expected a list of turns, found {str(conversations)[:80]!r}")
    turns = []
    for turn in conversations:
        role = ROLES.get(turn.get("from", "")) if isinstance(turn, dict) else None
        text = turn.get("value") if isinstance(turn, dict) else None
        if role is None or not isinstance(text, str):
            raise DataError(
                "bad turn", f"expected 'from' (one of {', '.join(ROLES)}) and 'value', found {str(turn)[:80]!r}"
            )
        if _HALF_PAIR.search(text):
            raise DataError("bad text", "half of a surrogate pair: no tokenizer can read it")
        turns.append(Turn(role, text))
    if turns[0].role == "assistant":
        turns = turns[1:]
    speakers = [turn.role for turn in turns if turn.role != "system"]
    expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(speakers))]
    if not speakers or speakers != expected or any(turn.role == "system" for turn in turns[1:]):
        found = ", ".join(turn.role for turn in turns[:6]) or "nothing"
        raise DataError("turns do not alternate", f"expected user, assistant, user, ...; found {found}")
    if len(speakers) == 1:
        raise DataError("no answer", "the conversation has no turn of the model")
    return turns


def _image(image: Any) -> str | None:
    if isinstance(image, list):
        if len(image) > 1:
            raise DataError("several images", f"{len(image)} images in one row: one is expected")
        image = image[0] if image else None
    if image is None or image == "":
        return None
    if not isinstance(image, str):
        raise DataError("bad image path", f"expected a path, found {type(image).__name__}")
    if _HALF_PAIR.search(image) or "\0" in image:
        raise DataError("bad image path", f"no file can have the name {image!r}")
    return image


def sample_id_of(name: str, index: int, row: Any) -> str:
    """How a row is called in logs and drop lists: source, place, own id."""
    own = row.get("id", "") if isinstance(row, dict) else ""
    return f"{name}/{index}/{own}".encode("utf-8", "backslashreplace").decode()


def source_names(files: Sequence[Path]) -> list[str]:
    """A name for each source: the file's, numbered where several have it."""
    stems = Counter(file.stem for file in files)
    return [file.stem if stems[file.stem] == 1 else f"{file.stem}-{i}" for i, file in enumerate(files)]
