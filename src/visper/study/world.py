"""The study's data: captions that name objects and their places in the image but never depth, and limited labels.

world/
  images/              train_000000.png ..., held_out_000000.png ...
  pretrain.json        one conversation per scene: its caption, the places of all objects twice, the name at one place
  pretrain_more.json   the same for more scenes
  instruct_N.json      about N questions, all those of randomly drawn scenes; smaller sets are subsets of larger ones
  questions.json       held-out questions of the quickstart's four kinds, and NEAREST, which is never asked in training
  held_out.npz         exact maps of the held-out scenes
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visper.common.lock import new_folder
from visper.quickstart.questions import Objects, Question, draw_questions
from visper.quickstart.world import (
    HELD_OUT_SERIES,
    TURNS,
    evaluation_record,
    evaluation_records,
    image_first,
    pretrain_pairs,
    record,
    write_json,
    write_split,
)
from visper.study.arms import Size

NEAREST = "nearest"
NEAREST_TEXT = "Which is closer to the camera ?"
"""A depth question about all objects at once; questions in training name the two objects to compare."""


def write_study_world(folder: Path, seed: int, size: Size) -> None:
    """Writes the world atomically; the same arguments give the same files."""
    with new_folder(folder) as beside:
        (beside / "images").mkdir(parents=True)
        known = write_split(beside, "train", seed, size.more)
        asked = write_split(beside, "held_out", seed + HELD_OUT_SERIES, size.held_out)
        rows = list(pretrain_records(known, np.random.default_rng([seed, 11])))
        write_json(beside / "pretrain.json", rows[: size.scenes])
        write_json(beside / "pretrain_more.json", rows)
        questions = draw_questions(known[: size.scenes], seed)
        for number in size.labels:
            write_json(beside / f"instruct_{number}.json", list(instruct_records(known, questions, seed, number)))
        asks = draw_questions(asked, seed + HELD_OUT_SERIES, size.per_kind)
        write_json(
            beside / "questions.json", [*evaluation_records(asked, asks), *nearest_records(asked, size.per_kind)]
        )


def pretrain_records(scenes: Sequence[Objects], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """One conversation per scene that never mentions depth."""
    for index, objects in enumerate(scenes):
        yield record(f"scene_{index:06d}", index, image_first(pretrain_pairs(objects, rng, depth=False)))


def instruct_records(
    scenes: Sequence[Objects], questions: Sequence[Question], seed: int, most: int
) -> Iterator[dict[str, Any]]:
    """All questions about randomly drawn scenes, until there are at least ``most`` questions."""
    by_scene: dict[int, list[Question]] = {}
    for question in questions:
        by_scene.setdefault(question.scene, []).append(question)
    rng, number = np.random.default_rng([seed, 12]), 0
    for scene in rng.permutation(sorted(by_scene)):
        mine = by_scene[int(scene)]
        pairs = [(q.text(scenes[q.scene]), q.answer) for q in (mine[i] for i in rng.permutation(len(mine)))]
        for start in range(0, len(pairs), TURNS):
            yield record(f"scene_{scene:06d}_{start}", int(scene), image_first(pairs[start : start + TURNS]))
        number += len(mine)
        if number >= most:
            return


def nearest_records(scenes: Sequence[Objects], most: int) -> list[dict[str, str]]:
    """One question per scene: which of all objects is nearest; the answer is its name."""
    return [
        evaluation_record(index, NEAREST_TEXT, min(objects, key=lambda thing: thing.depth).name, NEAREST)
        for index, objects in enumerate(scenes[:most])
    ]
