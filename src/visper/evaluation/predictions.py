"""Predictions that the layers of a pre-trained student make for images.

Shape suffixes: S = images, N = teacher tokens, E = teacher width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, LlavaProcessor

from visper.common.errors import ConfigError, counted
from visper.common.manifest import require_undamaged
from visper.config import Run, Stage, load_run
from visper.data.vlm import ModelInputs
from visper.distillation import Teacher
from visper.distillation.teachers.tasks import build_teachers, specs_of
from visper.evaluation.ask import model_inputs
from visper.model import Student, load_student
from visper.model.student import read_added_tokens
from visper.training.assemble import build_training_model
from visper.training.module import TrainingModel


@dataclass(frozen=True)
class PreTrained:
    """A finished PT run: its configuration, its student with predictors and queries, and its teachers by task."""

    run: Run
    model: TrainingModel
    teachers: Mapping[str, Teacher]


def load_pre_trained(output: str | Path, overrides: Sequence[str] = (), student: Student | None = None) -> PreTrained:
    """Loads a finished PT run in evaluation mode, on the GPU if there is one.

    Args:
        output: the folder with ``model/`` and ``distillation/``, or its ``model``.
        overrides: changes to its run, such as ``distillation.tasks.depth.target.model=elsewhere``.
        student: student of a later stage, whose states the predictors read in place of those of their own student.

    Raises:
        ConfigError: the folder has no predictors, a teacher cannot be loaded or does not fit them, or ``student`` does
            not have the architecture of their own student.
    """
    folder = predictors_folder(output)
    run = load_run(folder / "distillation" / "run.yaml", overrides)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = device == "cuda" and run.optimization.precision == "bfloat16"
    if student is None:
        student = load_student(folder, torch.bfloat16 if half else torch.float32)
    else:
        _require_fit(student, folder)
    try:
        teachers = build_teachers(run.distillation, run.optimization.precision, student.task_token_ids, device)
    except ConfigError as error:
        raise ConfigError(f"{error}\nif it has moved: --set distillation.tasks.TASK.target.model=PLACE") from error
    model = build_training_model(student, run.stage, run.distillation, specs_of(teachers), run.seed)
    model.read_vocabulary()  # a later stage may have trained its rows further than PT's queries
    require_undamaged(folder / "distillation")
    weights = load_file(folder / "distillation" / "weights.safetensors")
    needed = {name for name in model.state_dict() if name.startswith(("objective.", "task_tokens."))}
    if needed != set(weights):
        different = sorted(needed ^ set(weights))
        raise ConfigError(
            f"'{folder / 'distillation'}' was saved with other tasks, layers or predictors than those of its run.yaml "
            f"(with your changes): they differ in {counted(len(different), 'weight')}, such as '{different[0]}'"
        )
    try:
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ConfigError(
            f"the predictors in '{folder / 'distillation'}' were trained with teachers of other shapes: {error}"
        ) from error
    return PreTrained(run, model.to(device).eval(), teachers)


def predict_images(
    model: TrainingModel, images: Sequence[Image.Image], prompt: str, batch: int = 50
) -> dict[str, Tensor]:
    """Predictions ``{"depth/20": [S, N, E]}`` (float32, CPU) for every image, with the same prompt and no answer.

    Predictors also read the text, and a caption would tell them what the image shows.
    """
    processor = model.processor
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(images), batch):
        chosen = list(images[start : start + batch])
        inputs = model_inputs(processor, [prompt] * len(chosen), [[image] for image in chosen])
        inputs = inputs.to(model.student.device, model.student.dtype)
        tokens = (inputs["input_ids"] == model.image_token_id).sum(1)
        places = None
        if not isinstance(processor, LlavaProcessor):
            shown = [[image] for image in chosen]
            places = ModelInputs(processor, model.image_token_id).places(shown, tokens.tolist(), inputs)
        rows = torch.arange(len(chosen), device=tokens.device)
        of_images = (rows, tokens, None, None if places is None else places.to(tokens.device))
        for name, value in model.predict(inputs, *of_images).items():
            parts.setdefault(name, []).append(value.float().cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def task_of(name: str) -> str:
    """The task of a prediction's name, such as "depth" of "depth/20"."""
    return name.partition("/")[0]


def layer_of(name: str) -> int:
    """The layer of a prediction's name, such as 20 of "depth/20"."""
    return int(name.rpartition("/")[2])


def predicts_target(values_SNE: Tensor, teacher: Teacher) -> bool:
    """Whether predictions have the shape of the teacher's target. Under the loss gram they may have another width."""
    return values_SNE.shape[1:] == (teacher.spec.tokens, teacher.spec.width)


def teacher_targets(teacher: Teacher, images: Sequence[Image.Image], batch: int = 100) -> Tensor:
    """A teacher's targets ``[S, N, E]`` (float32, CPU) for images already in the run's geometry."""
    parts = []
    for start in range(0, len(images), batch):
        parts.append(teacher(teacher.see(images[start : start + batch])).float().cpu())
    return torch.cat(parts)


def other_weights_note(predictors: str | Path, model: str | Path) -> str | None:
    """A warning for drawings by predictors that were trained with other weights than the model's; None for its own.

    Raises:
        ConfigError: the folder ``predictors`` has none.
    """
    if predictors_folder(predictors).resolve() in (Path(model).resolve(), Path(model).resolve().parent):
        return None
    return (
        f"Predictors of {predictors} with the weights of {model}, which they were not trained with: a worse drawing "
        "may come from predictors that no longer fit, not from the content of the layers."
    )


def _require_fit(student: Student, folder: Path) -> None:
    """Raises ConfigError unless the student has the layers, width and task tokens that the predictors read."""
    llm = AutoConfig.from_pretrained(folder / "model", trust_remote_code=False).get_text_config()
    names = student.processor.tokenizer.convert_ids_to_tokens
    tokens = {task: names(ids) for task, ids in student.task_token_ids.items()}
    found = (student.num_layers, student.hidden_size, tokens)
    read = (llm.num_hidden_layers, llm.hidden_size, read_added_tokens(str(folder / "model"))[0])
    if found != read:
        raise ConfigError(
            f"the predictors in '{folder}' read an LLM of {_shape(*read)}; the model has {_shape(*found)}: give the PT "
            "run that it was fine-tuned from"
        )


def _shape(layers: int, width: int, task_tokens: Mapping[str, Sequence[str]]) -> str:
    tokens = ", ".join(f"{task} x {len(names)}" for task, names in task_tokens.items())
    return f"{layers} layers, width {width}, task tokens {tokens or 'none'}"


def predictors_folder(output: str | Path) -> Path:
    """The folder with predictors: the output of a finished PT run, given directly or as its ``model`` folder.

    Raises:
        ConfigError: it has none; the message says where they may be.
    """
    output = Path(output)
    for folder in (output, output.parent):
        if (folder / "distillation" / "weights.safetensors").is_file():
            return folder
    if not output.is_dir():
        raise ConfigError(f"no folder '{output}': give the output of a finished PT run")
    hint = "give the output of a finished PT run, with its folders 'model' and 'distillation'"
    if (output / "run.yaml").is_file():
        run = load_run(output / "run.yaml")
        if run.stage is not Stage.PT:
            before = f", perhaps '{run.start_from}'" if run.start_from else ""
            hint = f"stage '{run.stage}' keeps none, give the output of the PT run before it{before}"
        elif run.distillation is None:
            hint = "this PT ran without 'distillation'"
    raise ConfigError(f"'{output}' has no embedding predictors: {hint}")
