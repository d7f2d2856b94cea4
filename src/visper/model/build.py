"""Assembles, saves and loads the student: a stock LLaVA made of an encoder, a projector and an LLM.

Paper, section 3. The student is ``LlavaForConditionalGeneration`` with ``LlavaProcessor``; the task tokens are
vocabulary entries that the processor's chat template puts behind the image. What is saved loads in transformers
without this package, wherever the encoder is one that stock LLaVA can hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from visper.common.compat import save_under_published_names
from visper.common.console import without_loading_bars
from visper.common.errors import ConfigError
from visper.config import Geometry
from visper.config import Student as StudentConfig
from visper.data.chat_template import end_of_turn_token, llm_template, student_template
from visper.data.images import build_image_processor
from visper.model.encoders import Encoder, FeatureMapTower, load_encoder
from visper.model.hub import Vocabulary, loading, sizes_of, vocabulary_of
from visper.model.task_tokens import random_rows, task_token_names
from visper.model.words import add_words, set_to_mean

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
STUDENT_FILE = "student.json"
ANSWERING_SIDE = "left"
"""Where the tokenizer pads prompts: answers go on from their right end. Training pads in its collator, on the right."""

MODEL_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
---
A LLaVA model whose image encoder ({backbone}) gives a feature map, which stock LLaVA cannot read. Loading it needs the
package that registers its tower, `pip install 'visper-lm{extra}'`, imported before transformers loads:

```python
import visper.model  # registers the image encoder's tower
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained("this folder")
processor = AutoProcessor.from_pretrained("this folder")
```
"""
"""What a folder says that stock transformers alone cannot load."""


