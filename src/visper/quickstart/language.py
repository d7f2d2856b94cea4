"""The world's language: names, places, captions and look-ups.

Every named object is one token ("red sphere"). A place is three words, the object's patch column, patch row and
depth step: "x3 y4 z5". Captions and look-ups ("red sphere ?" -> "x3 y4 z5") are what teaches a model to find a
named thing in an image; questions alone never did (80,000 of them, answered at chance).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from visper.quickstart.questions import Objects
from visper.quickstart.scenes import GRID, SceneObject

DEPTH_STEPS = 12
NEAREST, FARTHEST = 3.0, 10.0
"""Meters where the first depth step begins and the last one ends; a step is a factor of 1.105."""

COLUMNS = tuple(f"x{i}" for i in range(GRID))
ROWS = tuple(f"y{i}" for i in range(GRID))
DEPTHS = tuple(f"z{i}" for i in range(DEPTH_STEPS))
CAPTION_PROMPTS = ("Describe the picture .", "What is in the picture ?", "What is there to see ?")


def depth_step(depth: float) -> float:
    """Depth in meters on the scale of the depth words, 0..``DEPTH_STEPS`` - 1 at the words' centers, clipped to
    their range."""
    step = np.log(max(depth, 1e-6) / NEAREST) / np.log(FARTHEST / NEAREST) * DEPTH_STEPS - 0.5
    return float(np.clip(step, 0, DEPTH_STEPS - 1))


def place_words(thing: SceneObject, depth: bool = True) -> str:
    """Column, row and, unless left out, depth of an object, such as ``x3 y4 z5``."""
    column, row = thing.place
    words = (COLUMNS[column], ROWS[row], DEPTHS[round(depth_step(thing.depth))])
    return " ".join(words if depth else words[:2])


def caption(objects: Objects, depth: bool = True) -> str:
    """All objects with their places, from left to right."""
    listed = [f"a {o.name} at {place_words(o, depth)}" for o in sorted(objects, key=lambda o: o.column)]
    return " , ".join(listed[:-1]) + f" and {listed[-1]} ."


def look_up(objects: Sequence[SceneObject], depth: bool = True) -> tuple[str, str]:
    """One or more names -> their places: the question and its answer."""
    if len(objects) == 1:
        return f"{objects[0].name} ?", place_words(objects[0], depth)
    asked = " , ".join(o.name for o in objects)
    return f"Find {asked} .", " , ".join(f"{o.name} {place_words(o, depth)}" for o in objects)


def look_back(thing: SceneObject) -> tuple[str, str]:
    """A place -> the name of what is there."""
    column, row = thing.place
    return f"What is at {COLUMNS[column]} {ROWS[row]} ?", thing.name
