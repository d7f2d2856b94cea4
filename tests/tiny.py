"""Tiny random models as ordinary folders: every test loads them through the real ``from_pretrained`` paths."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TimmWrapperConfig,
    TimmWrapperModel,
)

from visper.config import Head, load_run
from visper.distillation.teachers import SquashedImage, TargetSpec, Teacher

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token: any text encodes and decodes exactly."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<unused>")
    fast.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_llm(folder: Path, layers: int = 4, width: int = 32, tied: bool = False, seed: int = 0) -> Path:
    """A random Llama with a byte tokenizer."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_encoder(folder: Path, size: int = 16, patch: int = 4, width: int = 24, seed: int = 1) -> Path:
    """A random CLIP image encoder of three layers: 16 patches and a class token."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=size,
        patch_size=patch,
        projection_dim=width,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    square = {"height": size, "width": size}
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square).save_pretrained(folder)
    return folder


def save_cnn(folder: Path) -> Path:
    """A random CNN of timm with batch normalization: 4 tokens of a 64-pixel picture."""
    torch.manual_seed(2)
    picture = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3}
    config = TimmWrapperConfig(architecture="test_efficientnet", do_pooling=False, pretrained_cfg=picture)
    TimmWrapperModel(config).save_pretrained(folder)
    return folder


class PooledColors(Teacher):
    """A teacher without weights to load: mean colors of a ``grid`` x ``grid`` map, mixed into ``width`` channels."""

    def __init__(self, model: str, grid: int = 4, width: int = 8, size: int = 16) -> None:
        super().__init__()
        self.spec = TargetSpec(grid * grid, width, (grid, grid) if grid > 1 else None)
        self.preprocess = SquashedImage((size, size))
        self.register_buffer("mix", torch.randn(3, width, generator=torch.Generator().manual_seed(len(model))))
        self.freeze()

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[B, grid*grid, width]``."""
        side = self.spec.grid[0] if self.spec.grid else 1
        pooled = torch.nn.functional.adaptive_avg_pool2d(pixels, side)
        return pooled.flatten(2).transpose(1, 2) @ self.mix


class HalfColors(PooledColors):
    """``PooledColors`` whose targets are numbers that float16 has, whatever the batch."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[B, grid*grid, width]``, rounded to a 64th."""
        return (super().encode(pixels) * 64).round() / 64


def published_predictors() -> dict[str, Head]:
    """The predictors of the published recipe, by task."""
    settings = load_run("llama3-8b-vit-l/pt").distillation
    assert settings is not None
    return {task: own.head for task, own in settings.tasks.items()}


def distillation(**changes: Any) -> dict[str, Any]:
    """Three tasks like the published ones, on four layers, from ``PooledColors``."""
    teacher = {"kind": "tests.tiny:PooledColors", "model": "colors"}
    small = {"heads": 2, "head_width": 4}
    tasks = {
        "depth": {"target": teacher, "layers": [1, 3], "head": {**small, "inner": "llm", "mlp": True}},
        "seg": {"target": {**teacher, "width": 6}, "layers": [2, 4], "head": small},
        "gen": {"target": {**teacher, "grid": 1, "width": 10}, "layers": [3], "head": small},
    }
    return {"tasks": tasks, **changes}


def write_rows(folder: Path, images: int = 12, text_rows: int = 4, seed: int = 0) -> Path:
    """``rows.json`` and random pictures in LLaVA's format: image rows, then text-only rows."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for i in range(images):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
        turns = [
            ("human", "<image>\nwhat?" if i % 2 else "what is it?\n<image>"),
            ("gpt", "thing " + "x" * (1 + i % 5)),
        ]
        rows.append({"id": i, "image": f"{i}.png", "conversations": [{"from": f, "value": v} for f, v in turns]})
    for i in range(text_rows):
        turns = [("human", f"say {i}"), ("gpt", "word" * (1 + i))]
        rows.append({"id": f"text-{i}", "conversations": [{"from": f, "value": v} for f, v in turns]})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def write_several(folder: Path, rows: int = 16, counts: tuple[int, ...] = (2, 1, 0, 3)) -> Path:
    """Likewise rows of so many images each, in turn; some images are shown twice."""
    write_rows(folder, images=8, text_rows=0)
    questions = ["say it", "<image>\nwhat?", "<image> or <image>?", "<image><image>\nsame?"]
    content = []
    for i in range(rows):
        count = counts[i % len(counts)]
        turns = [("human", questions[count]), ("gpt", "thing " + "x" * (1 + i % 5))]
        turns += [("human", "and <image>?"), ("gpt", "no")] if count == 3 else []
        names = [f"{(i + j) % 8}.png" for j in range(count)]
        content.append({"id": i, "image": names, "conversations": [{"from": f, "value": v} for f, v in turns]})
    (folder / "rows.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_recipe(folder: Path, stage: str, llm: Path, encoder: Path, max_steps: int, workers: int = 0) -> Path:
    """A recipe of a few tiny rows that logs every step into ``folder/STAGE``; the rows are written beside it."""
    rows = write_rows(folder / "rows")
    settings = {
        "name": stage,
        "stage": stage,
        "output": str(folder / stage),
        "student": {"llm": str(llm), "encoder": str(encoder)},
        "data": {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}], "workers": workers},
        "optimization": {
            "global_batch": 4,
            "micro_batch": 2,
            "lr": 1e-3,
            "max_steps": max_steps,
            "precision": "float32",
        },
        "logging": {"every": 1},
    }
    (folder / "run.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return folder / "run.yaml"


def write_parquet(rows: Path, file: Path) -> None:
    """The rows that ``write_rows`` wrote, as one Parquet file that holds their images."""
    content = json.loads((rows / "rows.json").read_text(encoding="utf-8"))
    images = [(rows / "images" / row["image"]).read_bytes() if "image" in row else None for row in content]
    columns = {
        "id": [str(row["id"]) for row in content],
        "image": [None if image is None else {"bytes": image, "path": None} for image in images],
        "conversations": [row["conversations"] for row in content],
    }
    pq.write_table(pa.table(columns), file)