@dataclass
class Student:
    """A vision-language model with its processor; the vocabulary ids of its task tokens by task, and of added words."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor  # None in a skeleton
    task_token_ids: dict[str, list[int]] = field(default_factory=dict)
    word_ids: list[int] = field(default_factory=list)

    @property
    def image_token_id(self) -> int:
        """The vocabulary id whose copies hold the image's features."""
        return int(self.model.config.image_token_id)

    @property
    def hidden_size(self) -> int:
        """Width of the LLM."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the LLM."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def silent_ids(self) -> list[int]:
        """Vocabulary that stands for inputs only (image, task tokens): never an answer."""
        return [self.image_token_id, *(token for ids in self.task_token_ids.values() for token in ids)]


@without_loading_bars()
def build_student(
    config: StudentConfig, geometry: Geometry, dtype: torch.dtype | Literal["auto"] = torch.float32
) -> Student:
    """Assembles a student from published parts. With dtype "auto" these stay in the precision they are stored in.

    The projector is new (two linear layers with GELU between, ``mlp2x_gelu``); LLM and encoder bring their weights.
    Rows that the vocabulary gains are set to the mean of the rows it had.

    Raises:
        ConfigError: a part cannot be loaded, or the tokenizer has no chat template.
    """
    with loading("student.llm", config.llm):
        llm = AutoModelForCausalLM.from_pretrained(
            config.llm, dtype=dtype, trust_remote_code=config.trust_remote_code, revision=config.llm_revision
        )
    tokenizer, encoder = _reading_parts(config)
    if dtype == "auto":
        return assemble_student(llm, tokenizer, encoder, config, geometry, torch.float32)
    encoder.model.to(dtype)
    return assemble_student(llm, tokenizer, encoder, config, geometry)


def assemble_student(
    llm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    config: StudentConfig,
    geometry: Geometry,
    projector_dtype: torch.dtype | None = None,
) -> Student:
    """A student from loaded parts, or from parts on the meta device: then it has everything but weights.

    The tokenizer gains added words, the image token, the task tokens and, where it has none, a padding token. The
    projector has the LLM's precision, unless another is given.
    """
    word_ids, task_names = _extend_vocabulary(tokenizer, config)
    processor = _processor(tokenizer, encoder, task_names, config.system_prompt, geometry)
    image_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    model = _assemble(llm, encoder, len(tokenizer), image_id, tokenizer.pad_token_id, word_ids, projector_dtype)
    ids = {task: tokenizer.convert_tokens_to_ids(names) for task, names in task_names.items()}
    student = Student(model, processor, ids, word_ids)
    model.generation_config = _generation_config(llm, tokenizer, student.silent_ids)
    return student


def build_processor(config: StudentConfig, geometry: Geometry) -> LlavaProcessor:
    """The processor that ``build_student`` gives the student, without loading the LLM.

    Raises:
        ConfigError: a part cannot be loaded, or the tokenizer has no chat template.
    """
    tokenizer, encoder = _reading_parts(config)
    _, task_names = _extend_vocabulary(tokenizer, config)
    return _processor(tokenizer, encoder, task_names, config.system_prompt, geometry)


def _reading_parts(config: StudentConfig) -> tuple[PreTrainedTokenizerBase, Encoder]:
    tokenizer = _tokenizer(config)
    encoder = load_encoder(
        config.encoder,
        config.feature_layer,
        config.image_size,
        config.trust_remote_code,
        revision=config.encoder_revision,
    )
    return tokenizer, encoder


def _tokenizer(config: StudentConfig) -> PreTrainedTokenizerBase:
    with loading("student.llm", config.llm):
        return AutoTokenizer.from_pretrained(
            config.llm, trust_remote_code=config.trust_remote_code, revision=config.llm_revision
        )


def build_skeleton(config: StudentConfig) -> Student:
    """The student that ``build_student`` would make, at full size but without weights: parameters on the meta device.

    Needs configurations only (``hub.sizes_of``), so a published base takes no download; with ``add_words`` also its
    tokenizer. It has no processor.

    Raises:
        ConfigError: a part's configuration cannot be loaded.
    """
    trust = config.trust_remote_code
    llm_config = sizes_of(config.llm, "student.llm", trust_remote_code=trust, revision=config.llm_revision)
    word_ids: list[int] = []
    if config.add_words:
        tokenizer = _tokenizer(config)
        word_ids = add_words(tokenizer, config.add_words)
        vocabulary = Vocabulary.of(tokenizer)
    else:
        vocabulary = vocabulary_of(config.llm, "student.llm", trust, config.llm_revision)
    with loading("student.llm", config.llm), torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(llm_config, trust_remote_code=trust)
    encoder = load_encoder(
        config.encoder, config.feature_layer, config.image_size, trust, False, config.encoder_revision
    )
    # In the order of _extend_vocabulary: words, image, task tokens, padding.
    image_id = vocabulary.size
    layout = config.task_tokens
    order, per_task = (layout.order, layout.per_task) if layout else ((), 0)
    starts = {task: image_id + 1 + at * per_task for at, task in enumerate(order)}
    ids = {task: list(range(start, start + per_task)) for task, start in starts.items()}
    size = image_id + 1 + len(order) * per_task + (not vocabulary.has_pad)
    pad_id = llm_config.pad_token_id if vocabulary.has_pad else size - 1
    return Student(_assemble(llm, encoder, size, image_id, pad_id, word_ids), None, ids, word_ids)


def _extend_vocabulary(
    tokenizer: PreTrainedTokenizerBase, config: StudentConfig
) -> tuple[list[int], dict[str, list[str]]]:
    """Returns the ids of added words, and the task tokens by task."""
    layout = config.task_tokens
    names = {task: task_token_names(task, layout.per_task) for task in layout.order} if layout else {}
    new = [IMAGE_TOKEN, *(name for task in names.values() for name in task)]
    reserved = sorted({*new, PAD_TOKEN} & {*config.add_words})
    if reserved:
        raise ConfigError(f"student.add_words names {reserved}, which the student uses itself: remove them")
    word_ids = add_words(tokenizer, config.add_words)
    tokenizer.add_tokens(new, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.padding_side = ANSWERING_SIDE
    tokenizer.init_kwargs["padding_side"] = ANSWERING_SIDE  # or `save_pretrained` leaves it out where it was a default
    return word_ids, names


def _processor(
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    task_names: Mapping[str, list[str]],
    system_prompt: str | None,
    geometry: Geometry,
) -> LlavaProcessor:
    behind_image = [name for names in task_names.values() for name in names]
    tokenizer.chat_template = llm_template(tokenizer)
    template = student_template(tokenizer.chat_template, IMAGE_TOKEN, behind_image, system_prompt)
    return LlavaProcessor(
        image_processor=build_image_processor(geometry.value, encoder.image_size, encoder.mean, encoder.std),
        tokenizer=tokenizer,
        patch_size=encoder.patch_size,
        vision_feature_select_strategy=encoder.select,
        num_additional_image_tokens=encoder.extra_tokens,
        image_token=IMAGE_TOKEN,
        chat_template=template,
    )


def _assemble(
    llm: PreTrainedModel,
    encoder: Encoder,
    vocabulary_size: int,
    image_id: int,
    pad_id: int | None,
    word_ids: Sequence[int] = (),
    projector_dtype: torch.dtype | None = None,
) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=encoder.model.config,
        text_config=llm.config,
        image_token_index=image_id,
        image_seq_length=encoder.num_tokens,
        vision_feature_layer=encoder.feature_layer,
        vision_feature_select_strategy=encoder.select,
        projector_hidden_act="gelu",
        tie_word_embeddings=bool(llm.config.tie_word_embeddings),
        dtype=llm.dtype,
    )
    # The skeleton costs nothing: its parts are built without memory and then replaced by the loaded ones.
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = encoder.model
    model.model.language_model = llm.get_decoder()
    model.lm_head = llm.get_output_embeddings()
    with llm.device:
        model.model.multi_modal_projector = LlavaMultiModalProjector(config).to(projector_dtype or llm.dtype)
    for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        linear.reset_parameters()
    old_size = model.get_input_embeddings().weight.shape[0]
    if vocabulary_size > old_size:
        model.resize_token_embeddings(vocabulary_size, mean_resizing=False)
    # Words may lie in rows that the LLM has beyond its tokenizer's entries.
    new_rows = sorted({*range(old_size, vocabulary_size), *word_ids})
    if new_rows:
        set_to_mean((model.get_input_embeddings(), model.lm_head), new_rows, old_size)
    model.config.text_config.pad_token_id = pad_id
    model.config.pad_token_id = pad_id
    model.tie_weights()
    save_under_published_names(model)
    return model.eval()


def _generation_config(
    llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, silent_ids: list[int]
) -> GenerationConfig:
    base: GenerationConfig = llm.generation_config or GenerationConfig()
    known = base.eos_token_id if isinstance(base.eos_token_id, list) else [base.eos_token_id]
    turn_end = tokenizer.convert_tokens_to_ids(end_of_turn_token(tokenizer))
    ends = {token for token in (*known, tokenizer.eos_token_id, turn_end) if token is not None}
    base.eos_token_id = sorted(ends)
    base.pad_token_id = tokenizer.pad_token_id
    base.suppress_tokens = sorted(silent_ids)
    return base


@without_loading_bars()
def save_student(student: Student, folder: Path) -> None:
    """Writes a plain LLaVA folder into ``folder``, which must not exist yet. Not atomic: see ``data.complete``.

    Where stock LLaVA cannot hold the encoder, a README.md says what the folder needs.
    """
    folder.mkdir(parents=True)
    student.model.save_pretrained(folder)
    save_processor(student, folder)


def save_processor(student: Student, folder: Path) -> None:
    """Writes what a student's folder holds beside its model: tokenizer, processor, template, names of added tokens."""
    student.processor.save_pretrained(folder)
    names = {task: student.processor.tokenizer.convert_ids_to_tokens(i) for task, i in student.task_token_ids.items()}
    content = json.dumps({"task_tokens": names, "word_ids": student.word_ids}, indent=1)
    (folder / STUDENT_FILE).write_text(content, encoding="utf-8")
    tower = student.model.model.vision_tower
    if isinstance(tower, FeatureMapTower):
        backbone: Any = tower.config.backbone_config
        name = getattr(backbone, "architecture", backbone.model_type)
        card = MODEL_CARD.format(backbone=name, extra="[timm]" if backbone.model_type == "timm_wrapper" else "")
        (folder / "README.md").write_text(card, encoding="utf-8")


