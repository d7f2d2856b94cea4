"""Rows whose images the student's chat template shows elsewhere than the rows do, or without task tokens."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from visper.common.errors import DataError, counted
from visper.data.rows.records import Record, ShownImage, Turn
from visper.data.rows.table import Records

if TYPE_CHECKING:
    from visper.data.chat import ConversationEncoder
    from visper.data.rows.lengths import Lengths

_INSIDE = Record(
    "", (Turn("user", "first second"), Turn("assistant", "yes")), (ShownImage("", 0, 5), ShownImage("", 0, 12))
)
"""A conversation with images inside and behind its text."""


def moved_images(records: Records, found: Lengths, encoder: ConversationEncoder) -> list[str]:
    """A warning for each source; reads no rows if the template keeps images in their places.

    Only rows with several images are looked at: the only image of a turn comes first (``ShownImage``).
    """
    with suppress(DataError):  # the template takes no such conversation
        if not encoder.moves_images(_INSIDE):
            return []
    several = np.flatnonzero((records.num_images > 1) & (found.lengths > 0)).tolist()
    moved: dict[int, list[int]] = {}
    for index in several:
        if encoder.moves_images(records[index]):
            moved.setdefault(records.source(index), []).append(index)
    return [
        f"the student's chat template moves images inside the text of {counted(len(rows), 'conversation')} of "
        f"'{records.parts[source].name}' (first: {records[rows[0]].id}): a text that refers to their places loses its "
        "sense. Choose a student whose template keeps them, or put the images first in the rows"
        for source, rows in moved.items()
    ]


def require_task_tokens(records: Records, found: Lengths, encoder: ConversationEncoder, token: str) -> None:
    """Checks that the template writes task tokens, of which ``token`` is the first, behind each image.

    Raises:
        DataError: some conversations have several images before the first task token.
    """
    with suppress(DataError):  # the template takes no such conversation
        if encoder.shows_behind_images(_INSIDE, token):
            return
    several = np.flatnonzero((records.num_images > 1) & (found.lengths > 0)).tolist()
    without = [index for index in several if not encoder.shows_behind_images(records[index], token)]
    if without:
        raise DataError(
            "images without task tokens",
            f"the student's chat template shows the images of a turn one after another, and task tokens only behind "
            f"the last, in {counted(len(without), 'conversation')} (first: {records[without[0]].id}): set 'at' of the "
            "tasks to image_tokens, or leave these rows out",
        )
