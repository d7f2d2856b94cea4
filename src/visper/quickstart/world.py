"""Writes the offline world to a folder: images, captions, instructions, and held-out questions with exact maps.

world/
  images/            train_000000.png ..., held_out_000000.png ...
  pretrain.json      captions and look-ups in LLaVA-Pretrain's format (two turns, ``<image>`` first or last in a prompt)
  instruct.json      several questions about each image in LLaVA-Instruct's format
  questions.json     held-out questions: a list of {image, question, answer, kind}
  held_out.npz       depth [S,96,96] float16 in meters, classes and instances [S,96,96] uint8, images [S] file names
  world.json         seed, sizes and the accuracy of each cheap cue alone
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visper.common.console import track
from visper.common.lock import new_folder
from visper.quickstart import language
from visper.quickstart.questions import Objects, Question, cheap_cues, count_turns, draw_questions
from visper.quickstart.scenes import Scene, draw_scene

HELD_OUT_SERIES = 1_000_003
"""Added to a world's seed for its held-out scenes, so that no training series with a usual seed contains them."""
IMAGE = "<image>"
TURNS = 6
"""Questions per conversation of ``instruct.json``, at most."""


def write_world(folder: Path, *, seed: int, scenes: int, held_out: int, per_kind: int = 400) -> None:
    """Writes a world to a new folder, complete or absent. The same arguments give the same files.

    Args:
        per_kind: held-out questions of each kind, at most.

    Raises:
        FileExistsError: the folder exists.
    """
    if folder.exists():
        raise FileExistsError(f"'{folder}' exists: give the new world another folder, or remove it")
    with new_folder(folder) as beside:
        (beside / "images").mkdir(parents=True)
        known = write_split(beside, "train", seed, scenes)
        asked = write_split(beside, "held_out", seed + HELD_OUT_SERIES, held_out)
        rng = np.random.default_rng([seed, 11])
        write_json(beside / "pretrain.json", list(pretrain_records(known, rng)))
        write_json(beside / "instruct.json", list(instruct_records(known, draw_questions(known, seed), rng)))
        questions = draw_questions(asked, seed + HELD_OUT_SERIES, per_kind)
        write_json(beside / "questions.json", evaluation_records(asked, questions))
        sizes = {"seed": seed, "scenes": scenes, "held_out": held_out, "turns": TURNS, "per_kind": per_kind}
        write_json(beside / "world.json", {**sizes, "cheap_cues": cheap_cues(asked, questions)})


def image_name(split: str, index: int) -> str:
    return f"{split}_{index:06d}.png"


def write_split(folder: Path, split: str, seed: int, count: int) -> list[Objects]:
    objects: list[Objects] = []
    maps: list[Scene] = []
    bar = track(range(count), f"rendering {split} scenes", quiet=not sys.stderr.isatty())
    for index in bar:
        scene = draw_scene(seed, index)
        Image.fromarray(scene.image).save(folder / "images" / image_name(split, index), compress_level=1)
        objects.append(scene.objects)
        if split == "held_out":
            maps.append(scene)
    if maps:
        np.savez_compressed(
            folder / "held_out.npz",
            depth=np.stack([s.depth for s in maps]).astype(np.float16),
            classes=np.stack([s.classes for s in maps]),
            instances=np.stack([s.instances for s in maps]),
            images=np.array([image_name(split, i) for i in range(count)]),
        )
    return objects


def pretrain_records(scenes: Sequence[Objects], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Records for each scene, one for each pair of ``pretrain_pairs``."""
    for index, objects in enumerate(scenes):
        for number, (prompt, answer) in enumerate(pretrain_pairs(objects, rng)):
            said = f"{IMAGE}\n{prompt}" if rng.random() < 0.75 else f"{prompt}\n{IMAGE}"
            yield record(f"scene_{index:06d}_{number}", index, [(said, answer)])


def pretrain_pairs(objects: Objects, rng: np.random.Generator, depth: bool = True) -> list[tuple[str, str]]:
    """A caption, two look-ups of all objects in different orders, and a look-up from a place to a name."""
    orders = [[objects[i] for i in rng.permutation(len(objects))] for _ in range(3)]
    return [
        (str(rng.choice(language.CAPTION_PROMPTS)), language.caption(objects, depth)),
        language.look_up(orders[0], depth),
        language.look_up(orders[1], depth),
        language.look_back(orders[2][0]),
    ]


def instruct_records(
    scenes: Sequence[Objects], questions: Sequence[Question], rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """For each scene, its questions and the counts of all its shapes, shuffled, in conversations of at most ``TURNS``.

    The added counts are not balanced. They are needed because counting is learned slowest: with balanced counts alone
    (20 % of the turns) one seed of three answered them at chance, with these (30 %) none did.
    """
    by_scene: dict[int, dict[str, str]] = {}
    for question in questions:
        by_scene.setdefault(question.scene, {})[question.text(scenes[question.scene])] = question.answer
    for index, mine in sorted(by_scene.items()):
        mine.update(count_turns(scenes[index], rng))
        turns_of = list(mine.items())
        pairs = [turns_of[i] for i in rng.permutation(len(turns_of))]
        for number, start in enumerate(range(0, len(pairs), TURNS)):
            yield record(f"scene_{index:06d}_{number}", index, image_first(pairs[start : start + TURNS]))


def image_first(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """A conversation's questions and answers, with the image's tag before the first question."""
    (first, answer), *rest = pairs
    return [(f"{IMAGE}\n{first}", answer), *rest]


def evaluation_records(scenes: Sequence[Objects], questions: Sequence[Question]) -> list[dict[str, str]]:
    """The held-out questions as ``{image, question, answer, kind}``."""
    return [evaluation_record(q.scene, q.text(scenes[q.scene]), q.answer, q.kind) for q in questions]


def evaluation_record(scene: int, question: str, answer: str, kind: str) -> dict[str, str]:
    return {"image": image_name("held_out", scene), "question": question, "answer": answer, "kind": kind}


def record(name: str, scene: int, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)]
    return {"id": name, "image": image_name("train", scene), "conversations": turns}


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1))
