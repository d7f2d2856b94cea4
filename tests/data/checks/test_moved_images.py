"""Images that a template shows elsewhere are counted per source, and those in their places are not."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.rows.test_records import row
from tests.vlms import FAMILIES, PROCESSORS
from visper.common.errors import DataError
from visper.config import Source
from visper.data.chat_template import behind_images
from visper.data.checks.moved_images import moved_images, require_task_tokens
from visper.data.checks.report import check
from visper.data.rows.lengths import measure
from visper.data.rows.parts import open_parts
from visper.data.rows.records import DropList
from visper.data.rows.sources import open_records
from visper.data.vlm import encoder_for

FIRST = ["<image><image>\nSame?", "<image>\nWhat?", "What is it?\n<image>", "What?"]
INSIDE = ["Is <image> or <image> larger?", "<image>\nor <image>?", "<image><image>", "<image>Behind<image>"]


def sources(folder: Path, **questions: list[str]) -> list[Source]:
    for name, asked in questions.items():
        rows: list[dict[str, Any]] = [
            {**row(text, "Yes."), "image": [f"{i}.png" for i in range(text.count("<image>"))]} for text in asked
        ]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return [Source(json_file=str(folder / f"{name}.json"), images=str(folder)) for name in questions]


def warnings_of(family: str, given: list[Source]) -> list[str]:
    encoder = encoder_for(PROCESSORS[family]())
    records = open_records(given, DropList())
    return moved_images(records, measure(records, encoder, quiet=True), encoder)


def test_images_that_the_template_moves_are_counted_in_each_source(tmp_path: Path) -> None:
    given = sources(tmp_path, first=FIRST, inside=[*FIRST, *INSIDE])
    (warning,) = warnings_of("llava_onevision", given)
    assert "inside the text of 3 conversations of 'inside' (" in warning and "inside/4/" in warning
    (part,) = open_parts(given[1:])
    found = check("inside", part, encoder_for(PROCESSORS["llava_onevision"]()), quiet=True, workers=1)
    assert found.warnings == [warning]


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_images_that_stay_in_their_places_are_not(family: str, tmp_path: Path) -> None:
    assert warnings_of(family, sources(tmp_path, inside=[*FIRST, *INSIDE])) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_images_without_task_tokens_of_their_own_are_refused(family: str, tmp_path: Path) -> None:
    processor = PROCESSORS[family]()
    processor.tokenizer.add_tokens(["<depth>"], special_tokens=True)
    processor.chat_template = behind_images(processor.chat_template, "<depth>")
    encoder = encoder_for(processor)

    def require(**questions: list[str]) -> None:
        records = open_records(sources(tmp_path, **questions), DropList())
        require_task_tokens(records, measure(records, encoder, quiet=True), encoder, "<depth>")

    require(single=FIRST[1:])
    if family != "llava_onevision":
        require(several=[*FIRST, *INSIDE])
        return
    with pytest.raises(DataError, match=r"behind the last, in 5 conversations \(first: several/0/"):
        require(several=[*FIRST, *INSIDE])
