"""A converted checkpoint without its weights: student, objective and probes on the meta device.

Names and shapes come from the code that builds and saves models, not from a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from visper.common.errors import ConfigError, first_line
from visper.config import Run, explain, load_run, read_recipe
from visper.data.normalization import normalization_of
from visper.distillation import EmbeddingDistillation
from visper.model import Encoder, Student, assemble_student, load_encoder
from visper.model.hub import UNREADABLE
from visper.published.config import Published
from visper.published.names import (
    DISTILLATION,
    MODEL,
    OUTPUT_TABLE,
    PROBES,
    QUERIES,
    Slot,
    published_head_name,
    published_model_name,
)
from visper.published.probes import build_probes, probe_settings

PROMPT_RECIPES = {"llama": "llama3-8b-vit-l/pt", "phi3": "phi3-mini-vit-l/pt"}
"""LLM -> the recipe that holds the system prompt with which the published models were trained."""

PT_RECIPE = "_parts/_pt.yaml"


@dataclass(frozen=True)
class Skeleton:
    """A converted checkpoint without its weights.

    Attributes:
        student: its parameters are on the meta device; the encoder's are loaded if the checkpoint lacks them.
        state: the student's parameters by their names on disk.
        run: the run that describes the predictors of a PT checkpoint.
        probes: settings of its probes, by name.
        heads: shapes of predictors, logit scales and query matrices, by folder and name there; under None the query
            matrices of a checkpoint without predictors, which are only read for the task tokens' embeddings.
        layers: tapped layers by task, in the checkpoint's order.
    """

    student: Student
    state: Mapping[str, Tensor]
    run: Run | None
    probes: Mapping[str, Mapping[str, Any]]
    heads: Mapping[str | None, Mapping[str, tuple[int, ...]]]
    layers: Mapping[str, tuple[int, ...]]

    def slots(self) -> dict[str, Slot]:
        """Every parameter that the checkpoint must have, by published name."""
        found = {published_model_name(n): Slot(MODEL, n, tuple(t.shape)) for n, t in self.state.items()}
        for folder, shapes in self.heads.items():
            for name, shape in shapes.items():
                theirs = () if "logit_scales." in name else shape  # scalars in published checkpoints
                found[published_head_name(name, self.layers)] = Slot(folder, name, theirs)
        return found


def converted_skeleton(published: Published, output: Path, encoder: str | None, encoder_inside: bool) -> Skeleton:
    """Builds the converted checkpoint without its weights.

    Args:
        output: the converted checkpoint's folder, for its run.
        encoder: hub id or folder that replaces the one in ``mm_vision_tower``.
        encoder_inside: the checkpoint has the encoder's weights, so that only its configuration is loaded.

    Raises:
        ConfigError: tokenizer or encoder cannot be loaded.
    """
    prompt: Any = load_run(PROMPT_RECIPES[published.llm]).student
    assert prompt is not None
    settings = published.student(encoder or str(published.config["mm_vision_tower"]), prompt.system_prompt)
    try:
        loaded = _encoder(settings.encoder, settings.feature_layer, settings.image_size, encoder_inside)
    except (OSError, *UNREADABLE) as error:
        raise ConfigError(
            f"cannot load the image encoder '{settings.encoder}': {first_line(error)} Give the folder of that encoder "
            "as --encoder" + ("; its configuration is enough" if encoder_inside else "")
        ) from error
    llm_config = _llm_config(published)
    dtype = _dtype(published.config)
    with torch.device("meta"):
        llm: PreTrainedModel = AutoModelForCausalLM.from_config(llm_config, dtype=dtype)
    llm.config.architectures = [type(llm).__name__]
    if (published.folder / "generation_config.json").is_file():
        llm.generation_config = GenerationConfig.from_pretrained(published.folder)
    loaded.model.to(dtype)
    student = assemble_student(llm, _tokenizer(published, llm_config), loaded, settings, published.geometry)
    student.model.config.architectures = [type(student.model).__name__]
    state = dict(revert_weight_conversion(student.model, student.model.state_dict()))
    if llm_config.tie_word_embeddings:
        state.pop(OUTPUT_TABLE)
    run = _run(published, settings.model_dump(), output) if published.kind == "pt" and published.tasks else None
    probes = probe_settings(student.hidden_size, published.heads) if published.own_latents else {}
    layers = {task: head.layers for task, head in published.heads.items()}
    return Skeleton(student, state, run, probes, _head_shapes(published, student, run, probes), layers)


def _encoder(name: str, layer: int, size: int | None, inside: bool) -> Encoder:
    if not inside:
        return load_encoder(name, layer, size)
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    if config.model_type != "clip_vision_model":
        return load_encoder(name, layer, size)
    # CLIP's layout follows from its configuration, so weights that the checkpoint has are not downloaded.
    mean, std = tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)
    try:
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        mean, std = normalization_of(processor.to_dict())
    except OSError:
        pass  # a folder with only the configuration: use CLIP's published mean and standard deviation
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    config.architectures = [type(model).__name__]
    patches = (config.image_size // config.patch_size) ** 2
    return Encoder(model, layer, "default", config.image_size, config.patch_size, patches, 1, mean, std)


def _llm_config(published: Published) -> PreTrainedConfig:
    """The LLM's part of the configuration. Its other keys belong to LLaVA and to the heads."""
    known = set(AutoConfig.for_model(published.llm).to_dict()) | {"rope_theta", "rope_scaling"}
    known -= {"model_type", "architectures", "transformers_version", "dtype", "_name_or_path"}
    return AutoConfig.for_model(published.llm, **{k: v for k, v in published.config.items() if k in known})


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    dtype = getattr(torch, str(config.get("torch_dtype", config.get("dtype")) or "float32"), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _tokenizer(published: Published, llm_config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    try:
        # Pass the LLM's configuration: the model type in the folder's own is unknown to transformers.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            published.folder, config=llm_config, trust_remote_code=False
        )
    except (OSError, ImportError, *UNREADABLE) as error:
        raise ConfigError(
            f"cannot load the tokenizer in '{published.folder}': {first_line(error)} Copy the base LLM's tokenizer "
            "files there"
        ) from error
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer in '{published.folder}' has no chat template: add the base LLM's there as "
            "chat_template.jinja (Llama-3 and Phi-3 have one in tokenizer_config.json, Vicuna has none)"
        )
    return tokenizer