@without_loading_bars()
def load_student(folder: str | Path, dtype: torch.dtype = torch.float32, **options: Any) -> Student:
    """Loads a student from a stage's output, from its ``model`` folder, or from any LLaVA folder or hub id.

    Args:
        **options: more for ``from_pretrained``, such as a quantization.

    Raises:
        ConfigError: there is no such folder or it holds no LLaVA model.
    """
    source = _student_place(folder)
    try:
        model = LlavaForConditionalGeneration.from_pretrained(source, dtype=dtype, **options)
        processor = _load_processor(source)
    except OSError as error:
        raise ConfigError(f"cannot load a student from '{folder}': {str(error).splitlines()[0]}") from error
    names, word_ids = _read_added_tokens(source)
    ids = {task: processor.tokenizer.convert_tokens_to_ids(tokens) for task, tokens in names.items()}
    return Student(model.eval(), processor, ids, word_ids)


def _read_added_tokens(source: str) -> tuple[dict[str, list[str]], list[int]]:
    """Names of the task tokens and ids of added words; none where the model was not saved by this package."""
    file = Path(source) / STUDENT_FILE
    if not Path(source).is_dir():
        try:
            file = Path(hf_hub_download(source, STUDENT_FILE))
        except EntryNotFoundError:
            return {}, []
    if not file.is_file():
        return {}, []
    content = json.loads(file.read_text(encoding="utf-8"))
    return content["task_tokens"], content["word_ids"]


def load_processor(folder: str | Path) -> LlavaProcessor:
    """The processor that ``load_student`` gives the student, without loading its weights.

    Raises:
        ConfigError: there is no such folder or it holds no LLaVA model.
    """
    try:
        return _load_processor(_student_place(folder))
    except OSError as error:
        raise ConfigError(f"cannot load a processor from '{folder}': {str(error).splitlines()[0]}") from error


def _load_processor(source: str) -> LlavaProcessor:
    # Without trust_remote_code=False it may ask on the console.
    return AutoProcessor.from_pretrained(source, trust_remote_code=False, padding_side=ANSWERING_SIDE)


def _student_place(folder: str | Path) -> str:
    place = Path(folder)
    if (place / "model" / "config.json").is_file():
        place = place / "model"
    if place.is_dir() and not (place / "config.json").is_file():
        raise ConfigError(f"'{folder}' holds no model: expected config.json there or in its folder 'model'")
    return str(place) if place.is_dir() else str(folder)


def initial_queries(student: Student, rows: Mapping[str, int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random query matrices ``[rows, D]`` whose group means have the spread of the LLM's word embeddings."""
    embedding: nn.Module = student.model.get_input_embeddings()
    return {
        task: random_rows(embedding, rows.get(task, len(ids)), student.hidden_size, len(ids), generator)
        for task, ids in student.task_token_ids.items()
    }
