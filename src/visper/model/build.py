"""Assembles the student: a stock LLaVA from an encoder, a projector and an LLM.

Paper, section 3. The student is ``LlavaForConditionalGeneration`` with ``LlavaProcessor``; the task tokens are
vocabulary entries that the processor's chat template puts after the image. A saved student loads in transformers
without this package if its encoder is one that stock LLaVA supports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from transformers import (
    AutoModelForCausalLM,
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
from visper.model.encoders import Encoder, load_encoder
from visper.model.hub import Vocabulary, loading, sizes_of, vocabulary_of
from visper.model.logits import plain_head
from visper.model.student import ANSWERING_SIDE, Student, suppress
from visper.model.task_tokens import task_token_names
from visper.model.words import add_words, move_apart, set_to_mean

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"


@without_loading_bars()
def build_student(
    config: StudentConfig,
    geometry: Geometry,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    device_map: str | None = None,
) -> Student:
    """Assembles a student from pretrained LLM and encoder, and a new projector (``mlp2x_gelu``: linear, GELU, linear).

    New rows of the vocabulary are set to the mean of the existing rows; for added words, noise is added.

    Args:
        dtype: precision of the student; "auto" keeps LLM and encoder as they are stored, with a float32 projector.
        device_map: "meta" reads no weights and puts all parameters on the meta device.

    Raises:
        ConfigError: a part cannot be loaded, the tokenizer has no chat template, or a LLaVA cannot compute the LLM's
            logits (``logits.plain_head``).
    """
    with loading("student.llm", config.llm):
        llm = AutoModelForCausalLM.from_pretrained(
            config.llm,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            revision=config.llm_revision,
            device_map=device_map,
        )
    tokenizer, encoder = _reading_parts(config, device_map)
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
    """Assembles a student from loaded parts; if they are on the meta device, so are its parameters.

    Adds to the tokenizer: the added words, the image token, the task tokens and, if it has none, a padding token. The
    projector has the LLM's precision unless ``projector_dtype`` is given.
    """
    word_ids, task_names = _extend_vocabulary(tokenizer, config)
    processor = _processor(tokenizer, encoder, task_names, config.system_prompt, geometry)
    image_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    model = _assemble(llm, encoder, len(tokenizer), image_id, tokenizer.pad_token_id, word_ids, projector_dtype)
    ids = {task: tokenizer.convert_tokens_to_ids(names) for task, names in task_names.items()}
    student = Student(model, processor, ids, word_ids)
    model.generation_config = _generation_config(llm, tokenizer, student.silent_ids)
    return student


@without_loading_bars()
def build_processor(config: StudentConfig, geometry: Geometry) -> LlavaProcessor:
    """The processor that ``build_student`` gives the student, without reading weights.

    Raises:
        ConfigError: a part cannot be loaded, or the tokenizer has no chat template.
    """
    tokenizer, encoder = _reading_parts(config, device_map="meta")
    _, task_names = _extend_vocabulary(tokenizer, config)
    return _processor(tokenizer, encoder, task_names, config.system_prompt, geometry)


def _reading_parts(config: StudentConfig, device_map: str | None = None) -> tuple[PreTrainedTokenizerBase, Encoder]:
    tokenizer = _tokenizer(config)
    encoder = load_encoder(
        config.encoder,
        config.feature_layer,
        config.image_size,
        config.trust_remote_code,
        revision=config.encoder_revision,
        device_map=device_map,
    )
    return tokenizer, encoder


def _tokenizer(config: StudentConfig) -> PreTrainedTokenizerBase:
    with loading("student.llm", config.llm):
        return AutoTokenizer.from_pretrained(
            config.llm, trust_remote_code=config.trust_remote_code, revision=config.llm_revision
        )


def build_skeleton(config: StudentConfig) -> Student:
    """The student that ``build_student`` would make, without weights (on the meta device) and without a processor.

    Needs only configurations (``hub.sizes_of``), which for the published bases need no download, and with
    ``add_words`` the tokenizer.

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
    # In the order of _extend_vocabulary: words, image token, task tokens, padding.
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
    """Adds the student's tokens to the tokenizer; returns the ids of added words, and the task tokens by task."""
    layout = config.task_tokens
    names = {task: task_token_names(task, layout.per_task) for task in layout.order} if layout else {}
    new = [IMAGE_TOKEN, *(name for task in names.values() for name in task)]
    reserved = sorted({*new, PAD_TOKEN} & {*config.add_words})
    if reserved:
        raise ConfigError(f"student.add_words names {reserved}, which the student reserves: remove them")
    word_ids = add_words(tokenizer, config.add_words)
    tokenizer.add_tokens(new, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.padding_side = ANSWERING_SIDE
    tokenizer.init_kwargs["padding_side"] = ANSWERING_SIDE  # otherwise `save_pretrained` may omit it
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
    head = plain_head(llm)  # may change the LLM's configuration
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
    # Built on the meta device, without memory; its parts are then replaced by the loaded ones.
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = encoder.model
    model.model.language_model = llm.get_decoder()
    model.lm_head = head
    with llm.device:
        model.model.multi_modal_projector = LlavaMultiModalProjector(config).to(projector_dtype or llm.dtype)
    for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        linear.reset_parameters()
    old_size = model.get_input_embeddings().weight.shape[0]
    if vocabulary_size > old_size:
        model.resize_token_embeddings(vocabulary_size, mean_resizing=False)
    # The LLM may have more rows than its tokenizer has entries; added words may take those rows.
    new_rows = sorted({*range(old_size, vocabulary_size), *word_ids})
    if new_rows:
        set_to_mean((model.get_input_embeddings(), model.lm_head), new_rows, old_size)
    if word_ids:
        move_apart((model.get_input_embeddings(), model.lm_head), word_ids, old_size)
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
    suppress(base, silent_ids)
    return base
