"""Translates a published checkpoint's ``config.json`` into visper's settings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from visper.common.errors import ConfigError
from visper.common.files import read_json_object
from visper.config import Geometry, TaskTokenLayout
from visper.config import Student as StudentConfig
from visper.distillation import TargetSpec

SECTIONS = {"depth": ("image_depth", "depth"), "seg": ("image_seg", "seg"), "gen": ("image_gen", "img")}
"""Task -> its section of the published configuration, and the prefix of the keys in it. These are all tasks."""

SUPPORTED = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_patch_merge_type": ("flat",),
    "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": (False,),
    "sample_tokens": (False,),
    "use_contrastive": (True,),
}
"""Optional key -> supported values. A checkpoint with another value cannot be converted."""

SIZES = {"depth": "depth", "heads": "num_heads", "head_width": "dim_head", "ff_mult": "ff_mult"}
"""Size of a resampler -> its key in a section of the published configuration."""

PER_TASK = 8
"""Task tokens per task, if the checkpoint has task tokens but its configuration does not give their number."""


Kind = Literal["pt", "ift", "probe"]
"""The kind of checkpoint, by what was trained."""
_KINDS: dict[str, Kind] = {"ola": "pt", "llava": "ift", "probe": "probe"}
_MODEL_TYPE = re.compile(r"(ola|llava|probe)(?:_\w+)?_(llama|phi3)")


@dataclass(frozen=True)
class Head:
    """One task's predictors (PT) or probes: the target's shape, tapped layers counted from 1, the resampler's sizes
    by the names of ``config.Head``."""

    target: TargetSpec
    layers: tuple[int, ...]
    weight: float
    mlp: bool
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Published:
    """A published checkpoint, without its weights.

    Attributes:
        config: its config.json.
        llm: "llama" or "phi3".
        tasks: tasks that have task tokens, in sequence order.
        per_task: tokens per task.
        query_rows: number of rows of each task's query matrix.
        heads: predictors or probes, by task.
    """

    folder: Path
    config: Mapping[str, Any]
    kind: Kind
    llm: str
    tasks: tuple[str, ...]
    per_task: int
    query_rows: Mapping[str, int]
    heads: Mapping[str, Head]

    @property
    def own_latents(self) -> bool:
        """True if heads have their own latents instead of task tokens: probes, and PT without task tokens."""
        return bool(self.heads) and not self.tasks

    @property
    def geometry(self) -> Geometry:
        """How images were made square: IFT pads them; PT uses CLIP's own processor, which crops them."""
        return Geometry.PAD if self.config.get("image_aspect_ratio") == "pad" else Geometry.CROP

    def student(self, encoder: str, system_prompt: str | None) -> StudentConfig:
        """Its student, as the ``student`` section of a visper run."""
        resolution = re.search(r"-res(\d+)", str(self.config["mm_vision_tower"]))
        return StudentConfig(
            llm=str(self.folder),
            llm_revision=None,
            encoder=encoder,
            encoder_revision=None,
            feature_layer=int(self.config["mm_vision_select_layer"]),
            image_size=int(resolution.group(1)) if resolution else None,
            system_prompt=system_prompt,
            task_tokens=TaskTokenLayout(order=self.tasks, per_task=self.per_task) if self.tasks else None,
        )


def read_published(folder: Path, parameters: Iterable[str]) -> Published:
    """Reads the configuration of a checkpoint.

    Raises:
        ConfigError: config.json is missing or cut short, or describes another architecture or a variant that visper's
            student does not support.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"'{folder}' has no config.json: expected the folder of a published checkpoint")
    config = read_json_object(file)
    model_type = str(config.get("model_type"))
    found = _MODEL_TYPE.fullmatch(model_type)
    if not found:
        already = "; a LLaVA folder of transformers needs no conversion" if model_type == "llava" else ""
        raise ConfigError(
            f"{file}: model_type is '{model_type}': expected that of a published checkpoint, ola_llama or ola_phi3 "
            f"(PT), llava_llama or llava_phi3 (IFT), probe_dsg_llava_llama (probes){already}"
        )
    kind = _KINDS[found.group(1)]
    _check(config, file, kind)
    special = [task for task in SECTIONS if f"model.special_{task}_tokens" in set(parameters)]
    per_task = 0 if kind == "probe" else int(config.get("num_task_tokens", PER_TASK if special else 0))
    mode = str(config.get("probe_mode" if kind == "probe" else "aux_mode", ""))
    named = tuple(mode.split("-")) if mode else ()
    tasks = named if per_task else ()
    strange = [task for task in named if task not in SECTIONS]
    if strange or (not named and (kind != "ift" or per_task)):
        key = "probe_mode" if kind == "probe" else "aux_mode"
        raise ConfigError(f"{file}: {key} is '{mode}': expected the tasks in their order, such as 'depth-seg-gen'")
    rows = {t: per_task if t == "gen" else int(_section(config, t, file)["num_tokens"]) for t in tasks}
    heads = {} if kind == "ift" else {task: _head(config, task, kind, file) for task in named}
    return Published(folder, config, kind, found.group(2), tasks, per_task, rows, heads)


def _check(config: Mapping[str, Any], file: Path, kind: Kind) -> None:
    for key in ("mm_vision_tower", "mm_vision_select_layer", "vocab_size", "num_hidden_layers"):
        if key not in config:
            raise ConfigError(f"{file}: key '{key}' is missing: expected the config.json of a published checkpoint")
    for key, values in SUPPORTED.items():
        if key in config and config[key] not in values:
            raise ConfigError(
                f"{file}: {key} is {config[key]!r}: only checkpoints with {values[0]!r} can be converted, "
                "as the published ones are"
            )
    form = config.get("task_token_format", "expand_emb")
    # In PT the published code always takes the means of groups; in IFT only if this key is "expand_emb".
    if form != "expand_emb" and not (form == "emb" and kind != "ift"):
        raise ConfigError(
            f"{file}: task_token_format is '{form}': expected 'expand_emb' (a few tokens per task). If the checkpoint "
            "was trained with that format, correct the key in a copy of the folder"
        )


def _section(config: Mapping[str, Any], task: str, file: Path) -> Mapping[str, Any]:
    name = SECTIONS[task][0]
    section = config.get(name)
    if not isinstance(section, dict):
        raise ConfigError(f"{file}: section '{name}' is missing: it holds the sizes of task '{task}'")
    return section


def _head(config: Mapping[str, Any], task: str, kind: Kind, file: Path) -> Head:
    section, prefix = _section(config, task, file), SECTIONS[task][1]
    try:
        tokens = int(section["num_tokens"])
        side = round(tokens**0.5)
        grid = (side, side) if tokens > 1 and side * side == tokens else None
        layers = list(range(1, int(config["num_hidden_layers"]) + 1))
        if kind == "pt":
            layers = [int(layer) for layer in str(section[f"{prefix}_layer_indices"]).split("-")]
        return Head(
            target=TargetSpec(tokens, int(section["output_dim"]), grid),
            layers=tuple(layers),
            weight=float(section.get(f"{prefix}_loss_weight", 0.5)),
            mlp=task == "depth" and kind == "pt" and bool(section.get("use_intermediate_depth", True)),
            sizes={name: int(section[theirs]) for name, theirs in SIZES.items()},
        )
    except KeyError as error:
        raise ConfigError(f"{file}: section '{SECTIONS[task][0]}' lacks key {error}: it describes the heads") from error
