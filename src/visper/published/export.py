"""Our folder becomes a published checkpoint: the names, configuration and tokenizer that the published code reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, LlavaConfig

from visper.common.errors import ConfigError
from visper.common.files import atomic_path
from visper.config import Run, load_run
from visper.data.chat_template import unwrapped_template
from visper.data.images import geometry_of
from visper.distillation import PREDICTORS, predictor_spec
from visper.model.build import STUDENT_FILE
from visper.published.config import SECTIONS
from visper.published.names import (
    DISTILLATION,
    INPUT_TABLE,
    MODEL,
    OUTPUT_TABLE,
    PROBES,
    PUBLISHED,
    Report,
    published_head_name,
    published_model_name,
)
from visper.published.probes import PROBES_FILE, WEIGHTS_FILE
from visper.published.to_visper import OVERWRITTEN, refuse_existing
from visper.published.weights import ShardWriter, Weights

LLMS = {"llama": "Llama", "phi3": "Phi3"}
"""LLMs that the published code knows, with their names in its classes."""

QUERIES = "task_tokens.queries."


@dataclass(frozen=True)
class Ours:
    """A folder of ours: its model's configuration, its task tokens, and what lies beside the model.

    Attributes:
        task_ids: per task, in sequence order, the vocabulary ids of its tokens.
        run: of its predictors.
        heads: tensors of predictors or probes, of their logit scales and of query matrices, by our names.
        kept: what a converted checkpoint kept for the way back.
    """

    folder: Path
    config: LlavaConfig
    processor: Any
    task_ids: Mapping[str, list[int]]
    run: Run | None
    heads: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]

    @classmethod
    def of(cls, folder: Path) -> Ours:
        """Reads everything but the model's weights. Raises ConfigError where there is no model of ours."""
        model = folder / MODEL
        if not (model / STUDENT_FILE).is_file():
            raise ConfigError(f"'{folder}' holds no model of ours: expected {model / STUDENT_FILE}, as stages write it")
        names = json.loads((model / STUDENT_FILE).read_text(encoding="utf-8"))["task_tokens"]
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
        tensors = {
            place: load_file(folder / place / WEIGHTS_FILE) if (folder / place / WEIGHTS_FILE).is_file() else {}
            for place in (DISTILLATION, PROBES, PUBLISHED)
        }
        return cls(
            folder,
            AutoConfig.from_pretrained(model, trust_remote_code=False),
            processor,
            {task: processor.tokenizer.convert_tokens_to_ids(tokens) for task, tokens in names.items()},
            load_run(folder / DISTILLATION / "run.yaml") if tensors[DISTILLATION] else None,
            tensors[DISTILLATION] | tensors[PROBES],
            tensors[PUBLISHED],
        )

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """Tapped layers by task, in the order of the published heads."""
        if self.run is not None and self.run.distillation is not None:
            return {name: task.layers for name, task in self.run.distillation.tasks.items()}
        found: dict[str, tuple[int, ...]] = {}
        if (self.folder / PROBES / PROBES_FILE).is_file():
            for name in json.loads((self.folder / PROBES / PROBES_FILE).read_text(encoding="utf-8")):
                task, _, layer = name.rpartition("_")
                found[task] = (*found.get(task, ()), int(layer))
        return found


def convert_to_published(source: str | Path, output: str | Path, encoder: str | None = None) -> Report:
    """Converts a folder of ours (a stage's output, or a converted checkpoint) into a published checkpoint.

    Args:
        encoder: id by which the published code shall load the image encoder; default: what the student was made of.

    Raises:
        ConfigError: ``output`` exists; ``source`` is no folder of ours; its student is none that the published code
            can hold (another LLM, other tasks, predictors of another form).
    """
    out = Path(output)
    refuse_existing(out)
    ours = Ours.of(Path(source))
    weights = Weights.of(ours.folder / MODEL)
    original = ours.folder / PUBLISHED / "config.json"
    report = Report(out)
    if original.is_file():
        config: dict[str, Any] = json.loads(original.read_text(encoding="utf-8"))
        config |= {"mm_vision_tower": encoder} if encoder else {}
    else:
        config = _config(ours, encoder)
        if geometry_of(ours.processor.image_processor) == "squash":
            report.notes.append("pictures were squashed to a square; the published code will crop them instead")
    with atomic_path(out) as partial:
        partial.mkdir()
        report.written["weights"] = _write_weights(partial, ours, weights, int(config["vocab_size"]))
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        _write_tokenizer(partial, ours, converted=original.is_file())
    return report


def _write_weights(folder: Path, ours: Ours, weights: Weights, vocabulary: int) -> int:
    """Writes a shard for each of the model's and one for the heads; returns the number of tensors."""
    heads = _published_heads(ours, weights)
    writer = ShardWriter(folder, len(weights.files) + bool(heads))
    for file in weights.files:
        shard = {}
        for name, tensor in weights.tensors(file, [n for n, place in weights.where.items() if place == file]):
            if name in (INPUT_TABLE, OUTPUT_TABLE):
                tensor = tensor[:vocabulary]
            if name == INPUT_TABLE and OVERWRITTEN in ours.kept:
                taken = [token for ids in ours.task_ids.values() for token in ids if token < vocabulary]
                tensor = tensor.index_copy(0, torch.tensor(taken), ours.kept[OVERWRITTEN])
            shard[published_model_name(name)] = tensor
        writer.write(shard)
    if heads:
        writer.write(heads)
    writer.finish()
    return len(weights.shapes) + len(heads)


