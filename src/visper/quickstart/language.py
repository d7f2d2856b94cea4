"""The world's language: names, places, captions and look-ups, and the tokenizer that knows just these words.

Every named object is one token ("red sphere"). A place is three words, the object's patch column, patch row and
depth step: "x3 y4 z5". Captions and look-ups ("red sphere ?" -> "x3 y4 z5") are what teaches a model to find a
named thing in a image; questions alone never did (80,000 of them, answered at chance).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from visper.quickstart.questions import PLURALS, Objects
from visper.quickstart.scenes import COLORS, GRID, SHAPES, SceneObject

DEPTH_STEPS = 12
NEAREST, FARTHEST = 3.0, 10.0
"""Metres where the first depth step begins and the last one ends; a step is a factor of 1.105."""

SPECIAL = ("<pad>", "<unk>", "<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
PHRASES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
COLUMNS = tuple(f"x{i}" for i in range(GRID))
ROWS = tuple(f"y{i}" for i in range(GRID))
DEPTHS = tuple(f"z{i}" for i in range(DEPTH_STEPS))
NUMBERS = ("0", "1", "2", "3", "4", "5", "6")
WORDS = (
    *COLORS,
    *SHAPES,
    *PLURALS.values(),
    *COLUMNS,
    *ROWS,
    *DEPTHS,
    *NUMBERS,
    "A",
    "B",
    "left",
    "right",
    "above",
    "below",
    ".",
    ",",
    ":",
    "?",
    "a",
    "the",
    "and",
    "at",
    "or",
    "is",
    "are",
    "it",
    "to",
    "from",
    "of",
    "in",
    "there",
    "nothing",
    "ground",
    "part",
    "How",
    "many",
    "Which",
    "closer",
    "camera",
    "Where",
    "seen",
    "What",
    "Describe",
    "picture",
    "Find",
    "things",
    "You",
    "see",
    "one",
    "Answer",
    "questions",
    "about",
    "with",
    "words",
    "few",
)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant, found ' + message['role']) }}"
    "{% endif %}"
    "{{ ' <|' + message['role'] + '|> ' + message['content'] | trim + ' <|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <|assistant|> ' }}{% endif %}"
)
SYSTEM_PROMPT = "Answer questions about the picture with few words ."
CAPTION_PROMPTS = ("Describe the picture .", "What is in the picture ?", "What is there to see ?")


def depth_step(depth: float) -> float:
    """Depth in metres on the scale of the depth words, 0..``DEPTH_STEPS`` - 1 at the words' centers, clipped to
    their range."""
    step = np.log(max(depth, 1e-6) / NEAREST) / np.log(FARTHEST / NEAREST) * DEPTH_STEPS - 0.5
    return float(np.clip(step, 0, DEPTH_STEPS - 1))


def place_words(thing: SceneObject) -> str:
    """Column, row and depth of an object, such as ``x3 y4 z5``."""
    column, row = thing.place
    return f"{COLUMNS[column]} {ROWS[row]} {DEPTHS[round(depth_step(thing.depth))]}"


def caption(objects: Objects) -> str:
    """All objects with their places, from left to right."""
    listed = [f"a {o.name} at {place_words(o)}" for o in sorted(objects, key=lambda o: o.column)]
    return " , ".join(listed[:-1]) + f" and {listed[-1]} ."


def look_up(objects: Sequence[SceneObject]) -> tuple[str, str]:
    """One or more names -> their places: the question and its answer."""
    if len(objects) == 1:
        return f"{objects[0].name} ?", place_words(objects[0])
    asked = " , ".join(o.name for o in objects)
    return f"Find {asked} .", " , ".join(f"{o.name} {place_words(o)}" for o in objects)


def look_back(thing: SceneObject) -> tuple[str, str]:
    """A place -> the name of what is there."""
    column, row = thing.place
    return f"What is at {COLUMNS[column]} {ROWS[row]} ?", thing.name


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer of this world; texts are words between blanks, names of objects are one token each."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    inner.add_tokens([AddedToken(name, single_word=True, normalized=False) for name in PHRASES])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=1024,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
