"""The student, and saving and loading its folder, which transformers can load without this package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from visper.common.console import without_loading_bars
from visper.common.errors import ConfigError
from visper.common.files import read_json_object
from visper.common.manifest import require_undamaged, write_manifest
from visper.data.image_places import knows_places
from visper.data.vlm import NOMINAL_SIZE, ModelInputs, encoder_for
from visper.model.card import write_card
from visper.model.hub import loading, refuse_adapter, stored_file
from visper.model.known import require_known
from visper.model.task_tokens import random_rows

STUDENT_FILE = "student.json"
ANSWERING_SIDE = "left"
"""The tokenizer's padding side: answers continue a prompt at its right end. The training collator pads on the right."""
SAMPLING = ("temperature", "top_p", "top_k", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings of generation that are read only with ``do_sample``."""
BEAMS = ("early_stopping", "length_penalty")
"""Settings of generation that are read only with several ``num_beams``."""


@dataclass
class Student:
    """A vision-language model with its processor, and the ids of its task tokens (by task) and added words."""

    model: PreTrainedModel  # LLaVA, or any model that passes ``known.require_known``
    processor: Any  # LlavaProcessor, or the model's own; None in a skeleton
    task_token_ids: dict[str, list[int]] = field(default_factory=dict)
    word_ids: list[int] = field(default_factory=list)

    @property
    def is_llava(self) -> bool:
        """Whether it is a LLaVA; other models read images and text with their own processor."""
        return isinstance(self.model.config, LlavaConfig)

    @property
    def image_token_id(self) -> int:
        """The vocabulary id whose embeddings are replaced by image features."""
        return int(self.model.config.image_token_id)

    @property
    def hidden_size(self) -> int:
        """Width of the LLM's hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the LLM."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def positions(self) -> int | None:
        """The LLM's number of positions, beyond which its output is noise; None if its configuration sets none."""
        found: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return found

    @property
    def num_image_tokens(self) -> int:
        """Tokens per image; if they depend on the image's size, those of an image of nominal size."""
        if self.is_llava:
            return int(self.model.config.image_seq_length)
        return encoder_for(self.processor).num_image_tokens

    @property
    def knows_places(self) -> bool:
        """Whether the position of each image token in the image is known."""
        if self.is_llava:
            return isqrt(self.num_image_tokens) ** 2 == self.num_image_tokens
        return knows_places(self.processor)

    def blank_image(self) -> dict[str, torch.Tensor]:
        """The inputs of the model's forward for an image of one color."""
        if not self.is_llava:
            return ModelInputs(self.processor, self.image_token_id).images([[Image.new("RGB", NOMINAL_SIZE)]])
        size = self.model.config.vision_config.image_size
        return {"pixel_values": torch.zeros(1, 3, size, size)}

    @property
    def silent_ids(self) -> list[int]:
        """Ids of tokens that are inputs only and never generated: image and task tokens.

        For models other than LLaVA only the task tokens: their other tokens are scored as the model itself does.
        """
        image = [self.image_token_id] if self.is_llava else []
        return [*image, *(token for ids in self.task_token_ids.values() for token in ids)]


def suppress(generation: GenerationConfig, tokens: Iterable[int]) -> None:
    """Lets a model never generate ``tokens``.

    Also removes settings that its generation never reads, such as the temperature of Vicuna, which does not
    sample: transformers refuses to save changed settings that have them.
    """
    generation.suppress_tokens = sorted({*(generation.suppress_tokens or []), *tokens})
    ignored = (*(() if generation.do_sample else SAMPLING), *(() if (generation.num_beams or 1) > 1 else BEAMS))
    generation.update(**dict.fromkeys(ignored))


@without_loading_bars()
def save_student(student: Student, folder: Path) -> None:
    """Writes the model into ``folder``, which must not exist yet. Not atomic: see ``files.atomic_path``.

    The model card says whether loading needs this package. No file names a folder of this machine.
    """
    folder.mkdir(parents=True)
    _forget_places(student.model.config)
    student.model.save_pretrained(folder)
    save_processor(student, folder)
    write_card(folder)
    write_manifest(folder)


def _forget_places(config: PreTrainedConfig) -> None:
    for part in config.sub_configs:
        own = getattr(config, part, None)
        if isinstance(own, PreTrainedConfig):
            if Path(own.name_or_path).exists():
                own.name_or_path = ""
            _forget_places(own)


def save_processor(student: Student, folder: Path) -> None:
    """Writes a student's tokenizer, processor, chat template and the names of its added tokens."""
    student.processor.save_pretrained(folder)
    names = {task: student.processor.tokenizer.convert_ids_to_tokens(i) for task, i in student.task_token_ids.items()}
    content = json.dumps({"task_tokens": names, "word_ids": student.word_ids}, indent=1)
    (folder / STUDENT_FILE).write_text(content, encoding="utf-8")


@without_loading_bars()
def load_student(
    folder: str | Path, dtype: torch.dtype = torch.float32, revision: str | None = None, **options: Any
) -> Student:
    """Loads a student from a stage's output, a model folder or a hub id: a LLaVA or another model that can be trained.

    Args:
        revision: commit, tag or branch of a hub id.
        **options: more arguments of ``from_pretrained``, such as a quantization.

    Raises:
        ConfigError: there is no such folder, or it holds neither a LLaVA nor another model that can be trained.
        DataError: its files do not match their manifest; remove the manifest to accept them.
    """
    source = student_place(folder)
    if options.get("device_map") != "meta":
        require_undamaged(Path(source))
    with loading("student", str(folder)):
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        if not isinstance(config, LlavaConfig):
            require_known(str(folder), config)
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, revision=revision, **options)
        processor = _load_processor(source, revision)
    names, word_ids = read_added_tokens(source, revision)
    ids = {task: processor.tokenizer.convert_tokens_to_ids(tokens) for task, tokens in names.items()}
    return Student(model.eval(), processor, ids, word_ids)


