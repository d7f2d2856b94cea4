"""Saved students answer alike in stock transformers at every batch size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from tests import tiny
from tests.conftest import outside
from tests.data.test_chat import LLAMA_3, MARKERS, PHI_3
from visper.config import Geometry
from visper.config import Student as StudentConfig
from visper.evaluation.ask import model_inputs
from visper.model import build_student, load_processor, load_student, save_student
from visper.quickstart import BASES

# In a process that cannot import this package: eight questions of different length in one batch, then one by one.
ASK = """
import json, sys
sys.modules["visper"] = None
import torch
from PIL import Image
from transformers import pipeline
torch.set_num_threads(1)
ask = pipeline("image-text-to-text", model=sys.argv[1], dtype=torch.float32, device="cpu")
words = ["Which", "sphere", "is", "closer", "to", "the", "camera", "?"]
chats = []
for i in range(8):
    picture = Image.effect_mandelbrot((20, 16), (-2, -1, 1, 1), 10 + 9 * i).convert("RGB")
    content = [dict(type="image", image=picture), dict(type="text", text=" ".join(words[-1 - i:]))]
    chats.append([dict(role="user", content=content)])
def answers(size):
    options = dict(batch_size=size, max_new_tokens=12, do_sample=False, return_full_text=False)
    return [out[0]["generated_text"] for out in ask(text=chats, **options)]
print(json.dumps([answers(8), answers(1)]))
"""


def quickstart(folder: Path) -> Path:
    return BASES / "llm"


def with_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.5, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bytes_with(template: str) -> PreTrainedTokenizerBase:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_tokens(MARKERS, special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def llama_3_style(folder: Path) -> Path:
    tokenizer = bytes_with(LLAMA_3)
    tokenizer.pad_token = None  # as published
    return with_tokenizer(folder, tokenizer)


def phi_3_style(folder: Path) -> Path:
    return with_tokenizer(folder, bytes_with(PHI_3))


def llama_3(folder: Path) -> Path:
    return with_tokenizer(folder, AutoTokenizer.from_pretrained(outside("tokenizers", "llama3")))


@pytest.mark.slow
@pytest.mark.parametrize("make_llm", [quickstart, llama_3_style, phi_3_style, llama_3], ids=lambda make: make.__name__)
def test_answers_of_stock_transformers_are_those_of_batch_1_at_batch_8(make_llm, tmp_path, tiny_encoder):
    config = StudentConfig(llm=str(make_llm(tmp_path / "llm")), encoder=str(tiny_encoder))
    torch.manual_seed(0)  # the projector
    save_student(build_student(config, Geometry.SQUASH), tmp_path / "model")
    asked = subprocess.run([sys.executable, "-c", ASK, tmp_path / "model"], check=True, capture_output=True, text=True)
    together, apart = json.loads(asked.stdout.splitlines()[-1])
    assert together == apart
    assert len(set(apart)) > 2  # or the test would see nothing


def test_prompts_are_padded_on_the_left_whatever_the_llms_tokenizer_says(tmp_path, tiny_encoder):
    config = StudentConfig(llm=str(llama_3_style(tmp_path / "llm")), encoder=str(tiny_encoder))
    student = build_student(config, Geometry.SQUASH)
    assert student.processor.tokenizer.padding_side == "left"
    save_student(student, tmp_path / "model")
    assert AutoProcessor.from_pretrained(tmp_path / "model").tokenizer.padding_side == "left"
    assert AutoTokenizer.from_pretrained(tmp_path / "model").padding_side == "left"


def test_a_students_folder_that_pads_on_the_right_is_saved_padding_on_the_left(tmp_path, tiny_llm, tiny_encoder):
    student = build_student(StudentConfig(llm=str(tiny_llm), encoder=str(tiny_encoder)), Geometry.SQUASH)
    student.processor.tokenizer.padding_side = "right"
    save_student(student, tmp_path / "old")
    assert AutoTokenizer.from_pretrained(tmp_path / "old").padding_side == "right"
    assert load_processor(tmp_path / "old").tokenizer.padding_side == "left"
    save_student(load_student(tmp_path / "old"), tmp_path / "new")
    assert AutoTokenizer.from_pretrained(tmp_path / "new").padding_side == "left"


def test_the_saved_tokenizer_alone_has_the_students_template(tmp_path, tiny_llm, tiny_encoder):
    student = build_student(StudentConfig(llm=str(tiny_llm), encoder=str(tiny_encoder)), Geometry.SQUASH)
    save_student(student, tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == student.processor.chat_template


# Likewise: the logits behind rows of two, one and three images, in one batch and one by one.
SHOW_SEVERAL = """
import sys
sys.modules["visper"] = None
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
torch.set_num_threads(1)
processor = AutoProcessor.from_pretrained(sys.argv[1])
model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32)
image = dict(type="image")
text = lambda words: dict(type="text", text=words)
asked = [[text("is "), image, text(" or "), image, text(" closer?")]]
asked += [[image, text("what?")], "<image><image> or <image>?"]
prompts = [
    processor.apply_chat_template([dict(role="user", content=content)], add_generation_prompt=True) for content in asked
]
pictures = [[Image.open(f"{sys.argv[1]}/{i}.png") for i in own] for own in ((0, 1), (2,), (1, 0, 2))]
def logits(rows):
    shown = [picture for row in rows for picture in pictures[row]]
    inputs = processor(
        text=[prompts[row] for row in rows], images=shown, padding=True, return_tensors="pt", add_special_tokens=False
    )
    with torch.no_grad():
        found = model(**inputs).logits
    return [one[mask.bool()] for one, mask in zip(found, inputs["attention_mask"])]
