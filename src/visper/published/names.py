"""Maps visper's parameter names to the published ones, and checks that none is left over on either side."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from visper.common.errors import ConfigError

MODEL, DISTILLATION, PROBES = "model", "distillation", "probes"
"""The folders of a converted checkpoint; see ``to_visper``."""

INPUT_TABLE, OUTPUT_TABLE = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
"""Visper's vocabulary tables, which have more rows than the published ones."""

TOWER = "vision_tower."
PUBLISHED_TOWER = "model.vision_tower.vision_tower."
QUERIES = "task_tokens.queries."
"""Name prefix of the tasks' query matrices in visper."""

MODEL_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    # Inside a LLaVA, transformers writes a timm backbone without its wrapper's name; older versions keep it.
    ("vision_tower.backbone.timm_model.", PUBLISHED_TOWER),
    ("vision_tower.backbone.", PUBLISHED_TOWER),
    (TOWER, PUBLISHED_TOWER),
)
"""Name prefix in a visper model folder -> in a published checkpoint. The first match applies."""

HEAD_NAMES = (
    ("resampler.", "projector."),
    ("mlp.", "linear_1."),
    ("project_in.", "proj_in."),
    ("project_out.", "proj_out."),
    ("layers.#.attention.norm_keys.", "layers.#.0.norm1."),
    ("layers.#.attention.norm_queries.", "layers.#.0.norm2."),
    ("layers.#.attention.to_query.", "layers.#.0.to_q."),
    ("layers.#.attention.to_key_value.", "layers.#.0.to_kv."),
    ("layers.#.attention.to_out.", "layers.#.0.to_out."),
    ("layers.#.feed_forward.norm.", "layers.#.1.0."),
    ("layers.#.feed_forward.widen.", "layers.#.1.1."),
    ("layers.#.feed_forward.narrow.", "layers.#.1.3."),
)
"""Part of a predictor's or probe's parameter name in visper -> in a published head; # is a number."""

NEVER_USED = {
    "MLPs 2 and 3 of the depth head (no loss reads them)": r"image_depth_heads\.\d+\.linear_[23]\..*",
    "teachers (kept outside the student)": r"(da_v2_head|dav2_backbone|oneformer|gen_encoder)\..*",
    "buffers (computed from the configuration)": r".*\.(rotary_emb\.inv_freq|embeddings\.position_ids)",
}
"""Reason -> pattern of the published names that a conversion leaves out. All other parameters must be converted."""

_SHOWN = 30


class Slot(NamedTuple):
    """Where a published parameter is saved: the folder (None: not saved), its name there, and its published shape."""

    folder: str | None
    name: str
    shape: tuple[int, ...]


@dataclass
class Report:
    """The result of a conversion: parameters (tensors) written by folder and left out by reason, and notes."""

    output: Path
    written: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def published_model_name(name: str) -> str:
    """The published name of a parameter of a model folder."""
    for ours, theirs in MODEL_PREFIXES:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ConfigError(f"parameter '{name}' has no published name: expected a LLaVA model with an MLP projector")


def published_head_name(name: str, layers: Mapping[str, Iterable[int]]) -> str:
    """The published name of a parameter of a distillation or probes folder; ``layers``: tapped layers by task."""
    if name.startswith(QUERIES):
        return f"model.special_{name.removeprefix(QUERIES)}_tokens"
    part, _, rest = name.removeprefix("objective.").partition(".")
    if part == "logit_scales":
        return f"{rest}_logit_scale"
    assert part == "predictors", name
    key, _, inner = rest.partition(".")
    task, _, layer = key.rpartition("_")
    for ours, theirs in HEAD_NAMES:
        # Match only whole components of the name: "mlp." must not match inside another word.
        inner = re.sub(r"(?<![^.])" + re.escape(ours).replace(r"\#", r"(\d+)"), theirs.replace("#", r"\1"), inner)
    return f"image_{task}_heads.{list(layers[task]).index(int(layer))}.{inner}"


def account(
    found: Mapping[str, tuple[int, ...]], slots: Mapping[str, Slot], source: Path, tower_elsewhere: bool = False
) -> dict[str, list[str]]:
    """Checks that parameters and slots correspond one to one and have the same shapes.

    Args:
        found: shapes of the checkpoint's parameters, by published name.
        slots: the expected parameters, by published name. A vocabulary table may have fewer rows than its slot.
        tower_elsewhere: the image encoder comes from its own checkpoint.

    Returns:
        The names left out, by the reasons of ``NEVER_USED``.

    Raises:
        ConfigError: parameters that are unknown, missing, or of another shape; it lists them.
    """
    unused: dict[str, list[str]] = {}
    unknown = []
    for name in found:
        if name not in slots:
            reason = next((r for r, pattern in NEVER_USED.items() if re.fullmatch(pattern, name)), None)
            if reason is None:
                unknown.append(name)
            else:
                unused.setdefault(reason, []).append(name)
    missing = [n for n in slots if n not in found and not (tower_elsewhere and n.startswith(PUBLISHED_TOWER))]
    misshaped = [
        f"{name} is {list(found[name])}, expected {list(slot.shape)}"
        for name, slot in slots.items()
        if name in found and not _fits(found[name], slot)
    ]
    faults = {"unknown": unknown, "missing": missing, "of another shape": misshaped}
    if any(faults.values()):
        listed = "\n".join(f"{len(names)} {what}:\n{_listed(names)}" for what, names in faults.items() if names)
        raise ConfigError(
            f"the parameters in '{source}' are not those that its config.json describes. {listed}\nCheck that all "
            "files belong to one checkpoint. If its encoder is not the one in mm_vision_tower, give --encoder"
        )
    return unused


def _fits(shape: tuple[int, ...], slot: Slot) -> bool:
    if slot.name in (INPUT_TABLE, OUTPUT_TABLE):
        return shape[1:] == slot.shape[1:] and shape[0] <= slot.shape[0]
    return shape == slot.shape


def _listed(names: list[str]) -> str:
    more = [f"... and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return "\n".join(f"  {name}" for name in [*names[:_SHOWN], *more])
