"""Layouts: scenes described by word embeddings, which replace images in the LLM's pre-training.

Each patch becomes one input embedding, the sum of the embeddings of the words that describe it: its column, row and
depth, and the name of an object that is centered there ("part" and a hint of the color where an object covers the
patch, "ground" elsewhere). Noise and a random scale keep the LLM from relying on a precision that no projector has.
After the patches come small random vectors in place of task tokens, or nothing.

Shape suffixes: B = conversations, L = sequence, P = patches, D = width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tools.quickstart_bases.patches import NO_COLOR
from tools.quickstart_bases.scene_arrays import SceneArrays
from tools.quickstart_bases.vocabulary import SYSTEM_PROMPT
from visper.quickstart import language
from visper.quickstart.language import COLUMNS, DEPTH_STEPS, DEPTHS, ROWS, depth_step
from visper.quickstart.questions import Question, count_turns
from visper.quickstart.scenes import COLORS, FAR, GRID, NEAR, SceneObject

TASK_GAPS = 24
PLACES = GRID * GRID
COUNT_SHARE = 0.3
"""Share of the question conversations that only count. Without them, counts stayed at chance when the other kinds were
above 86 %."""


@dataclass
class LaidOut:
    """Word ids and weights per patch: ``words`` [P,W] long, ``weights`` [P,W] float (0 = word absent)."""

    words: Tensor
    weights: Tensor


class Layouts:
    """Draws layouts of scenes, recolored at random, and conversations about them."""

    def __init__(self, arrays: SceneArrays, questions: Sequence[Question], tokenizer: PreTrainedTokenizerFast) -> None:
        self.arrays = arrays
        self.tokenizer = tokenizer
        self.by_scene: dict[int, list[Question]] = {}
        for question in questions:
            self.by_scene.setdefault(question.scene, []).append(question)
        self.scenes = sorted(self.by_scene)
        vocabulary = tokenizer.get_vocab()
        self.id = {word: vocabulary[word] for word in vocabulary}

    def recolored(self, rng: np.random.Generator, scene: int) -> tuple[list[SceneObject], np.ndarray]:
        """The scene's objects with permuted colors, and the permutation (index 8, no color, is unchanged)."""
        order = np.append(rng.permutation(len(COLORS)), NO_COLOR)
        names = list(COLORS)
        return [replace(o, color=names[order[names.index(o.color)]]) for o in self.arrays.objects[scene]], order

    def lay_out(
        self, rng: np.random.Generator, scene: int, objects: list[SceneObject], order: np.ndarray, exact: bool = False
    ) -> LaidOut:
        """The words of a scene's 64 patches; ``exact``: without noise on the depth and without hints of the color."""
        patches = self.arrays.patches
        depth = NEAR * (FAR / NEAR) ** patches["depth"][scene].astype(np.float64)
        step = np.array([depth_step(float(d)) for d in depth])
        if not exact:
            step = np.clip(step + rng.normal(0, 0.45, PLACES), 0, DEPTH_STEPS - 1)
        low = np.minimum(step.astype(int), DEPTH_STEPS - 2)
        first = np.array([self.id[w] for w in DEPTHS])
        place = np.arange(PLACES)
        words = np.zeros((PLACES, 6), np.int64)
        weights = np.zeros((PLACES, 6), np.float32)
        words[:, 0] = np.array([self.id[w] for w in COLUMNS])[place % GRID]
        words[:, 1] = np.array([self.id[w] for w in ROWS])[place // GRID]
        words[:, 2], words[:, 3] = first[low], first[low + 1]
        weights[:, :2] = 1
        weights[:, 3] = step - low
        weights[:, 2] = 1 - weights[:, 3]
        covered = patches["color"][scene] != NO_COLOR
        words[:, 4] = np.where(covered, self.id["part"], self.id["ground"])
        weights[:, 4] = 1
        color_ids = np.array([self.id[c] for c in COLORS] + [0])
        words[:, 5] = color_ids[order[patches["color"][scene]]]
        weights[:, 5] = covered * (0.0 if exact else rng.uniform(0, 0.5))
        for thing in objects:
            column, row = thing.place
            at = row * GRID + column
            words[at, 4], weights[at, 4], weights[at, 5] = (
                self.id[thing.name],
                1.0 if exact else rng.uniform(0.8, 1.3),
                0,
            )
        return LaidOut(torch.from_numpy(words), torch.from_numpy(weights))

    def turns(
        self,
        rng: np.random.Generator,
        scene: int,
        objects: list[SceneObject],
        look_ups: float,
        most: int,
        counts: float,
    ) -> list[tuple[str, str]]:
        """Questions and answers about one scene, or, with probability ``look_ups``, a caption or look-ups."""
        if rng.random() >= look_ups:
            if rng.random() < counts:
                return count_turns(objects, rng)
            asked = self.by_scene[scene]
            picked = rng.permutation(len(asked))[:most]
            return [(asked[i].text(objects), asked[i].answer) for i in picked]
        shuffled = [objects[i] for i in rng.permutation(len(objects))]
        kind = rng.random()
        if kind < 0.3:
            return [(language.CAPTION_PROMPTS[int(rng.integers(3))], language.caption(objects))]
        if kind < 0.7:
            return [language.look_up(shuffled)]
        singles = [language.look_up([o]) if rng.random() < 0.6 else language.look_back(o) for o in shuffled]
        return singles


@dataclass
class Conversations:
    """A batch of conversations, ready to embed.

    Attributes:
        ids: [B,L] token ids; patches and gaps are unknown tokens.
        supervised: [B,L] bool.
        places: the layout of each conversation's scene.
        starts: position of the first patch in each conversation.
        gaps: number of random vectors after the patches of each conversation.
    """

    ids: Tensor
    supervised: Tensor
    places: list[LaidOut]
    starts: list[int]
    gaps: list[int]


def collate(
    layouts: Layouts, rng: np.random.Generator, scenes: Sequence[int], look_ups: float, most: int, exact: bool = False
) -> Conversations:
    """Conversations about ``scenes`` in the chat template, with the patches in the first user turn, as in LLaVA."""
    tokenizer, rows, places, starts, gaps = layouts.tokenizer, [], [], [], []
    for scene in scenes:
        objects, order = layouts.recolored(rng, scene)
        turns = layouts.turns(rng, scene, objects, look_ups, most, 0.0 if exact else COUNT_SHARE)
        gap = TASK_GAPS if exact or rng.random() < 0.7 else 0
        image = " <unk>" * (PLACES + gap)
        messages = [] if exact or rng.random() < 0.85 else [{"role": "system", "content": SYSTEM_PROMPT}]
        for index, (question, answer) in enumerate(turns):
            if index == 0:
                question = f"{question} {image}" if not exact and rng.random() < 0.25 else f"{image} {question}"
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = render(messages)
        row = tokenizer(text, add_special_tokens=False).input_ids
        rows.append(row)
        starts.append(row.index(tokenizer.unk_token_id))
        places.append(layouts.lay_out(rng, scene, objects, order, exact))
        gaps.append(gap)
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return Conversations(ids, answers_of(ids, tokenizer), places, starts, gaps)


def render(messages: list[dict[str, str]]) -> str:
    """Renders ``CHAT_TEMPLATE`` without jinja, which would take longer than the training step."""
    return "<s>" + "".join(f" <|{m['role']}|> {m['content'].strip()} <|end|>" for m in messages)


def answers_of(ids: Tensor, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """A mask of the assistant's words and the end tokens of its turns. ``ids`` [B,L] -> bool [B,L]."""
    assistant, end = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
    opened, closed = (ids == assistant).long().cumsum(1), (ids == end).long()
    # Every turn ends with an end token; inside an assistant turn, the last role token is the assistant's.
    roles = tokenizer.convert_tokens_to_ids(["<|user|>", "<|system|>", "<|assistant|>"])
    marks = torch.isin(ids, torch.tensor(roles))
    last = torch.where(marks, torch.arange(ids.shape[1]), -1).cummax(1).values
    inside = (ids.gather(1, last.clamp(min=0)) == assistant) & ~marks & (opened > 0)
    return inside & (ids != tokenizer.pad_token_id) & ((closed == 1) | (ids != end))


def embed(
    table: torch.nn.Embedding, talk: Conversations, noise: float, generator: torch.Generator | None = None
) -> Tensor:
    """Input embeddings ``[B,L,D]`` of words and patches; ``noise`` is relative to the patches' size."""
    embedded = table(talk.ids)
    words = torch.stack([p.words for p in talk.places])
    weights = torch.stack([p.weights for p in talk.places])
    places = (table(words) * weights[..., None]).sum(2)
    if noise > 0:
        size = places.detach().pow(2).mean().sqrt()
        places = places * (1 + 0.2 * torch.randn(len(places), 1, 1)) + noise * size * torch.randn_like(places)
    filled = embedded.clone()
    for i, (start, gap) in enumerate(zip(talk.starts, talk.gaps, strict=True)):
        filled[i, start : start + PLACES] = places[i]
        if gap:
            scale = 0.5 * float(np.random.rand()) * table.weight.detach().std()
            filled[i, start + PLACES : start + PLACES + gap] = torch.randn(gap, places.shape[-1]) * scale
    return filled