def _run(published: Published, student: dict[str, Any], output: Path) -> Run:
    """The published PT run, with this checkpoint's student, layers and sizes, and the teachers of visper's recipe.

    The checkpoint names its own teachers by a .pth file and by repositories that no longer exist.
    """
    recipe = read_recipe(PT_RECIPE)
    contrastive = published.config.get("contrastive_loss_weight", 0.3)
    published_tasks = recipe["distillation"]["tasks"]
    tasks = {
        task: {
            "target": published_tasks[task]["target"],
            "layers": head.layers,
            "weight": head.weight,
            "head": {**published_tasks[task].get("head", {}), **head.sizes, "mlp": head.mlp},
            "loss": {"smooth_l1": 1.0, **({"info_nce": contrastive} if contrastive else {})},
        }
        for task, head in published.heads.items()
    }
    values = {
        **recipe,
        "name": f"converted-{output.name}",
        "output": str(output),
        "student": student,
        "data": {**recipe["data"], "geometry": published.geometry.value},
        "distillation": {
            "tasks": tasks,
            "text_keys": bool(published.config.get("pass_text_to_aux", True)),
        },
    }
    try:
        return Run.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, f"{published.folder / 'config.json'}, as a run", Run, values)) from error


def _head_shapes(
    published: Published, student: Student, run: Run | None, probes: Mapping[str, Any]
) -> dict[str | None, dict[str, tuple[int, ...]]]:
    queries: dict[str, tuple[int, ...]] = {
        f"{QUERIES}{task}": (rows, student.hidden_size) for task, rows in published.query_rows.items()
    }
    if run is not None:
        assert run.distillation is not None
        specs = {task: head.target for task, head in published.heads.items()}
        with torch.device("meta"):
            objective = EmbeddingDistillation.from_config(
                run.distillation, specs, student.hidden_size, student.num_layers
            )
        return {DISTILLATION: {f"objective.{n}": tuple(t.shape) for n, t in objective.state_dict().items()} | queries}
    if probes:
        with torch.device("meta"):
            shapes = {f"predictors.{n}": tuple(t.shape) for n, t in build_probes(probes).state_dict().items()}
        scales = published.heads if published.kind == "pt" else ()
        return {PROBES: shapes | {f"logit_scales.{task}": () for task in scales}}
    return {None: queries} if queries else {}