def read_added_tokens(source: str, revision: str | None = None) -> tuple[dict[str, list[str]], list[int]]:
    """Names of the task tokens and ids of added words; both empty if the model was not saved by this package.

    Raises:
        ConfigError: an older version saved them, or the hub cannot be reached (``stored_file``).
    """
    file = stored_file(source, STUDENT_FILE, revision)
    if file is None:
        return {}, []
    content = read_json_object(file)
    missing = [key for key in ("task_tokens", "word_ids") if key not in content]
    if missing:
        raise ConfigError(
            f"'{file}' has no {' and no '.join(missing)}, so an older version of visper wrote it: train the stage "
            'again, or add the missing keys ("word_ids": [] if no words were added to the tokenizer)'
        )
    return content["task_tokens"], content["word_ids"]


def load_processor(folder: str | Path, revision: str | None = None) -> Any:
    """The processor that ``load_student`` gives the student, without loading its weights.

    Raises:
        ConfigError: there is no such folder, or it holds no model.
    """
    with loading("student", str(folder)):
        return _load_processor(student_place(folder), revision)


def _load_processor(source: str, revision: str | None) -> Any:
    # Without trust_remote_code=False, transformers may prompt on the console.
    return AutoProcessor.from_pretrained(
        source, revision=revision, trust_remote_code=False, padding_side=ANSWERING_SIDE
    )


def student_place(folder: str | Path) -> str:
    """The folder that holds a student's model, ``model`` in a stage's output; a hub id is returned unchanged.

    Raises:
        ConfigError: the folder holds no model, or there is none, and the name cannot be a hub id.
    """
    place = Path(folder)
    if place.is_file():
        raise ConfigError(f"'{folder}' is a file: expected a stage's output, a model folder or a hub id")
    if not place.exists() and (len(place.parts) > 2 or str(folder).startswith((".", "/", "~"))):
        raise ConfigError(f"there is no folder '{folder}', and the name cannot be a hub id")
    if (place / "model" / "config.json").is_file():
        place = place / "model"
    refuse_adapter(str(folder))
    if place.is_dir() and not (place / "config.json").is_file():
        raise ConfigError(f"'{folder}' holds no model: expected config.json there or in its folder 'model'")
    return str(place) if place.is_dir() else str(folder)


def initial_queries(student: Student, rows: Mapping[str, int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random query matrices ``[rows, D]`` whose group means have the standard deviation of the LLM's embeddings."""
    embedding: nn.Module = student.model.get_input_embeddings()
    return {
        task: random_rows(embedding, rows.get(task, len(ids)), student.hidden_size, len(ids), generator)
        for task, ids in student.task_token_ids.items()
    }
