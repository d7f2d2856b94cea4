"""The student: stock LLaVA from any LLM and encoder, loadable without this package, answering the same."""

import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests import tiny
from visper.common.errors import ConfigError
from visper.config import Geometry
from visper.config import Student as StudentConfig
from visper.model import (
    FeatureMapTower,
    TaskTokens,
    build_student,
    initial_queries,
    load_encoder,
    load_student,
    save_student,
)

PICTURE = Image.effect_mandelbrot((20, 16), (-2, -1, 1, 1), 60).convert("RGB")


@pytest.fixture(scope="module")
def student(tiny_llm, tiny_encoder):
    return build_student(StudentConfig(llm=str(tiny_llm), encoder=str(tiny_encoder)), Geometry.SQUASH)


def inputs_of(student, text="what?"):
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt = student.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return student.processor(text=prompt, images=PICTURE, return_tensors="pt", add_special_tokens=False)


def logits_of(student, inputs):
    with torch.no_grad():
        return student.model(**inputs).logits


def test_task_tokens_stand_behind_the_image_in_the_order_of_the_run(student):
    ids = inputs_of(student)["input_ids"][0].tolist()
    behind = ids.index(student.image_token_id) + ids.count(student.image_token_id)
    expected = [token for task in ("depth", "seg", "gen") for token in student.task_token_ids[task]]
    assert ids[behind : behind + len(expected)] == expected and len(expected) == 24


def test_order_and_number_of_task_tokens_are_the_runs(tiny_llm, tiny_encoder):
    config = StudentConfig(
        llm=str(tiny_llm), encoder=str(tiny_encoder), task_tokens={"order": ["gen", "depth"], "per_task": 2}
    )
    ids = build_student(config, Geometry.SQUASH).task_token_ids
    assert list(ids) == ["gen", "depth"] and all(len(tokens) == 2 for tokens in ids.values())