def _published_heads(ours: Ours, weights: Weights) -> dict[str, Tensor]:
    """Query matrices, and of PT and probes the heads, under their published names."""
    tensors = dict(ours.heads)
    if not any(name.startswith(QUERIES) for name in tensors):
        tensors |= {name: value for name, value in ours.kept.items() if name.startswith(QUERIES)}
    if ours.task_ids and not any(name.startswith(QUERIES) for name in tensors):
        # After IFT only the rows in the vocabulary are left: as many queries as task tokens, each its own mean.
        table = weights.read([INPUT_TABLE])[INPUT_TABLE]
        tensors |= {f"{QUERIES}{task}": table[ids] for task, ids in ours.task_ids.items()}
    named = {
        published_head_name(name, ours.layers): value.reshape(()) if "logit_scales." in name else value
        for name, value in tensors.items()
    }
    # The published depth head has three MLPs, one for each use it never makes; all get the one that learned.
    copies = {
        name.replace(".linear_1.", f".linear_{number}."): value.clone()
        for name, value in named.items()
        if ".linear_1." in name
        for number in (2, 3)
    }
    return named | copies


def _config(ours: Ours, encoder: str | None) -> dict[str, Any]:
    """The config.json that the published code expects of such a model."""
    text, vision = ours.config.text_config, ours.config.vision_config
    if text.model_type not in LLMS or ours.config.vision_feature_select_strategy != "default":
        raise ConfigError(
            f"the published code knows LLMs of type {' and '.join(LLMS)} behind an encoder with a class token, not "
            f"{text.model_type} behind {vision.model_type}: such a student has no published form"
        )
    strange = [task for task in ours.task_ids if task not in SECTIONS]
    if strange:
        raise ConfigError(f"the published code knows the tasks {', '.join(SECTIONS)}, not {', '.join(strange)}")
    rope = dict(text.rope_parameters or {})
    values: dict[str, Any] = {
        **{k: v for k, v in text.to_dict().items() if k not in ("rope_parameters", "_name_or_path", "dtype")},
        "model_type": f"{'ola' if ours.run else 'llava'}_{text.model_type}",
        "architectures": [f"{'OlaLlava' if ours.run else 'Llava'}{LLMS[text.model_type]}ForCausalLM"],
        "rope_theta": rope.pop("rope_theta", 10000.0),
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "torch_dtype": str(ours.config.dtype or torch.float32).removeprefix("torch."),
        "image_aspect_ratio": "pad" if geometry_of(ours.processor.image_processor) == "pad" else "square",
        "mm_hidden_size": vision.hidden_size,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": ours.config.vision_feature_layer,
        "mm_vision_tower": encoder or vision._name_or_path,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
    }
    return values | _task_config(ours)


def _task_config(ours: Ours) -> dict[str, Any]:
    """The part of it that speaks of task tokens and predictors."""
    if not ours.task_ids:
        return {}
    per_task = {len(ids) for ids in ours.task_ids.values()}
    assert len(per_task) == 1, per_task
    values: dict[str, Any] = {
        "aux_mode": "-".join(ours.task_ids),
        "num_task_tokens": per_task.pop(),
        "task_token_format": "expand_emb",
    }
    if ours.run is None:
        kept = {t: ours.kept.get(f"{QUERIES}{t}", ids) for t, ids in ours.task_ids.items()}
        return values | {SECTIONS[task][0]: {"num_tokens": len(rows)} for task, rows in kept.items()}
    assert ours.run.distillation is not None
    settings = ours.run.distillation
    without = [task for task in ours.task_ids if task not in settings.tasks]
    if without:
        raise ConfigError(f"tasks {without} have task tokens but no predictors: the published code wants both or none")
    for name, task in settings.tasks.items():
        spec, own = PREDICTORS[name], predictor_spec(name, task.predictor)
        form = (own.queries, own.inner, own.mlp and name != "depth", own.num_queries)
        if form != (spec.queries, spec.inner, False, None):
            raise ConfigError(
                f"task '{name}': its predictors have another form than the published ones (queries, inner, mlp or "
                f"num_queries differ): {task.predictor}. They have no published form"
            )
        section, prefix = SECTIONS[name]
        width = len(ours.heads[f"objective.predictors.{name}_{task.layers[0]}.resampler.norm_out.weight"])
        values[section] = {
            "depth": own.depth,
            "dim_head": own.head_width,
            "num_heads": own.heads,
            "num_tokens": 1 if own.queries == "states" else len(ours.heads[f"{QUERIES}{name}"]),
            "output_dim": width,
            "ff_mult": own.ff_mult,
            f"{prefix}_layer_indices": "-".join(map(str, task.layers)),
            f"{prefix}_loss_weight": task.weight,
        }
        values[section] |= {"use_intermediate_depth": own.mlp} if name == "depth" else {}
    teachers = {"depth": "depth_estimator", "seg": "image_segmentor", "gen": "image_generator"}
    return values | {
        **{teachers[name]: task.teacher.model for name, task in settings.tasks.items()},
        "contrastive_loss_weight": settings.contrastive_weight,
        "pass_text_to_aux": settings.text_keys,
        "sample_tokens": False,
        "use_ce": False,
        "use_contrastive": True,
    }


def _write_tokenizer(folder: Path, ours: Ours, converted: bool) -> None:
    """The checkpoint's own tokenizer files; of a student of ours its tokenizer, with the LLM's chat template alone."""
    if converted:
        for file in (ours.folder / PUBLISHED).iterdir():
            if file.name not in (WEIGHTS_FILE, "config.json"):
                shutil.copyfile(file, folder / file.name)
        return
    tokenizer = ours.processor.tokenizer
    tokenizer.chat_template = unwrapped_template(str(ours.processor.chat_template))
    tokenizer.save_pretrained(folder)
