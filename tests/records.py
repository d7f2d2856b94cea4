"""Records of a test as rows of a source, with the images where they are."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from visper.data.checks.report import Report, check
from visper.data.rows.parts import json_source, open_parts
from visper.data.rows.records import Record
from visper.data.rows.table import ROLE_LETTERS, Part, Records, RecordTable, write_table


def records_of(folder: Path, records: Sequence[Record]) -> Records:
    """``records`` from a table in ``folder``; their ids become ``own/ROW/ID``."""
    rows = []
    for record in records:
        images = [{**asdict(image), "path": str(Path(image.path).absolute()).lstrip("/")} for image in record.images]
        first = {"image": images[0]["path"], "image_turn": images[0]["turn"], "images": images} if images else {}
        roles, texts = "".join(ROLE_LETTERS[turn.role] for turn in record.turns), [turn.text for turn in record.turns]
        rows.append({"id": record.id, **first, "image_tags": len(images), "roles": roles, "texts": texts})
    write_table(rows, folder / "own.arrow")
    return Records([Part("own", RecordTable(folder / "own.arrow"), Path("/"))])


def check_file(file: Path, images: Path, *given: Any, **options: Any) -> Report:
    """``check`` of a JSON file."""
    (part,) = open_parts([json_source(file, images)])
    return check(file, part, *given, quiet=True, **options)