@pytest.mark.slow
def test_saved_folder_answers_identically_without_this_package(student, tmp_path):
    save_student(student, tmp_path / "model")
    inputs = inputs_of(student)
    expected = logits_of(student, inputs)
    torch.save({"inputs": dict(inputs), "logits": expected}, tmp_path / "expected.pt")
    code = f"""
import sys, torch
torch.set_num_threads(1)  # as here: bits depend on it
from transformers import AutoProcessor, LlavaForConditionalGeneration
from PIL import Image
from safetensors.torch import load_file
model = LlavaForConditionalGeneration.from_pretrained({str(tmp_path / "model")!r}, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained({str(tmp_path / "model")!r})
expected = torch.load({str(tmp_path / "expected.pt")!r})
picture = Image.effect_mandelbrot((20, 16), (-2, -1, 1, 1), 60).convert("RGB")
content = [dict(type="image", image=picture), dict(type="text", text="what?")]
inputs = processor.apply_chat_template([dict(role="user", content=content)], add_generation_prompt=True,
                                       tokenize=True, return_dict=True, return_tensors="pt")
assert torch.equal(inputs["input_ids"], expected["inputs"]["input_ids"])
assert torch.equal(inputs["pixel_values"], expected["inputs"]["pixel_values"])
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, expected["logits"])
text = model.generate(**inputs, max_new_tokens=4, do_sample=False)
assert not (set(text[0, inputs["input_ids"].shape[1]:].tolist()) & set({student.silent_ids!r}))
assert "visper" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_loads_back_with_its_task_tokens(student, tmp_path):
    save_student(student, tmp_path / "model")
    again = load_student(tmp_path)
    assert again.task_token_ids == student.task_token_ids
    inputs = inputs_of(student)
    assert torch.equal(logits_of(again, inputs), logits_of(student, inputs))


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_of_the_old_ones(tied, tmp_path, tiny_encoder):
    llm = tiny.save_llm(tmp_path / "llm", tied=tied)
    student = build_student(StudentConfig(llm=str(llm), encoder=str(tiny_encoder)), Geometry.SQUASH)
    table = student.model.get_input_embeddings().weight
    old = len(tiny.byte_tokenizer())
    torch.testing.assert_close(table[student.silent_ids[-1]], table[:old].mean(0))
    assert (student.model.lm_head.weight.data_ptr() == table.data_ptr()) is tied


def test_task_tokens_written_back_equal_the_hook(student):
    queries = initial_queries(student, {"depth": 16, "seg": 16}, torch.Generator().manual_seed(0))
    tokens = TaskTokens(student.task_token_ids, queries)
    embedding = student.model.get_input_embeddings()
    handle = tokens.attach(embedding)
    inputs = inputs_of(student)
    hooked = logits_of(student, inputs)
    handle.remove()
    assert not torch.equal(logits_of(student, inputs), hooked)
    tokens.write_back(embedding)
    assert torch.equal(logits_of(student, inputs), hooked)


@pytest.fixture
def gemma(tmp_path, tiny_encoder):
    """A student on a random Gemma 3: it multiplies the rows it looks up by sqrt(32)."""
    torch.manual_seed(0)
    tokenizer = tiny.byte_tokenizer()
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=tokenizer.pad_token_id, sliding_window=64,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    config = StudentConfig(llm=str(tmp_path / "gemma"), encoder=str(tiny_encoder))
    return build_student(config, Geometry.SQUASH)


# bfloat16 rounds twice, each time by up to 2^-8: the row written, and the row scaled.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_gemmas_scale_is_taken_out_of_task_tokens_written_back(gemma, dtype, tolerance):
    queries = initial_queries(gemma, {"depth": 16, "seg": 16}, torch.Generator().manual_seed(0))
    tokens = TaskTokens(gemma.task_token_ids, queries)
    embedding = gemma.model.get_input_embeddings().to(dtype)
    tokens.write_back(embedding)
    torch.testing.assert_close(embedding(tokens.token_ids).float(), tokens.input_rows(), rtol=tolerance, atol=1e-6)
    held = TaskTokens.frozen(gemma.task_token_ids, embedding)
    torch.testing.assert_close(held.input_rows(), tokens.input_rows(), rtol=2 * tolerance, atol=1e-6)
    spread = embedding.weight.detach().float().std() * 32**0.5
    assert queries["gen"].std() == pytest.approx(float(spread), rel=0.2)


def test_a_gemma_student_answers_identically_when_loaded(gemma, tmp_path):
    save_student(gemma, tmp_path / "model")
    inputs = inputs_of(gemma)
    assert torch.equal(logits_of(load_student(tmp_path), inputs), logits_of(gemma, inputs))


def test_input_rows_are_means_of_consecutive_groups():
    queries = {"depth": torch.arange(12.0).reshape(6, 2)}
    rows = TaskTokens({"depth": [5, 6, 7]}, queries).input_rows()
    assert rows.tolist() == [[1.0, 2.0], [5.0, 6.0], [9.0, 10.0]]


def test_queries_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiple of 3"):
        TaskTokens({"depth": [1, 2, 3]}, {"depth": torch.zeros(7, 2)})


def clip_both_halves(folder):
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    vision |= {"image_size": 16, "patch_size": 4}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder)


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 4}

ENCODERS = {
    "clip": (clip_both_halves, 16),
    "siglip": (lambda f: SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=16)).save_pretrained(f), 16),
    "dinov2": (lambda f: Dinov2Model(Dinov2Config(**SIZES, image_size=16)).save_pretrained(f), 16),
    "dinov3": (
        lambda f: DINOv3ViTModel(DINOv3ViTConfig(**SIZES, image_size=16, num_register_tokens=4)).save_pretrained(f),
        20,  # the four register tokens stay with the patches
    ),
    "convnext": (
        lambda f: ConvNextModel(ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 24])).save_pretrained(f),
        4,
    ),
    "timm": (tiny.save_cnn, 4),
}


@pytest.mark.parametrize("family", ENCODERS)
def test_every_family_of_encoders_gives_tokens_and_survives_saving(family, tmp_path, tiny_llm):
    save, tokens = ENCODERS[family]
    save(tmp_path / "encoder")
    size = 64 if family in ("convnext", "timm") else None
    config = StudentConfig(llm=str(tiny_llm), encoder=str(tmp_path / "encoder"), image_size=size)
    student = build_student(config, Geometry.SQUASH)
    inputs = inputs_of(student)
    assert inputs["input_ids"][0].tolist().count(student.image_token_id) == tokens
    expected = logits_of(student, inputs)
    assert torch.isfinite(expected).all()
    save_student(student, tmp_path / "model")
    again = load_student(tmp_path)
    assert torch.equal(logits_of(again, inputs_of(again)), expected)


def test_feature_maps_are_read_row_by_row(tmp_path):
    ENCODERS["convnext"][0](tmp_path)
    encoder = load_encoder(str(tmp_path), image_size=64)
    assert isinstance(encoder.model, FeatureMapTower)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        tokens = encoder.model(pixels).hidden_states[-1]
        feature_map = encoder.model.backbone(pixels).last_hidden_state
    assert torch.equal(tokens[0, 1], feature_map[0, :, 0, 1])


def test_a_training_tower_keeps_its_batch_statistics(tmp_path):
    ENCODERS["timm"][0](tmp_path)
    tower = load_encoder(str(tmp_path), image_size=64).model.train()
    pixels = torch.randn(4, 3, 64, 64)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    together = tower(pixels).last_hidden_state
    assert tower.training
    assert torch.allclose(together[:1], tower(pixels[:1]).last_hidden_state, atol=1e-5)  # 3e-7 measured
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def test_a_timm_encoder_keeps_its_own_colors(tmp_path):
    ENCODERS["timm"][0](tmp_path)
    assert load_encoder(str(tmp_path)).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("part", ["llm", "encoder"])
def test_a_missing_part_names_the_key_and_the_remedy(part, tiny_llm, tiny_encoder, tmp_path):
    parts = {"llm": str(tiny_llm), "encoder": str(tiny_encoder), part: str(tmp_path / "nowhere")}
    with pytest.raises(ConfigError, match=f"student.{part}: cannot load '.*nowhere'"):
        build_student(StudentConfig(**parts), Geometry.SQUASH)


def test_a_layer_beyond_the_encoder_is_refused(tiny_encoder):
    for layer in (-9, 4, 0):
        with pytest.raises(ValueError, match=f"3 layers, but feature_layer is {layer}"):
            load_encoder(str(tiny_encoder), feature_layer=layer)


def test_settings_of_generation_that_an_llm_never_reads_do_not_stop_saving(tmp_path, tiny_llm, tiny_encoder):
    """As Vicuna has them, without do_sample; transformers refuses to save them beside changed settings."""
    folder = shutil.copytree(tiny_llm, tmp_path / "llm")
    (folder / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "length_penalty": 0.8}')
    student = build_student(StudentConfig(llm=str(folder), encoder=str(tiny_encoder)), Geometry.SQUASH)
    save_student(student, tmp_path / "saved")
    assert load_student(tmp_path / "saved").model.generation_config.temperature is None


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no model"):
        load_student(tmp_path)


def test_the_processor_of_the_folder_carries_the_geometry(tiny_llm, tiny_encoder, tmp_path):
    config = StudentConfig(llm=str(tiny_llm), encoder=str(tiny_encoder))
    save_student(build_student(config, Geometry.PAD), tmp_path / "model")
    assert AutoImageProcessor.from_pretrained(tmp_path / "model").do_pad


def test_parameters_are_saved_under_the_published_names(student, tmp_path):
    """The layout of llava-hf checkpoints, which vLLM and every transformers version read."""
    save_student(student, tmp_path / "model")
    heads = {
        name.split(".layers.")[0] for name in load_file(tmp_path / "model" / "model.safetensors") if "layers" in name
    }
    assert heads == {"language_model.model", "vision_tower.vision_model.encoder"}


def test_an_llm_kept_as_it_is_stored_gives_the_weights_of_one_loaded_whole_and_rounded(tmp_path, tiny_encoder):
    LlamaForCausalLM.from_pretrained(tiny.save_llm(tmp_path / "llm"), dtype=torch.bfloat16).save_pretrained(
        tmp_path / "llm"
    )
    config = StudentConfig(llm=str(tmp_path / "llm"), encoder=str(tiny_encoder))
    built = []
    for dtype in (torch.float32, "auto"):
        torch.manual_seed(0)
        built.append(build_student(config, Geometry.SQUASH, dtype).model)
    assert built[1].model.language_model.dtype == torch.bfloat16
    for (name, whole), stored in zip(built[0].named_parameters(), built[1].parameters(), strict=True):
        if "projector" in name:
            assert stored.dtype == torch.float32 and torch.equal(stored, whole)
        else:
            assert torch.equal(stored.bfloat16(), whole.bfloat16()), name


@pytest.mark.parametrize("name", ["runs/gone/pt", "/gone", "./gone"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ConfigError, match=rf"there is no folder '{name}', and the name cannot be a hub id"):
        load_student(name)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "questions.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"questions\.json' is a file: expected a stage's output"):
        load_student(tmp_path / "questions.json")
