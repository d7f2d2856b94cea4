"""The quickstart's LLM: a small Llama that knows this world's texts and can look up objects in the layout of a scene.

It is trained without images. It takes the place of a published instruction-tuned LLM, whose skills a projector only
needs to make accessible.

Shape suffixes: B = conversations, L = sequence, D = width.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.quickstart_bases.layouts import Conversations, Layouts, collate, embed
from tools.quickstart_bases.progress import Progress
from tools.quickstart_bases.scene_arrays import SceneArrays
from tools.quickstart_bases.vocabulary import PHRASES, new_tokenizer
from visper.quickstart.language import COLUMNS, DEPTHS, ROWS
from visper.quickstart.questions import KINDS, PLURALS, draw_questions
from visper.quickstart.scenes import COLORS, SHAPES

WIDTH, LAYERS = 128, 4


def new_llm(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    initialize(model, tokenizer)
    return model


NAME, PLACE, PLACE_FLAG, NAME_FLAG, FOUND, OTHER = slice(0, 11), slice(32, 62), 64, 65, slice(66, 96), slice(98, WIDTH)
"""Dimensions of the initial embeddings that hold a name's color and shape, a place, the two flags, a place that was
looked up, and all other words."""


@torch.no_grad()
def initialize(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Sets initial weights in which one head of the first layer already looks up the place of a name.

    Gradient descent alone finds the look-up suddenly, after 500 to 1000 training steps (10 CPU minutes); setting it
    costs nothing. All weights are trained from there. Names are one-hot colors and shapes; columns, rows and depths
    are bumps, so that neighbors are similar.
    """
    table = model.get_input_embeddings().weight
    table.normal_(0, 0.04)
    table[:, OTHER] += torch.randn(len(table), table[:, OTHER].shape[1]) * 0.2
    at = tokenizer.get_vocab()
    for name in PHRASES:
        color, shape = (list(COLORS).index(name.split()[0]), SHAPES.index(name.split()[1]))
        table[at[name], color] += 1.0
        table[at[name], len(COLORS) + shape] += 0.7
        table[at[name], NAME_FLAG] += 1.0
    for color, word in enumerate(COLORS):
        table[at[word], color] += 1.0
    for shape, word in enumerate(SHAPES):
        table[[at[word], at[PLURALS[word]]], len(COLORS) + shape] += 1.0
    for part, words in enumerate((COLUMNS, ROWS, DEPTHS)):
        ticks = torch.linspace(0, 9, len(words))[:, None] - torch.arange(10)[None]
        code = F.normalize(torch.exp(-(ticks**2) / 1.5), dim=1)
        rows = [at[w] for w in words]
        table[rows, PLACE.start + 10 * part : PLACE.start + 10 * (part + 1)] += code
        model.lm_head.weight[rows, FOUND.start + 10 * part : FOUND.start + 10 * (part + 1)] += 0.3 * code
    table[[at[w] for w in COLUMNS], PLACE_FLAG] += 1.0
    _write_look_up_head(model)
    _write_count_head(model)


@torch.no_grad()
def _write_look_up_head(model: LlamaForCausalLM) -> None:
    """Sets head 0 of layer 0: a name attends to the place with the same color and copies that place into ``FOUND``."""
    head = WIDTH // 4
    attention = model.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight[:head] *= 0.2
    attention.o_proj.weight[:, :head] *= 0.2
    # Rotary pairs are (i, i + 16). From i = 8 on they rotate less than 0.3 rad in 300 tokens: distant matches survive.
    slow = [*range(8, 16), *range(24, 32)]
    for channel, dim in enumerate(range(NAME.start, NAME.stop)):
        strength = 1.4 if channel < len(COLORS) else 0.5
        attention.q_proj.weight[slow[channel], dim] += strength
        attention.k_proj.weight[slow[channel], dim] += strength
    attention.q_proj.weight[slow[15], NAME_FLAG] += 1.4
    attention.k_proj.weight[slow[15], PLACE_FLAG] += 1.4
    for channel in range(PLACE.stop - PLACE.start):
        attention.v_proj.weight[channel, PLACE.start + channel] += 0.6
        attention.o_proj.weight[FOUND.start + channel, channel] += 0.6