torch.save([logits([0, 1, 2]), [logits([row])[0] for row in range(3)]], sys.argv[2])
"""


@pytest.mark.slow
def test_rows_of_several_images_have_the_logits_of_stock_transformers_at_every_batch_size(
    tmp_path, tiny_llm, tiny_encoder
):
    student = build_student(StudentConfig(llm=str(tiny_llm), encoder=str(tiny_encoder)), Geometry.SQUASH)
    save_student(student, tmp_path / "model")
    pictures = [Image.effect_mandelbrot((20, 16), (-2, -1, 1, 1), 10 + 9 * i).convert("RGB") for i in range(3)]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / "model" / f"{i}.png")
    command = [sys.executable, "-c", SHOW_SEVERAL, tmp_path / "model", tmp_path / "logits.pt"]
    subprocess.run(command, check=True)
    together, apart = torch.load(tmp_path / "logits.pt")
    questions = ["is <image> or <image> closer?", "<image>\nwhat?", "<image><image> or <image>?"]
    shown = [[pictures[i] for i in own] for own in ((0, 1), (2,), (1, 0, 2))]
    inputs = model_inputs(student.processor, questions, shown)
    with torch.no_grad():
        own = student.model.eval()(**inputs).logits
    for row, mask, batched, alone in zip(own, inputs["attention_mask"].bool(), together, apart, strict=True):
        assert torch.equal(row[mask], batched)
        assert (batched - alone).abs().max() < 2e-6  # logits up to 0.4; sums in another order: 1e-7 seen
    swapped = model_inputs(student.processor, questions[:1], [shown[0][::-1]])
    with torch.no_grad():
        assert not torch.allclose(student.model(**swapped).logits[0], apart[0])


def test_servers_find_in_a_folder_what_they_look_for(tmp_path, tiny_llm, tiny_encoder):
    """vLLM and SGLang choose the model's class by `architectures` and the encoder's by its type, and know CLIP's."""
    student = build_student(StudentConfig(llm=str(tiny_llm), encoder=str(tiny_encoder)), Geometry.SQUASH)
    save_student(student, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["vision_config"]["model_type"] == "clip_vision_model"
    assert isinstance(config["vision_feature_layer"], int)
    assert config.get("image_token_index", config.get("image_token_id")) == tokenizer.convert_tokens_to_ids("<image>")
    task_tokens = {i for ids in student.task_token_ids.values() for i in ids}
    assert task_tokens | {tokenizer.convert_tokens_to_ids("<image>")} <= set(generation["suppress_tokens"])


def test_a_servers_prompt_has_the_ids_and_the_length_of_visper_evaluates(tmp_path, tiny_llm, tiny_encoder):
    student = build_student(StudentConfig(llm=str(tiny_llm), encoder=str(tiny_encoder)), Geometry.SQUASH)
    save_student(student, tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    image = Image.new("RGB", (20, 16), "red")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    theirs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    ours = model_inputs(student.processor, ["What is it?"], [[image]])
    assert torch.equal(theirs["input_ids"], ours["input_ids"])
    torch.testing.assert_close(theirs["pixel_values"], ours["pixel_values"], rtol=0, atol=0)
    text = processor.apply_chat_template([{"role": "user", "content": "What is it?"}], **options)["input_ids"].shape[1]
    task_tokens = sum(len(ids) for ids in student.task_token_ids.values())
    newline = 1  # between the image and the text
    assert ours["input_ids"].shape[1] == text + 16 + task_tokens + newline
