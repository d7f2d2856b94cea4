"""The world's language: names, places, captions and look-ups.

Every named object is one token ("red sphere"). A place is three words, the object's patch column, patch row and
depth step: "x3 y4 z5". A model learns to find a named object in an image from captions and look-ups ("red sphere ?" ->
"x3 y4 z5"). Questions alone do not teach it: after 80,000 of them, answers were at chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from visper.quickstart.questions import Objects
from visper.quickstart.scenes import GRID, SceneObject

DEPTH_STEPS = 12
NEAREST, FARTHEST = 3.0, 10.0
"""Meters at which the first depth step begins and the last one ends; each step is a factor of 1.105."""

COLUMNS = tuple(f"x{i}" for i in range(GRID))
ROWS = tuple(f"y{i}" for i in range(GRID))
DEPTHS = tuple(f"z{i}" for i in range(DEPTH_STEPS))
CAPTION_PROMPTS = ("Describe the picture .", "What is in the picture ?", "What is there to see ?")


def depth_step(depth: float) -> float:
    """Converts meters to the scale of the depth words: 0 to ``DEPTH_STEPS`` - 1 at the words' centers, clipped."""
    step = np.log(max(depth, 1e-6) / NEAREST) / np.log(FARTHEST / NEAREST) * DEPTH_STEPS - 0.5
    return float(np.clip(step, 0, DEPTH_STEPS - 1))


def place_words(thing: SceneObject, depth: bool = True) -> str:
    """Column, row and, if ``depth``, depth of an object, such as ``x3 y4 z5``."""
    column, row = thing.place
    words = (COLUMNS[column], ROWS[row], DEPTHS[round(depth_step(thing.depth))])
    return " ".join(words if depth else words[:2])


def caption(objects: Objects, depth: bool = True) -> str:
    """A sentence with all objects and their places, from left to right."""
    listed = [f"a {o.name} at {place_words(o, depth)}" for o in sorted(objects, key=lambda o: o.column)]
    return " , ".join(listed[:-1]) + f" and {listed[-1]} ."


def look_up(objects: Sequence[SceneObject], depth: bool = True) -> tuple[str, str]:
    """A question that gives one or more names, and its answer, their places."""
    if len(objects) == 1:
        return f"{objects[0].name} ?", place_words(objects[0], depth)
    asked = " , ".join(o.name for o in objects)
    return f"Find {asked} .", " , ".join(f"{o.name} {place_words(o, depth)}" for o in objects)


def look_back(thing: SceneObject) -> tuple[str, str]:
    """A question that gives a place, and its answer, the name of the object there."""
    column, row = thing.place
    return f"What is at {COLUMNS[column]} {ROWS[row]} ?", thing.name