@torch.no_grad()
def _write_count_head(model: LlamaForCausalLM) -> None:
    """Sets head 3 of layer 0: a shape's plural attends to every place with that shape. Their share of its attention
    grows with their number and is written into one channel of ``OTHER``."""
    first = 3 * WIDTH // 4
    attention = model.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight[first:] *= 0.2
    attention.o_proj.weight[:, first:] *= 0.2
    for channel, shape in enumerate(range(len(COLORS), len(COLORS) + len(SHAPES))):
        attention.q_proj.weight[first + 8 + channel, shape] += 1.1
        attention.k_proj.weight[first + 8 + channel, shape] += 1.1
    attention.v_proj.weight[first, NAME_FLAG] += 0.5
    attention.o_proj.weight[OTHER.start, first] += 1.0


def answer_loss(model: LlamaForCausalLM, talk: Conversations, noise: float) -> tuple[Tensor, Tensor]:
    """Mean next-token loss over the answers, and the logits at the supervised positions ``[T,V]`` in row order."""
    hidden = model.model(
        inputs_embeds=embed(model.get_input_embeddings(), talk, noise), use_cache=False
    ).last_hidden_state
    wanted = talk.supervised[:, 1:]
    logits = model.lm_head(hidden[:, :-1][wanted])
    return F.cross_entropy(logits, talk.ids[:, 1:][wanted]), logits


def train_llm(arrays: SceneArrays, held_out: SceneArrays, out: Path, minutes: float, seed: int = 0) -> dict[str, float]:
    """Trains for ``minutes`` of CPU time, saves model and tokenizer in ``out``, returns held-out accuracy by kind."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 5])
    tokenizer = new_tokenizer()
    model = new_llm(tokenizer)
    layouts = Layouts(arrays, draw_questions(arrays.objects, seed), tokenizer)
    tests = Layouts(held_out, draw_questions(held_out.objects, seed), tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    bar = Progress("llm", minutes)
    while (done := bar.share()) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, bar.steps / 100) * (0.5 + 0.5 * math.cos(math.pi * done))
        look_ups = max(0.3, 0.8 - 2.5 * done)
        scenes = rng.choice(layouts.scenes, 16)
        loss, _ = answer_loss(model, collate(layouts, rng, scenes.tolist(), look_ups, most=10), noise=0.3)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.step(loss.item())
        if bar.steps % 200 == 0:
            bar.say(str({k: round(v, 3) for k, v in llm_scores(model, tests, 50).items()}))
    scores = llm_scores(model, tests, len(tests.scenes))
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return scores


@torch.no_grad()
def llm_scores(model: LlamaForCausalLM, tests: Layouts, limit: int) -> dict[str, float]:
    """Accuracy of the first answer word by kind of question, and of place words, on exact layouts with gaps."""
    rng = np.random.default_rng(0)
    right: dict[str, list[bool]] = {kind: [] for kind in (*KINDS, "place words")}
    for look_ups in (0.0, 1.0):
        for start in range(0, min(limit, len(tests.scenes)), 50):
            scenes = tests.scenes[start : min(start + 50, limit)]
            talk = collate(tests, rng, scenes, look_ups, most=8, exact=True)
            _, logits = answer_loss(model, talk, noise=0.0)
            guesses = torch.full_like(talk.ids, -1)
            guesses[:, 1:][talk.supervised[:, 1:]] = logits.argmax(-1)
            _score(right, tests, talk, guesses, look_ups > 0)
    return {kind: float(np.mean(values)) for kind, values in right.items() if values}


def _score(right: dict[str, list[bool]], tests: Layouts, talk: Conversations, guesses: Tensor, look_ups: bool) -> None:
    ids, at = talk.ids, tests.id
    if look_ups:
        place = talk.supervised & torch.isin(ids, torch.tensor([at[w] for w in (*COLUMNS, *ROWS, *DEPTHS)]))
        right["place words"] += (guesses == ids)[place].tolist()
        return
    kinds = {at["many"]: "count", at["seen"]: "relation", at["camera"]: "depth", at["closer"]: "distance"}
    for row in range(len(ids)):
        kind = ""
        for column, token in enumerate(ids[row].tolist()):
            if token in kinds and not (token == at["closer"] and kind == "depth"):
                kind = kinds[token]
            if token == at["<|assistant|>"]:
                right[kind].append(bool(guesses[row, column + 1] == ids[row, column + 1]))
